/* The kernels: reference.py once more, in loops that a compiler vectorizes.
 *
 * _cpu.c compiles every body for each instruction set it knows. Built with -ffp-contract=off: a fused multiply-add
 * would give other bits on machines that have it.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little-endian; on this machine distcomp uses its plain-torch reference"
#endif

#define LANES 16
#define SMALLEST_SCALE 0x1p-120f
enum { MAX, L2, GIVEN }; /* what a block's scale is, as Python numbers them */
#define BODY static inline __attribute__((always_inline))

typedef struct {
    const float *x;
    uint8_t *codes;
    float *scales;
    uint8_t *scratch; /* one block of unpacked codes */
    size_t numel, block;
    int bits, stochastic, norm, powers; /* norm: MAX, L2 or GIVEN; powers: levels are powers of two */
    uint32_t key_low, key_high, first;
    const float *residual; /* where there is one, x + residual is quantized, */
    float *owed;           /* and what its codes do not stand for is left here */
} Quantize;

typedef struct {
    const uint8_t *codes;
    const float *scales;
    float *out;
    uint8_t *scratch;
    size_t numel, block;
    int bits, powers, sign;
    float times;
    const float *base; /* where there is one, out is base plus so many times the values */
} Dequantize;

/* Where codes and their scales lie; or values as they are, and no scales. */
typedef struct {
    const void *codes;
    const float *scales;
} Source;

/* Codes and scales of a piece begin at these places of every source, values and what is written at `at`. */
typedef struct {
    Dequantize each;
    const Source *sources;
    size_t count, codes, row, at;
} Mean;

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

/* Squares and their sum in double: they neither over- nor underflow. */
BODY float block_l2(const float *x, size_t m) {
    double lane[LANES] = {0};
    size_t whole = m - m % LANES;
    for (size_t j = 0; j < whole; j += LANES)
        for (size_t i = 0; i < LANES; i++) lane[i] += (double)x[j + i] * (double)x[j + i];
    for (size_t j = whole; j < m; j++) lane[j - whole] += (double)x[j] * (double)x[j];
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) lane[i] += lane[i + half];
    float norm = (float)sqrt(lane[0]);
    return norm < SMALLEST_SCALE ? 0.0f : norm;
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
        code[j] = (uint8_t)((y + middle + random_24(counter++, key_high)) >> 24);
    }
}

BODY void nearest_codes(const float *restrict x, uint8_t *restrict code, size_t m, float inverse, float s) {
    for (size_t j = 0; j < m; j++) code[j] = (uint8_t)(rounded(clamped(x[j] * inverse, s)) + (int32_t)s);
}

/* reference.round_to_powers: from the lowest level up a carry out of the mantissa rounds; below it there is zero. */
BODY void power_codes(const float *restrict x, uint8_t *restrict code, size_t m, float scale, int32_t s,
                      const Quantize *q, uint32_t counter) {
    uint32_t key_high = q->key_high;
    const float divisor = scale < SMALLEST_SCALE ? INFINITY : scale;
    const float lowest = float_of((uint32_t)(128 - s) << 23), inverse = float_of((uint32_t)(126 + s) << 23);
    counter += q->key_low;
    for (size_t j = 0; j < m; j++) {
        float share = float_of(bits_of(x[j]) & 0x7fffffffu) / divisor;
        share = share < 1.0f ? share : 1.0f; /* a NaN, too */
        uint32_t noise = random_24(counter++, key_high);
        int32_t above = (int32_t)((bits_of(share) + (noise >> 1)) >> 23) - (127 - s);
        float small = share < lowest ? share : 0.0f;
        int32_t below = (int32_t)(((uint32_t)(int32_t)(small * inverse * 0x1p24f) + noise) >> 24);
        int32_t level = share < lowest ? below : above;
        code[j] = (uint8_t)(level + (x[j] < 0.0f && level > 0 ? s : 0));
    }
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

BODY void quantize_block(const Quantize *q, const float *x, float *scale, size_t m, uint32_t counter) {
    float s = levels(q->bits);
    if (q->norm != GIVEN)
        *scale = q->bits == 1 ? block_mean(x, m) : q->norm == L2 ? block_l2(x, m) : block_max(x, m);
    float inverse = *scale < SMALLEST_SCALE ? 0.0f : s / *scale;
    if (q->bits == 1)
        sign_codes(x, q->scratch, m);
    else if (q->powers)
        power_codes(x, q->scratch, m, *scale, (int32_t)s, q, counter);
    else if (q->stochastic)
        stochastic_codes(x, q->scratch, m, inverse, s, q, counter);
    else
        nearest_codes(x, q->scratch, m, inverse, s);
}

/* (code - s) times a unit of scale / s; one bit means -1 or +1 */
BODY float uniform_value(int32_t code, int bits, int32_t s) { return (float)((code << (bits == 1)) - s); }

/* 0, or a power of two between 2^(1-s) and 1; above s once more, negative */
BODY float power_value(int32_t code, int32_t s) {
    int32_t negative = code > s, level = negative ? code - s : code;
    uint32_t bits = level ? (uint32_t)(level + 127 - s) << 23 : 0;
    return float_of(bits | (uint32_t)negative << 31);
}

BODY void put(const uint8_t *restrict code, float *restrict out, size_t m, float unit, const Dequantize *d, int sign,
              int powers) {
    int bits = d->bits;
    int32_t s = (int32_t)levels(bits);
    float times = d->times;
    for (size_t j = 0; j < m; j++) {
        float value = (powers ? power_value(code[j], s) : uniform_value(code[j], bits, s)) * unit;
        out[j] = (sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value) * times;
    }
}

BODY void put_onto(const uint8_t *restrict code, const float *restrict base, float *restrict out, size_t m, float unit,
                   const Dequantize *d, int powers) {
    int bits = d->bits;
    int32_t s = (int32_t)levels(bits);
    float times = d->times;
    for (size_t j = 0; j < m; j++)
        out[j] = fmaf((powers ? power_value(code[j], s) : uniform_value(code[j], bits, s)) * unit, times, base[j]);
}

BODY void put_signed(const uint8_t *code, float *out, size_t m, float unit, const Dequantize *d, int powers) {
    if (d->sign > 0)
        put(code, out, m, unit, d, 1, powers);
    else if (d->sign < 0)
        put(code, out, m, unit, d, -1, powers);
    else
        put(code, out, m, unit, d, 0, powers);
}

BODY void put_block(const uint8_t *code, float *out, size_t m, float scale, const Dequantize *d) {
    if (d->powers)
        put_signed(code, out, m, scale, d, 1);
    else
        put_signed(code, out, m, scale / levels(d->bits), d, 0);
}

BODY void dequantize_body(const Dequantize *d) {
    const uint8_t *in = d->codes;
    for (size_t start = 0, row = 0; start < d->numel; start += d->block, row++) {
        size_t m = smaller(d->block, d->numel - start);
        in += unpack(in, d->scratch, m, d->bits);
        if (d->base && d->powers)
            put_onto(d->scratch, d->base + start, d->out + start, m, d->scales[row], d, 1);
        else if (d->base)
            put_onto(d->scratch, d->base + start, d->out + start, m, d->scales[row] / levels(d->bits), d, 0);
        else
            put_block(d->scratch, d->out + start, m, d->scales[row], d);
    }
}

BODY void put_values(const float *restrict x, float *restrict out, size_t m, int add, float times) {
    for (size_t j = 0; j < m; j++) out[j] = (x[j] + (add ? out[j] : 0.0f)) * times;
}

/* Block by block: each lies in the cache until all sources are added to it. */
BODY void mean_body(const Mean *mean) {
    Dequantize d = mean->each;
    size_t codes = mean->codes;
    for (size_t start = 0, row = mean->row; start < d.numel; start += d.block, row++) {
        size_t m = smaller(d.block, d.numel - start), bytes = 0;
        for (size_t i = 0; i < mean->count; i++) {
            const Source *from = mean->sources + i;
            d.sign = i > 0;
            d.times = i + 1 < mean->count ? 1.0f : mean->each.times;
            if (from->scales) {
                bytes = unpack((const uint8_t *)from->codes + codes, d.scratch, m, d.bits);
                put_block(d.scratch, d.out + start, m, from->scales[row], &d);
            } else
                put_values((const float *)from->codes + mean->at + start, d.out + start, m, d.sign, d.times);
        }
        codes += bytes;
    }
}

BODY void quantize_body(const Quantize *q) {
    uint8_t *out = q->codes;
    const Dequantize back = {.bits = q->bits, .powers = q->powers, .sign = -1, .times = 1.0f};
    for (size_t start = 0, row = 0; start < q->numel; start += q->block, row++) {
        const float *x = q->x + start;
        size_t m = smaller(q->block, q->numel - start);
        if (q->owed) {
            float *restrict sum = q->owed + start;
            for (size_t j = 0; j < m; j++) sum[j] = x[j] + q->residual[start + j];
            x = sum;
        }
        quantize_block(q, x, q->scales + row, m, q->first + (uint32_t)start);
        out += pack(q->scratch, out, m, q->bits);
        if (q->owed) put_block(q->scratch, q->owed + start, m, q->scales[row], &back);
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

