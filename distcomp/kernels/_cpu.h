/* The kernels: reference.py once more, in loops that a compiler vectorizes.
 *
 * _cpu.c compiles every body for each instruction set it knows. Built with -ffp-contract=off: a fused multiply-add
 * would give other bits on machines that have it.
 */
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little-endian; on this machine distcomp uses its plain-torch reference"
#endif

#define LANES 16
#define SMALLEST_SCALE 0x1p-120f
#define BODY static inline __attribute__((always_inline))

typedef struct {
    const float *x;
    uint8_t *codes;
    float *scales;
    uint8_t *scratch; /* one block of unpacked codes */
    size_t numel, block;
    int bits, stochastic, given;
    uint32_t key_low, key_high, first;
} Quantize;

typedef struct {
    const uint8_t *codes;
    const float *scales;
    float *out;
    uint8_t *scratch;
    size_t numel, block;
    int bits, sign;
    float times;
} Dequantize;

typedef struct {
    uint32_t sum, weighted;
} Sums;

BODY uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

BODY float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

BODY size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

BODY float levels(int bits) { return bits > 1 ? (float)((1 << (bits - 1)) - 1) : 1.0f; }

/* lowbias32 with a 64-bit key, the low half already added to the counter; its upper 24 bits */
BODY uint32_t random_24(uint32_t x, uint32_t key_high) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= key_high;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x >> 8;
}

/* The comparisons are so turned that a NaN becomes s. */
BODY float clamped(float y, float s) {
    y = y < s ? y : s;
    return y > -s ? y : -s;
}

/* Half to even, for |y| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits. */
BODY int32_t rounded(float y) { return (int32_t)(bits_of(y + 0x1.8p23f) - 0x4b400000u); }

BODY float block_max(const float *x, size_t m) {
    int32_t largest = 0;
    for (size_t j = 0; j < m; j++) {
        int32_t magnitude = (int32_t)(bits_of(x[j]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = float_of((uint32_t)largest);
    return scale < SMALLEST_SCALE ? 0.0f : scale;
}

BODY float block_mean(const float *x, size_t m) {
    float lane[LANES] = {0};
    size_t whole = m - m % LANES;
    for (size_t j = 0; j < whole; j += LANES)
        for (size_t i = 0; i < LANES; i++) lane[i] += float_of(bits_of(x[j + i]) & 0x7fffffffu);
    for (size_t j = whole; j < m; j++) lane[j - whole] += float_of(bits_of(x[j]) & 0x7fffffffu);
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0] / (float)m;
}

BODY void sign_codes(const float *restrict x, uint8_t *restrict code, size_t m) {
    for (size_t j = 0; j < m; j++) code[j] = x[j] >= 0.0f;
}

/* reference.round_at_random: y with 24 bits after the point, plus 24 random bits, plus s, is a code before the point. */
BODY void stochastic_codes(const float *restrict x, uint8_t *restrict code, size_t m, float inverse, float s,
                           const Quantize *q, uint32_t counter) {
    uint32_t key_high = q->key_high, middle = (uint32_t)s << 24;
    counter += q->key_low;
    for (size_t j = 0; j < m; j++) {
        uint32_t y = (uint32_t)(int32_t)(clamped(x[j] * inverse, s) * 0x1p24f);
        code[j] = (uint8_t)((y + middle + random_24(counter + (uint32_t)j, key_high)) >> 24);
    }
}

BODY void nearest_codes(const float *restrict x, uint8_t *restrict code, size_t m, float inverse, float s) {
    for (size_t j = 0; j < m; j++) code[j] = (uint8_t)(rounded(clamped(x[j] * inverse, s)) + (int32_t)s);
}

/* Eight codes at a time in a 64-bit word: masks keep neighbours apart, and 64-bit shifts vectorize. */
BODY uint64_t load_8(const uint8_t *from) {
    uint64_t word;
    memcpy(&word, from, 8);
    return word;
}

BODY void store_8(uint8_t *to, uint64_t word) { memcpy(to, &word, 8); }

BODY uint64_t mask_8(int width) { return 0x0101010101010101u * ((1u << width) - 1); }

/* One part of the planar layout: `width` bits at `shift` of each code; returns the bytes written. */
BODY size_t pack_part(const uint8_t *restrict code, uint8_t *restrict out, size_t m, int width, int shift) {
    const size_t planes = (size_t)(8 / width), height = (m + planes - 1) / planes;
    size_t full = m > (planes - 1) * height ? m - (planes - 1) * height : 0; /* bytes with all their planes */
    full -= full % 8;
#define PLANE(p) ((load_8(code + j + p * height) >> shift & mask_8(width)) << p * width)
#define EACH(word) \
    for (size_t j = 0; j < full; j += 8) store_8(out + j, word)
    if (width == 8) EACH(PLANE(0));
    if (width == 4) EACH(PLANE(0) | PLANE(1));
    if (width == 2) EACH(PLANE(0) | PLANE(1) | PLANE(2) | PLANE(3));
    if (width == 1)
        EACH(PLANE(0) | PLANE(1) | PLANE(2) | PLANE(3) | PLANE(4) | PLANE(5) | PLANE(6) | PLANE(7));
#undef EACH
#undef PLANE
    for (size_t j = full; j < height; j++) {
        unsigned byte = 0, mask = (1u << width) - 1;
        for (size_t p = 0; p < planes && j + p * height < m; p++)
            byte |= ((unsigned)code[j + p * height] >> shift & mask) << (p * (size_t)width);
        out[j] = (uint8_t)byte;
    }
    return height;
}

/* The inverse, into codes whose lower `shift` bits are there already. */
BODY size_t unpack_part(const uint8_t *restrict in, uint8_t *restrict code, size_t m, int width, int shift) {
    const size_t planes = (size_t)(8 / width), height = (m + planes - 1) / planes;
    for (size_t p = 0; p < planes; p++) {
        size_t start = smaller(p * height, m), count = smaller(height, m - start), full = count - count % 8;
        size_t place = p * (size_t)width;
        uint8_t *restrict to = code + start;
        for (size_t j = 0; j < full; j += 8) {
            uint64_t word = (load_8(in + j) >> place & mask_8(width)) << shift;
            store_8(to + j, shift ? load_8(to + j) | word : word);
        }
        for (size_t j = full; j < count; j++) {
            uint8_t part = (uint8_t)((in[j] >> place & ((1 << width) - 1)) << shift);
            to[j] = shift ? to[j] | part : part;
        }
    }
    return height;
}

/* A code of `bits` bits is laid down as its parts of 8, 4, 2 and 1 bits, low bits first. */
BODY size_t pack(const uint8_t *code, uint8_t *out, size_t m, int bits) {
    size_t at = 0;
    if (bits & 8) at += pack_part(code, out + at, m, 8, 0);
    if (bits & 4) at += pack_part(code, out + at, m, 4, 0);
    if (bits & 2) at += pack_part(code, out + at, m, 2, bits & 4);
    if (bits & 1) at += pack_part(code, out + at, m, 1, bits & 6);
    return at;
}

BODY size_t unpack(const uint8_t *in, uint8_t *code, size_t m, int bits) {
    size_t at = 0;
    if (bits & 8) at += unpack_part(in + at, code, m, 8, 0);
    if (bits & 4) at += unpack_part(in + at, code, m, 4, 0);
    if (bits & 2) at += unpack_part(in + at, code, m, 2, bits & 4);
    if (bits & 1) at += unpack_part(in + at, code, m, 1, bits & 6);
    return at;
}

BODY void quantize_body(const Quantize *q) {
    uint8_t *out = q->codes;
    float s = levels(q->bits);
    for (size_t start = 0, row = 0; start < q->numel; start += q->block, row++) {
        const float *x = q->x + start;
        size_t m = smaller(q->block, q->numel - start);
        if (!q->given) q->scales[row] = q->bits == 1 ? block_mean(x, m) : block_max(x, m);
        if (q->bits == 1) {
            sign_codes(x, q->scratch, m);
        } else {
            float scale = q->scales[row], inverse = scale < SMALLEST_SCALE ? 0.0f : s / scale;
            if (q->stochastic)
                stochastic_codes(x, q->scratch, m, inverse, s, q, q->first + (uint32_t)start);
            else
                nearest_codes(x, q->scratch, m, inverse, s);
        }
        out += pack(q->scratch, out, m, q->bits);
    }
}

BODY void put(const uint8_t *restrict code, float *restrict out, size_t m, float unit, const Dequantize *d,
              int sign) {
    int doubled = d->bits == 1, zero = (int)levels(d->bits); /* one bit means -1 or +1 */
    float times = d->times;
    for (size_t j = 0; j < m; j++) {
        float value = (float)(((int)code[j] << doubled) - zero) * unit;
        out[j] = (sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value) * times;
    }
}

BODY void dequantize_body(const Dequantize *d) {
    const uint8_t *in = d->codes;
    float s = levels(d->bits);
    for (size_t start = 0, row = 0; start < d->numel; start += d->block, row++) {
        size_t m = smaller(d->block, d->numel - start);
        float *out = d->out + start, unit = d->scales[row] / s;
        in += unpack(in, d->scratch, m, d->bits);
        if (d->sign > 0)
            put(d->scratch, out, m, unit, d, 1);
        else if (d->sign < 0)
            put(d->scratch, out, m, unit, d, -1);
        else
            put(d->scratch, out, m, unit, d, 0);
    }
}

/* All exponent bits set means inf or NaN. Looked at in stretches, so that a bad value ends the search early. */
#define STRETCH 4096

BODY int all_finite_32_body(const uint32_t *x, size_t numel) {
    for (size_t start = 0; start < numel; start += STRETCH) {
        size_t end = smaller(start + STRETCH, numel);
        uint32_t bad = 0;
        for (size_t j = start; j < end; j++) bad |= (x[j] & 0x7f800000u) == 0x7f800000u;
        if (bad) return 0;
    }
    return 1;
}

BODY int all_finite_16_body(const uint16_t *x, size_t numel, uint16_t exponent) {
    for (size_t start = 0; start < numel; start += STRETCH) {
        size_t end = smaller(start + STRETCH, numel);
        uint16_t bad = 0;
        for (size_t j = start; j < end; j++) bad |= (x[j] & exponent) == exponent;
        if (bad) return 0;
    }
    return 1;
}

BODY Sums checksum_body(const uint8_t *data, size_t bytes) {
    Sums sums = {0, 0};
    size_t words = bytes / 4;
    for (size_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, data + 4 * i, 4);
        sums.sum += word;
        sums.weighted += ((uint32_t)i + 1) * word;
    }
    if (bytes % 4) {
        uint32_t word = 0;
        memcpy(&word, data + 4 * words, bytes % 4);
        sums.sum += word;
        sums.weighted += ((uint32_t)words + 1) * word;
    }
    return sums;
}

