/* How often bytes occur, and how many bits they would take; a part of _entropy.c. */

/* Of the first bytes of each stretch. */
static void count_first(const uint8_t *data, size_t n, size_t first, uint32_t *counts) {
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

/* log2 x in parts of 2^16, 1 <= x < 2^24, to 0.01: a float's exponent, and of its fraction t about log2 (1 + t). */
INLINE uint32_t log2_of(uint32_t x) {
    float number = (float)(int32_t)x;
    uint32_t bits;
    memcpy(&bits, &number, 4);
    uint32_t t = bits >> 7 & 0xffff;
    return (((bits >> 23) - 127) << 16) + t + ((t * (0x10000 - t) >> 16) * 22544 >> 16);
}

/* What bytes that occur so often take, in parts of 2^16 of a bit, if each takes as many bits as it is rare. */
INLINE uint64_t entropy_of(const uint32_t *counts, size_t symbols) {
    uint64_t sum = 0;
    uint32_t n = 0;
    for (size_t s = 0; s < symbols; s++) n += counts[s], sum += (uint64_t)counts[s] * log2_of(counts[s]);
    uint64_t all = (uint64_t)n * log2_of(n);
    return all > sum ? all - sum : 0;
}

/* Sixteenths of a bit that the lower half of a byte would take by itself, and the upper: by their sum, which takes
 * fewer instructions than a table of all bytes, parts of a block are compared. */
typedef struct {
    uint8_t of_half[2][16];
    double mean, variance; /* of the bytes that were counted */
} Prices;

#define DEAREST 127 /* the sum of two is one byte */

static Prices prices_of(const uint32_t *counts) {
    uint32_t halves[2][16] = {{0}}, n = 0;
    Prices prices;
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        halves[0][s & 15] += counts[s];
        halves[1][s >> 4] += counts[s];
        n += counts[s];
    }
    for (int half = 0; half < 2; half++)
        for (int s = 0; s < 16; s++) {
            uint32_t price = halves[half][s] ? (log2_of(n) - log2_of(halves[half][s])) >> 12 : DEAREST;
            prices.of_half[half][s] = (uint8_t)smaller(price, DEAREST);
        }
    uint64_t sum = 0, squares = 0;
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        uint64_t price = prices.of_half[0][s & 15] + prices.of_half[1][s >> 4];
        sum += counts[s] * price, squares += counts[s] * price * price;
    }
    prices.mean = (double)sum / (n + !n);
    prices.variance = (double)squares / (n + !n) - prices.mean * prices.mean;
    return prices;
}

#ifdef HAVE_AVX2
AVX2 static size_t look_up_avx2(const uint8_t *data, size_t n, const Prices *prices, uint8_t *out) {
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
    return i;
}
#endif

/* The price of each byte. */
INLINE void look_up(const uint8_t *data, size_t n, const Prices *prices, uint8_t *out, int avx2) {
    size_t i = 0;
#ifdef HAVE_AVX2
    if (avx2) i = look_up_avx2(data, n, prices, out);
#endif
    (void)avx2;
    for (; i < n; i++) out[i] = (uint8_t)(prices->of_half[0][data[i] & 15] + prices->of_half[1][data[i] >> 4]);
}
