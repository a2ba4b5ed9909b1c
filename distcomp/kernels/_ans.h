/* Asymmetric numeral systems with ranges (rANS; Duda, 2013), by which a byte takes a fraction of a bit; a part of
 * _entropy.c.
 *
 * A table divides SLOTS numbers among the bytes, one after the other, to each as many as its share of all bytes: byte s
 * has f of them from c on. A state x, from LEAST to below 2^16 LEAST, takes s in and lets it out again:
 *
 *   push   if x >= 2^16 LEAST / SLOTS * f, its lower 16 bits are written and x becomes x / 2^16; then SLOTS * (x / f) + c + x % f
 *   pull   x % SLOTS is a slot, which says s, f and c; x becomes f * (x / SLOTS) + x % SLOTS - c; if that is below LEAST,
 *          2^16 x and 16 bits that are read
 *
 * So x grows by what s is worth, and what was pushed last is pulled first. Division is multiplication (Granlund and
 * Montgomery, 1994): for all x below 2^31, x / f is x times 2^(31 + u) / f, rounded up, over 2^(31 + u), where 2^u >= f.
 */

/* ------------------------------------------------------------------------------------------------------- shares */

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

/* ------------------------------------------------------------------------------------------------------- tables */

/* Of each slot: its byte, 2^8 times how many that one has, and 2^20 times how many of these come before. */
static void write_slots_of(const uint16_t *slots, uint32_t *slots_of) {
    for (uint32_t s = 0, at = 0; s < SYMBOLS; s++)
        for (uint32_t k = 0; k < slots[s]; k++) slots_of[at++] = s | (uint32_t)slots[s] << 8 | k << 20;
}

/* Of each byte what it is pushed by. SLOTS (x / f) + c + x % f is x + c + (SLOTS - f) (x / f); where f is 1, the inverse is
 * 2^32 - 1 and yields x - 1, which SLOTS - 1 more make up for. */
static void write_steps(const uint16_t *slots, Step *steps) {
    for (uint32_t s = 0, before = 0; s < SYMBOLS; before += slots[s++]) {
        uint32_t f = slots[s], up = f < 2 ? 1 : 32 - (uint32_t)__builtin_clz(f - 1);
        if (!f) continue;
        uint32_t inverse = f < 2 ? UINT32_MAX : (uint32_t)((((uint64_t)1 << (31 + up)) + f - 1) / f);
        steps[s] = (Step){inverse, (SLOTS - f) | (up - 1) << 12 | (before + (f < 2 ? SLOTS - 1 : 0)) << 16};
    }
}

static void choose_lanes(Lanes *lanes) {
    memset(lanes, 0, sizeof *lanes);
    for (unsigned mask = 0; mask < 256; mask++) {
        unsigned before = 0, number = (unsigned)__builtin_popcount(mask);
        for (unsigned lane = 0; lane < 8; lane++) {
            lanes->ranks[mask][lane] = (uint8_t)before;
            if (mask >> lane & 1) lanes->last[mask][8 - number + before++] = (uint8_t)lane;
        }
    }
}

/* -------------------------------------------------------------------------------------------------- one by one */

#define FULL(x, others) (((x) >> (31 - LOG_SLOTS)) + (others) >= SLOTS)

/* No branches: whether a state is full, or low, is anybody's guess. */
INLINE uint32_t push(uint32_t x, Step step, uint8_t **out) {
    uint32_t others = step.share & 0xfff, full = FULL(x, others);
    uint16_t word = (uint16_t)x;
    memcpy(*out - 2, &word, 2);
    *out -= 2 * full;
    x >>= 16 * full;
    uint32_t quotient = (uint32_t)((uint64_t)x * step.inverse >> 32) >> (step.share >> 12 & 15);
    return x + (step.share >> 16) + quotient * others;
}

INLINE uint32_t pull(uint32_t x, uint32_t slot, const uint8_t **in) {
    uint16_t word;
    memcpy(&word, *in, 2);
    x = (slot >> 8 & 0xfff) * (x >> LOG_SLOTS) + (slot >> 20);
    uint32_t low = x < LEAST;
    *in += 2 * low;
    return x << 16 * low | (word & (0 - low));
}
