/* push and pull of _ans.h for eight states at once, to the bit; a part of _entropy.c. Words are written and read in the
 * order of the states that need one. Elements of tables are loaded one by one: gathering them takes longer. */

AVX2 static inline __m256i load_lanes(const uint8_t *lanes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)lanes));
}

AVX2 static inline __m256i quotients(__m256i x, __m256i inverses, __m256i up) {
    __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, inverses), 32);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(inverses, 32));
    return _mm256_srlv_epi32(_mm256_blend_epi32(even, odd, 0xaa), up);
}

AVX2 static inline __m128 two_steps(const Step *steps, const uint16_t *places) {
    __m128 first = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)&steps[places[0]]));
    return _mm_loadh_pi(first, (const __m64 *)&steps[places[1]]);
}

AVX2 static inline __m256i push_8(__m256i x, const uint16_t *places, const Step *steps, const Lanes *lanes, uint8_t **out) {
    __m256 first = _mm256_set_m128(two_steps(steps, places + 4), two_steps(steps, places));
    __m256 second = _mm256_set_m128(two_steps(steps, places + 6), two_steps(steps, places + 2));
    __m256i inverses = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88));
    __m256i shares = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd));
    __m256i others = _mm256_and_si256(shares, _mm256_set1_epi32(0xfff));
    __m256i high = _mm256_add_epi32(_mm256_srli_epi32(x, 31 - LOG_SLOTS), others);
    __m256i full = _mm256_cmpgt_epi32(high, _mm256_set1_epi32(SLOTS - 1));
    unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(full));
    __m256i words = _mm256_permutevar8x32_epi32(x, load_lanes(lanes->last[mask]));
    words = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    words = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 8);
    _mm_storeu_si128((__m128i *)(*out - 16), _mm256_castsi256_si128(words));
    *out -= 2 * __builtin_popcount(mask);
    x = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), full);
    __m256i up = _mm256_and_si256(_mm256_srli_epi32(shares, 12), _mm256_set1_epi32(15));
    __m256i more = _mm256_mullo_epi32(quotients(x, inverses, up), others);
    return _mm256_add_epi32(_mm256_add_epi32(x, _mm256_srli_epi32(shares, 16)), more);
}

AVX2 static inline __m128i four_slots(const uint32_t *slots_of, __m128i at) {
    uint64_t first = (uint64_t)_mm_cvtsi128_si64(at), second = (uint64_t)_mm_extract_epi64(at, 1);
    __m128i low = _mm_cvtsi32_si128((int)slots_of[(uint32_t)first]);
    __m128i high = _mm_cvtsi32_si128((int)slots_of[(uint32_t)second]);
    low = _mm_insert_epi32(low, (int)slots_of[first >> 32], 1);
    high = _mm_insert_epi32(high, (int)slots_of[second >> 32], 1);
    return _mm_unpacklo_epi64(low, high);
}

/* The bytes, a lane each. */
AVX2 static inline __m256i pull_8(__m256i *x, const uint8_t *of, const uint32_t *slots_of, const Lanes *lanes,
                                  const uint8_t **in) {
    __m256i table = _mm256_slli_epi32(load_lanes(of), LOG_SLOTS);
    __m256i at = _mm256_or_si256(_mm256_and_si256(*x, _mm256_set1_epi32(SLOTS - 1)), table);
    __m256i slot = _mm256_set_m128i(four_slots(slots_of, _mm256_extracti128_si256(at, 1)),
                                    four_slots(slots_of, _mm256_castsi256_si128(at)));
    __m256i f = _mm256_and_si256(_mm256_srli_epi32(slot, 8), _mm256_set1_epi32(0xfff));
    __m256i now = _mm256_mullo_epi32(f, _mm256_srli_epi32(*x, LOG_SLOTS));
    now = _mm256_add_epi32(now, _mm256_srli_epi32(slot, 20));
    __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(LEAST), now);
    unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(low));
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)*in));
    words = _mm256_permutevar8x32_epi32(words, load_lanes(lanes->ranks[mask]));
    *x = _mm256_blendv_epi8(now, _mm256_or_si256(_mm256_slli_epi32(now, 16), words), low);
    *in += 2 * __builtin_popcount(mask);
    return _mm256_and_si256(slot, _mm256_set1_epi32(0xff));
}

#define OWN AVX2 __attribute__((noinline)) /* within other loops fewer states stay in registers */

#define LOAD_STATES(from) \
    const __m256i *const stored = (const __m256i *)(from); \
    __m256i x0 = _mm256_loadu_si256(stored), x1 = _mm256_loadu_si256(stored + 1); \
    __m256i x2 = _mm256_loadu_si256(stored + 2), x3 = _mm256_loadu_si256(stored + 3)

AVX2 static inline void store_states(__m256i x0, __m256i x1, __m256i x2, __m256i x3, uint32_t *states) {
    _mm256_storeu_si256((__m256i *)states, x0);
    _mm256_storeu_si256((__m256i *)(states + 8), x1);
    _mm256_storeu_si256((__m256i *)(states + 16), x2);
    _mm256_storeu_si256((__m256i *)(states + 24), x3);
}

/* As many whole groups as there is room for, from the last on. How many bytes are left. */
OWN static size_t push_avx2(const uint16_t *places, size_t i, const Step *steps, const Lanes *lanes, Writer *w) {
    LOAD_STATES(w->states);
    uint8_t *out = w->out;
    for (; i && out - w->least >= ROOM; i -= STATES) {
        x3 = push_8(x3, places + i - 8, steps, lanes, &out);
        x2 = push_8(x2, places + i - 16, steps, lanes, &out);
        x1 = push_8(x1, places + i - 24, steps, lanes, &out);
        x0 = push_8(x0, places + i - 32, steps, lanes, &out);
    }
    store_states(x0, x1, x2, x3, w->states);
    w->out = out;
    return i;
}

/* As many whole groups as there are and words for them. How many bytes. */
OWN static size_t pull_avx2(const uint8_t *of, size_t n, const uint32_t *slots_of, const Lanes *lanes, Reader *r,
                             uint8_t *out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    LOAD_STATES(r->states);
    const uint8_t *in = r->in;
    size_t i = 0;
    for (; i + STATES <= n && in <= r->end; i += STATES) {
        __m256i first = pull_8(&x0, of + i, slots_of, lanes, &in);
        __m256i second = pull_8(&x1, of + i + 8, slots_of, lanes, &in);
        __m256i third = pull_8(&x2, of + i + 16, slots_of, lanes, &in);
        __m256i fourth = pull_8(&x3, of + i + 24, slots_of, lanes, &in);
        first = _mm256_packus_epi16(_mm256_packus_epi32(first, second), _mm256_packus_epi32(third, fourth));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permutevar8x32_epi32(first, order));
    }
    store_states(x0, x1, x2, x3, r->states);
    r->in = in;
    return i;
}
