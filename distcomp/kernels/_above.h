/* Which of many values are above a threshold, as bits: compilers know no portable way from lanes to bits.
 *
 * above_NAME(x, words, threshold, bits): bit j of bits[i] is whether the magnitude of x[64 i + j], as the integer that its
 * bits are, is above the threshold. Returns how many are. */
#define WORD 64

typedef size_t (*Above)(const float *x, size_t words, int32_t threshold, uint64_t *bits);

static size_t above_generic(const float *x, size_t words, int32_t threshold, uint64_t *bits) {
    size_t total = 0;
    for (size_t i = 0; i < words; i++, x += WORD) {
        uint64_t word = 0;
        for (size_t j = 0; j < WORD; j++) word |= (uint64_t)((int32_t)(bits_of(x[j]) & 0x7fffffffu) > threshold) << j;
        bits[i] = word;
        total += (size_t)__builtin_popcountll(word);
    }
    return total;
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

__attribute__((target("avx2"))) static size_t above_avx2(const float *x, size_t words, int32_t threshold, uint64_t *bits) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), least = _mm256_set1_epi32(threshold);
    size_t total = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t word = 0;
        for (int part = 0; part < WORD; part += 8, x += 8) {
            __m256i m = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), magnitude);
            uint32_t found = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(m, least)));
            word |= (uint64_t)found << part;
        }
        bits[i] = word;
        total += (size_t)__builtin_popcountll(word);
    }
    return total;
}

__attribute__((target("avx512f"))) static size_t above_avx512(const float *x, size_t words, int32_t threshold,
                                                            uint64_t *bits) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), least = _mm512_set1_epi32(threshold);
    size_t total = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t word = 0;
        for (int part = 0; part < WORD; part += 16, x += 16) {
            __m512i m = _mm512_and_si512(_mm512_loadu_si512(x), magnitude);
            word |= (uint64_t)_mm512_cmpgt_epi32_mask(m, least) << part;
        }
        bits[i] = word;
        total += (size_t)__builtin_popcountll(word);
    }
    return total;
}
#endif
