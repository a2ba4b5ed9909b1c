/* How often bytes occur, what they would take, and their codes; a part of _entropy.c. */

/* ---------------------------------------------------------------------------------------------------- counting */

/* Of the first bytes of each stretch. */
static void count_bytes(const uint8_t *data, size_t n, size_t first, uint32_t *counts) {
    uint32_t part[2][SYMBOLS]; /* two, so that a run of one byte does not wait for itself */
    memset(part, 0, sizeof part);
    for (size_t at = 0; at < n; at += STRETCH) {
        size_t end = smaller(n, at + first);
        for (size_t i = at; i + 2 <= end; i += 2) {
            part[0][data[i]]++;
            part[1][data[i + 1]]++;
        }
        if ((end - at) % 2) part[0][data[end - 1]]++;
    }
    for (int s = 0; s < SYMBOLS; s++) counts[s] = part[0][s] + part[1][s];
}

INLINE void count_divided(const uint8_t *data, const uint8_t *table_of, size_t n, uint32_t (*counts)[SYMBOLS]) {
    uint32_t odd[TABLES][SYMBOLS]; /* two, so that neighbours do not wait for each other */
    memset(counts, 0, sizeof odd);
    memset(odd, 0, sizeof odd);
    for (size_t i = 0; i + 2 <= n; i += 2) {
        counts[table_of[i]][data[i]]++;
        odd[table_of[i + 1]][data[i + 1]]++;
    }
    if (n % 2) counts[table_of[n - 1]][data[n - 1]]++;
    for (int t = 0; t < TABLES; t++)
        for (int s = 0; s < SYMBOLS; s++) counts[t][s] += odd[t][s];
}

/* Sixteenths of a bit: log2, rounded down. */
static uint32_t log2_sixteenths(uint32_t x) {
    int exponent = 31 - __builtin_clz(x);
    uint64_t mantissa = (uint64_t)x << (31 - exponent);
    uint32_t result = (uint32_t)exponent;
    for (int i = 0; i < 4; i++) {
        mantissa = mantissa * mantissa >> 31;
        int above = mantissa >> 32 != 0;
        mantissa >>= above;
        result = result << 1 | (uint32_t)above;
    }
    return result;
}

/* Sixteenths of a bit that each byte would take, at most SLOTS' worth. */
static uint32_t price_of(uint32_t count, uint32_t log2_of_all) {
    uint32_t price = count ? log2_of_all - log2_sixteenths(count) : 16 * LONGEST;
    return price < 16 * LONGEST ? price : 16 * LONGEST;
}

/* What all of the bytes would take, in bytes of each. */
static double price_of_all(const uint32_t *counts) {
    uint64_t n = 0, sixteenths = 0;
    for (int s = 0; s < SYMBOLS; s++) n += counts[s];
    for (int s = 0; s < SYMBOLS && n; s++)
        sixteenths += (uint64_t)counts[s] * price_of(counts[s], log2_sixteenths((uint32_t)n));
    return (double)sixteenths / (double)(n + !n) / (16 * 8);
}

/* Sixteenths of a bit that the lower half of a byte would take by itself, and the upper: by their sum, which takes
 * fewer instructions than a table of all bytes, parts of a block are compared. */
typedef struct {
    uint8_t of_half[2][16];
    double usual; /* of the bytes that were counted, the mean */
} Prices;

static Prices prices_of(const uint32_t *counts) {
    uint32_t halves[2][16] = {{0}}, n = 0;
    uint64_t all = 0;
    Prices prices;
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        halves[0][s & 15] += counts[s];
        halves[1][s >> 4] += counts[s];
        n += counts[s];
    }
    for (int half = 0; half < 2; half++)
        for (int s = 0; s < 16; s++) {
            uint32_t price = price_of(halves[half][s], n ? log2_sixteenths(n) : 0);
            prices.of_half[half][s] = (uint8_t)(price < 127 ? price : 127); /* their sum is one byte */
            all += (uint64_t)halves[half][s] * prices.of_half[half][s];
        }
    prices.usual = (double)all / (double)(n + !n);
    return prices;
}

typedef void LookUp(const uint8_t *data, size_t n, const Prices *prices, uint8_t *out);

static void look_up_generic(const uint8_t *data, size_t n, const Prices *prices, uint8_t *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = (uint8_t)(prices->of_half[0][data[i] & 15] + prices->of_half[1][data[i] >> 4]);
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,bmi2")))

AVX2 static void look_up_avx2(const uint8_t *data, size_t n, const Prices *prices, uint8_t *out) {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)prices->of_half[0]));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)prices->of_half[1]));
    const __m256i fifteen = _mm256_set1_epi8(15);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(data + i));
        __m256i lower = _mm256_shuffle_epi8(low, _mm256_and_si256(bytes, fifteen));
        __m256i upper = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), fifteen));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_add_epi8(lower, upper));
    }
    look_up_generic(data + i, n - i, prices, out + i);
}
#endif

/* ------------------------------------------------------------------------------------------------------- codes */

/* The lengths of a code of the fewest bits: the two that occur least become one, until one is left. */
static void unlimited_lengths(const uint32_t *order, const uint32_t *counts, int n, uint8_t *lengths) {
    uint32_t weight[2 * SYMBOLS];
    int parent[2 * SYMBOLS];
    for (int i = 0; i < n; i++) weight[i] = counts[order[i]];
    int leaf = 0, joined = n, next = n;
    for (; next < 2 * n - 1; next++) {
        weight[next] = 0;
        for (int two = 0; two < 2; two++) {
            int least = leaf < n && (joined == next || weight[leaf] <= weight[joined]) ? leaf++ : joined++;
            weight[next] += weight[least];
            parent[least] = next;
        }
    }
    uint8_t depth[2 * SYMBOLS];
    depth[2 * n - 2] = 0;
    for (int i = 2 * n - 3; i >= 0; i--) depth[i] = (uint8_t)(depth[parent[i]] + 1);
    for (int i = 0; i < n; i++) lengths[order[i]] = depth[i];
}

/* None longer than LONGEST: what that takes of the room for codes, others give back, who occur least first. */
static void limit(const uint32_t *order, int n, uint8_t *lengths) {
    uint32_t room = 0;
    for (int i = 0; i < n; i++) {
        if (lengths[order[i]] > LONGEST) lengths[order[i]] = LONGEST;
        room += SLOTS >> lengths[order[i]];
    }
    for (int i = 0; room > SLOTS; i = (i + 1) % n)
        if (lengths[order[i]] < LONGEST) room -= SLOTS >> ++lengths[order[i]];
    for (int i = n - 1; i >= 0; i--)
        while (lengths[order[i]] > 1 && room + (SLOTS >> lengths[order[i]]) <= SLOTS)
            room += SLOTS >> lengths[order[i]]--;
}

static void lengths_of(const uint32_t *counts, uint8_t *lengths) {
    uint32_t keys[SYMBOLS], order[SYMBOLS];
    int n = 0;
    memset(lengths, 0, SYMBOLS);
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        if (!counts[s]) continue;
        uint32_t key = counts[s] << 8 | s; /* a block has 2^19 bytes */
        int at = n++;
        for (; at && keys[at - 1] > key; at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
    for (int i = 0; i < n; i++) order[i] = keys[i] & 255;
    if (n < 2) {
        lengths[n ? order[0] : 0] = ALONE;
        return;
    }
    unlimited_lengths(order, counts, n, lengths);
    limit(order, n, lengths);
}

/* Each code, its first bit lowest. Whether the lengths are of one. */
static int codes_of(const uint8_t *lengths, uint16_t *codes) {
    uint32_t next = 0, alone = 0, others = 0;
    memset(codes, 0, SYMBOLS * sizeof *codes);
    for (int s = 0; s < SYMBOLS; s++) {
        alone += lengths[s] == ALONE;
        others += lengths[s] && lengths[s] != ALONE;
        if (lengths[s] > LONGEST && lengths[s] != ALONE) return 0;
    }
    if (alone) return alone == 1 && !others;
    for (uint32_t length = 1, step = SLOTS / 2; length <= LONGEST; length++, step /= 2)
        for (int s = 0; s < SYMBOLS; s++) {
            if (lengths[s] != length) continue;
            uint32_t reversed = 0;
            for (int b = 0; b < LONGEST; b++) reversed |= (next >> b & 1) << (LONGEST - 1 - b);
            codes[s] = (uint16_t)reversed;
            next += step;
            if (next > SLOTS) return 0;
        }
    return next > 0;
}

static void write_lengths(const uint8_t *lengths, uint8_t *out) {
    for (int s = 0; s < SYMBOLS; s += 2) out[s / 2] = (uint8_t)(lengths[s] | lengths[s + 1] << 4);
}

/* By the next LONGEST bits: which byte, and how many bits are its. What no code begins with is as good as anything. */
static int slots_of(const uint8_t *in, size_t table, uint16_t (*slots)[TABLES]) {
    uint8_t lengths[SYMBOLS];
    uint16_t codes[SYMBOLS];
    for (int s = 0; s < SYMBOLS; s++) lengths[s] = in[s / 2] >> 4 * (s % 2) & 15;
    if (!codes_of(lengths, codes)) return 0;
    for (uint32_t i = 0; i < SLOTS; i++) slots[i][table] = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t length = lengths[s] == ALONE ? 0 : lengths[s];
        if (lengths[s])
            for (uint32_t i = codes[s]; i < SLOTS; i += 1u << length) slots[i][table] = (uint16_t)(s << 8 | length);
    }
    return 1;
}

static void write_codes(const uint8_t *lengths, size_t table, uint64_t (*out)[TABLES]) {
    uint16_t codes[SYMBOLS];
    codes_of(lengths, codes);
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t length = lengths[s] == ALONE ? 0 : lengths[s];
        out[s][table] = length ? (uint64_t)codes[s] << (64 - length) | length : 0;
    }
}
