/* What sparsifiers and natural compression do to every element: reference.py's loops once more. */

/* lowbias32 of x and a 64-bit key */
BODY uint64_t hashed(uint64_t place, uint64_t key) {
    uint32_t x = (uint32_t)place + (uint32_t)key;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= (uint32_t)(key >> 32);
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

#define HALF_ROUNDS 6

BODY uint64_t permuted_once(uint64_t place, int bits, const uint64_t *keys) {
    int low_bits = bits / 2;
    uint64_t low_mask = ((uint64_t)1 << low_bits) - 1, high_mask = ((uint64_t)1 << (bits - low_bits)) - 1;
    uint64_t low = place & low_mask, high = place >> low_bits;
    for (int i = 0; i < HALF_ROUNDS; i += 2) {
        high ^= hashed(low, keys[i]) & high_mask;
        low ^= hashed(high, keys[i + 1]) & low_mask;
    }
    return high << low_bits | low;
}

/* The images of 0 .. count-1 under a permutation of 0 .. numel-1: walked until they fall below numel. */
BODY void permuted_body(int64_t *places, size_t count, uint64_t numel, int bits, const uint64_t *keys) {
    for (size_t j = 0; j < count; j++) places[j] = (int64_t)permuted_once(j, bits, keys);
    for (size_t j = 0; j < count; j++)
        while ((uint64_t)places[j] >= numel) places[j] = (int64_t)permuted_once((uint64_t)places[j], bits, keys);
}

/* The exponent after 23 random bits were added to the mantissa; 254 is the largest of a finite number. */
BODY void exponents_body(const uint32_t *restrict x, uint8_t *restrict codes, size_t numel, uint32_t counter,
                         uint32_t key_high) {
    for (size_t j = 0; j < numel; j++) {
        uint32_t noise = random_24(counter++, key_high) >> 1;
        uint32_t code = ((x[j] & 0x7fffffffu) + noise) >> 23;
        codes[j] = (uint8_t)(code < 254 ? code : 254);
    }
}

/* out[j] times the power of two that code j is the exponent of */
BODY void scale_by_exponents_body(const uint8_t *restrict codes, float *restrict out, size_t numel) {
    for (size_t j = 0; j < numel; j++) out[j] *= float_of((uint32_t)codes[j] << 23);
}
