/* Values that are multiplied by a factor of their block, as codes of a format and back: a part of _minifloat.c. */
#define CHUNK 1024 /* codes that are made before they are packed: a multiple of the eight that are packed at a time */

/* A sign, `width - 1 - mantissa` bits of exponent and `mantissa` bits behind the point. */
typedef struct {
    int width, mantissa, bias;
    float largest;
    int infinity, nan; /* their codes, or that of the largest number where there are none */
    int finite;        /* how many magnitudes are numbers: from here on codes are infinity and NaN */
} Format;

/* Values that begin with a block, and their codes, which begin with a byte. */
typedef struct {
    const float *x, *factors; /* one for each block */
    uint8_t *codes;
    size_t numel, block;
    int stochastic;
    Draws noise;
} Encode;

typedef struct {
    const uint8_t *codes;
    const float *units; /* one for each block */
    float *out;
    size_t numel, block;
    int sign;
} Decode;

/* |x| times factor, as a multiple of the distance between neighbours in its binade, rounded; then its code. */
BODY void encode_block(const float *restrict x, uint32_t *restrict code, size_t m, float factor, const Format *f,
                       Draws noise, int stochastic) {
    const int mantissa = f->mantissa, sign_at = f->width - 1, lowest = 128 - f->bias;
    const float largest = f->largest;
    const int infinity = f->infinity, nan = f->nan;
    const uint32_t counter = noise.counter, key_high = noise.high;
    /* At random there are 24 bits behind the point of what is rounded. */
    const int behind = stochastic ? 24 : 0;
#pragma GCC unroll 1 /* 16 values at full length would be a row of scalars */
    for (size_t j = 0; j < m; j++) {
        uint32_t bits = bits_of(x[j]), magnitude = bits & 0x7fffffffu;
        float y = float_of(magnitude) * factor;
        y = y < largest ? y : largest; /* a NaN, too, for now */
        int32_t exponent = (int32_t)(bits_of(y) >> 23);
        exponent = exponent > lowest ? exponent : lowest;
        float steps = y * float_of((uint32_t)(254 + behind + mantissa - exponent) << 23);
        int32_t n;
        if (stochastic)
            n = (int32_t)(((uint32_t)(int32_t)steps + random_24(counter + (uint32_t)j, key_high)) >> 24);
        else
            n = rounded(steps);
        int32_t c = ((exponent - lowest) << mantissa) + n;
        c = magnitude == 0x7f800000u ? infinity : c;
        c = magnitude > 0x7f800000u ? nan : c;
        code[j] = (uint32_t)c | bits >> 31 << sign_at;
    }
}

/* A byte for each code; or two codes of 4 bits to a byte, the first in the low half. */
BODY void pack_codes(const uint32_t *restrict code, uint8_t *restrict out, size_t m, int width) {
    size_t pairs = m / 2;
    if (width == 8) {
        for (size_t j = 0; j < m; j++) out[j] = (uint8_t)code[j];
        return;
    }
    for (size_t j = 0; j < pairs; j++) out[j] = (uint8_t)(code[2 * j] | code[2 * j + 1] << 4);
    if (m % 2) out[pairs] = (uint8_t)code[m - 1];
}

BODY void unpack_codes(const uint8_t *restrict in, uint32_t *restrict code, size_t m, int width) {
    size_t pairs = m / 2;
    if (width == 8) {
        for (size_t j = 0; j < m; j++) code[j] = in[j];
        return;
    }
    for (size_t j = 0; j < pairs; j++) {
        code[2 * j] = in[j] & 15;
        code[2 * j + 1] = in[j] >> 4;
    }
    if (m % 2) code[m - 1] = in[pairs] & 15;
}

BODY void encode_chunk(const Encode *e, const Format *f, size_t start, size_t count, uint32_t *code, int stochastic) {
    size_t row = start / e->block;
    for (size_t at = start; at < start + count; row++) {
        size_t m = smaller((row + 1) * e->block, start + count) - at;
#define ENCODE(m) \
    encode_block(e->x + at, code + (at - start), m, e->factors[row], f, draws_from(e->noise, at), stochastic)
        IN_SHORT_BLOCKS(ENCODE, m);
        at += m;
    }
}

BODY void encode_values(const Encode *e, const Format *f) {
    uint32_t code[CHUNK];
    for (size_t start = 0; start < e->numel; start += CHUNK) {
        size_t count = smaller(CHUNK, e->numel - start);
        if (e->stochastic)
            encode_chunk(e, f, start, count, code, 1);
        else
            encode_chunk(e, f, start, count, code, 0);
        pack_codes(code, e->codes + (f->width == 8 ? start : start / 2), count, f->width);
    }
}

/* What codes stand for, in units of their blocks. */
BODY void values_of(const uint32_t *restrict code, float *restrict values, size_t m, const Format *f) {
    const int32_t mantissa = f->mantissa, finite = f->finite, sign_at = f->width - 1, above = 127 - f->bias - mantissa;
    const int32_t infinity = f->infinity < f->nan ? f->infinity : -1;
    for (size_t j = 0; j < m; j++) {
        int32_t magnitude = (int32_t)code[j] & ((1 << sign_at) - 1), field = magnitude >> mantissa;
        int32_t n = (magnitude & ((1 << mantissa) - 1)) | (field > 0) << mantissa;
        int32_t exponent = field > 0 ? field : 1;
        uint32_t bits = bits_of((float)n * float_of((uint32_t)(exponent + above) << 23));
        bits = magnitude >= finite ? (magnitude == infinity ? 0x7f800000u : 0x7fc00000u) : bits;
        values[j] = float_of(bits | code[j] >> sign_at << 31);
    }
}

BODY void put_values(const float *restrict values, float *restrict out, size_t m, float unit, int sign) {
#pragma GCC unroll 1
    for (size_t j = 0; j < m; j++) {
        float value = values[j] * unit;
        out[j] = sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value;
    }
}

BODY void decode_chunks(const Decode *d, const Format *f, int sign) {
    uint32_t code[CHUNK];
    float values[CHUNK];
    for (size_t start = 0; start < d->numel; start += CHUNK) {
        size_t end = start + smaller(CHUNK, d->numel - start), row = start / d->block;
        unpack_codes(d->codes + (f->width == 8 ? start : start / 2), code, end - start, f->width);
        values_of(code, values, end - start, f);
        for (size_t at = start; at < end; row++) {
            size_t m = smaller((row + 1) * d->block, end) - at;
#define PUT(m) put_values(values + (at - start), d->out + at, m, d->units[row], sign)
            IN_SHORT_BLOCKS(PUT, m);
            at += m;
        }
    }
}

BODY void decode_values(const Decode *d, const Format *f) {
    if (d->sign > 0)
        decode_chunks(d, f, 1);
    else if (d->sign < 0)
        decode_chunks(d, f, -1);
    else
        decode_chunks(d, f, 0);
}
