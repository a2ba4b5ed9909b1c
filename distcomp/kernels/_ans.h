/* Tables of asymmetric numeral systems (Duda, 2013), by which a byte takes a fraction of a bit; a part of _entropy.c.
 *
 * A table divides SLOTS numbers, the states, among the bytes, to each as many as its share of all bytes, here and there
 * over the whole range. Of a byte s that has f of them the k-th, k from 0, is reached from those states that begin as
 * x = f + k does: of a state below SLOTS, SLOTS added, the first bits are x's, and the rest, which bits of the stream
 * say, is as long as is missing. A frequent byte has many slots, and few bits are missing.
 */

static uint32_t slots_by(uint32_t count, float each) {
    uint32_t slots = (uint32_t)(int32_t)((float)(int32_t)count * each + 0.5f);
    return count ? slots + !slots : 0;
}

/* How many slots each byte has: as many as its share, at least one where it occurs, SLOTS in all. The share is found by
 * bisection; what is left goes to those who would be the next to have one more. */
INLINE void share_slots(const uint32_t *counts, uint16_t *slots) {
    uint32_t n = 0, shared = 0, more[SYMBOLS];
    for (int s = 0; s < SYMBOLS; s++) n += counts[s];
    float low = 0, high = 2 * (float)SLOTS / (float)(int32_t)(n + !n);
    for (int i = 0; i < 24; i++) {
        float each = (low + high) / 2;
        uint32_t all = 0;
        for (int s = 0; s < SYMBOLS; s++) all += slots_by(counts[s], each);
        if (all <= SLOTS) low = each;
        else high = each;
    }
    for (int s = 0; s < SYMBOLS; s++) {
        slots[s] = (uint16_t)slots_by(counts[s], low);
        more[s] = slots_by(counts[s], high) - slots[s];
        shared += slots[s];
    }
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t given = (uint32_t)smaller(more[s], SLOTS - shared);
        slots[s] = (uint16_t)(slots[s] + given);
        shared += given;
    }
    slots[0] = (uint16_t)(slots[0] + SLOTS - shared); /* where nothing was counted, all */
}

/* Elias's gamma code of one more than each number of slots: as many zeros as bits follow its first, which is 1. */
static uint8_t *write_slots(const uint16_t (*slots)[SYMBOLS], int tables, uint8_t *out) {
    uint64_t buffer = 0;
    unsigned filled = 0;
    for (int i = 0; i < tables * SYMBOLS; i++) {
        uint32_t number = slots[i / SYMBOLS][i % SYMBOLS] + 1u, zeros = 31 - (uint32_t)__builtin_clz(number);
        buffer |= (uint64_t)(1 | (number ^ 1u << zeros) << 1) << (filled + zeros);
        for (filled += 2 * zeros + 1; filled >= 8; filled -= 8, buffer >>= 8) *out++ = (uint8_t)buffer;
    }
    if (filled) *out++ = (uint8_t)buffer;
    return out;
}

/* Where they end, which is not beyond `end`; NULL where they are none. Reads SLACK bytes beyond. */
static const uint8_t *read_slots(const uint8_t *in, const uint8_t *end, size_t tables, uint16_t (*slots)[SYMBOLS]) {
    uint64_t at = 0, most = 8 * (uint64_t)(end - in);
    for (size_t t = 0; t < tables; t++) {
        uint32_t shared = 0;
        for (int s = 0; s < SYMBOLS; s++) {
            if (at > most) return NULL;
            uint64_t bits = load_8(in + (at >> 3)) >> (at & 7);
            unsigned zeros = bits ? (unsigned)__builtin_ctzll(bits) : 64;
            if (zeros > LOG_SLOTS) return NULL;
            uint32_t number = 1u << zeros | ((uint32_t)(bits >> (zeros + 1)) & ((1u << zeros) - 1));
            slots[t][s] = (uint16_t)(number - 1);
            shared += number - 1;
            at += 2 * zeros + 1;
        }
        if (shared != SLOTS) return NULL;
    }
    return at > most ? NULL : in + (at + 7) / 8;
}

/* Which byte each slot is. */
static void spread(const uint16_t *slots, uint8_t *byte_of) {
    uint32_t at = 0;
    for (int s = 0; s < SYMBOLS; s++)
        for (uint32_t k = 0; k < slots[s]; k++, at = (at + SPREAD) % SLOTS) byte_of[at] = (uint8_t)s;
}

/* Of each state of a decoder: which byte it is, how many bits are missing, and what they are added to. */
static void read_states(const uint16_t *slots, size_t table, uint32_t (*states)[TABLES]) {
    uint8_t byte_of[SLOTS];
    uint32_t next[SYMBOLS];
    spread(slots, byte_of);
    for (int s = 0; s < SYMBOLS; s++) next[s] = slots[s];
    for (uint32_t state = 0; state < SLOTS; state++) {
        uint32_t x = next[byte_of[state]]++, bits = LOG_SLOTS - (31 - (uint32_t)__builtin_clz(x));
        states[state][table] = byte_of[state] | bits << 8 | ((x << bits) - SLOTS) << 16;
    }
}


static void write_states(const uint16_t *slots, size_t table, Encoder *e) {
    uint8_t byte_of[SLOTS];
    uint32_t next[SYMBOLS], before = (uint32_t)(table * SLOTS);
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t f = slots[s], most = f < 2 ? LOG_SLOTS : LOG_SLOTS - (31 - (uint32_t)__builtin_clz(f - 1));
        e->missing[table * SYMBOLS + (size_t)s] = (most << 16) - (f << most);
        e->first[table * SYMBOLS + (size_t)s] = before - f;
        next[s] = before;
        before += f;
    }
    spread(slots, byte_of);
    for (uint32_t state = 0; state < SLOTS; state++) e->states[next[byte_of[state]]++] = (uint16_t)(SLOTS + state);
}
