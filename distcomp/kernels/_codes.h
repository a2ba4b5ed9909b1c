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
    const float *ahead;       /* what memory is asked for meanwhile: as many values */
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

/* What infinity and NaN need: nothing where they are the largest number, as which they are clamped. */
enum { NEITHER, ALIKE, BOTH };

BODY int special_of(const Format *f) {
    return f->infinity != f->nan ? BOTH : f->nan == f->finite - 1 ? NEITHER : ALIKE;
}

/* |x| times factor, as a multiple of the distance between neighbours in its binade, rounded; then its code. */
BODY void encode_block(const float *restrict x, uint32_t *restrict code, size_t m, float factor, const Format *f,
                       Draws noise, int stochastic, int special) {
    const int down = 23 - f->mantissa, sign_down = 32 - f->width, behind = stochastic ? 24 : 0;
    const int32_t lowest = (128 - f->bias) << 23, infinity = f->infinity, nan = f->nan;
    const uint32_t one_step = (uint32_t)(254 + behind + f->mantissa) << 23, sign = 0x80000000u >> sign_down;
    const uint32_t key_high = noise.high;
    uint32_t counter = noise.counter;
    const float largest = f->largest;
#pragma GCC unroll 1 /* 16 values at full length would be a row of scalars */
    for (size_t j = 0; j < m; j++) {
        uint32_t bits = bits_of(x[j]), magnitude = bits & 0x7fffffffu;
        float y = float_of(magnitude) * factor;
        y = y < largest ? y : largest; /* a NaN, too */
        int32_t exponent = (int32_t)bits_of(y);
        exponent = (exponent > lowest ? exponent : lowest) & 0x7f800000; /* in its place: no shift there and back */
        float steps = y * float_of(one_step - (uint32_t)exponent); /* at random with 24 bits behind the point */
        int32_t n;
        if (stochastic)
            n = (int32_t)(((uint32_t)(int32_t)steps + random_24(counter++, key_high)) >> 24);
        else
            n = rounded(steps);
        int32_t c = ((exponent - lowest) >> down) + n;
        if (special == BOTH) c = magnitude == 0x7f800000u ? infinity : c;
        if (special != NEITHER) c = magnitude >= (special == BOTH ? 0x7f800001u : 0x7f800000u) ? nan : c;
        code[j] = (uint32_t)c | (bits >> sign_down & sign);
    }
}

/* A byte for each code; or two codes of 4 bits to a byte, the first in the low half. */
BODY void pack_codes(const uint32_t *restrict code, uint8_t *restrict out, size_t m, int width) {
    size_t pairs = m / 2;
    if (width == 8) {
        for (size_t j = 0; j < m; j++) out[j] = (uint8_t)code[j];
        return;
    }
    for (size_t j = 0; j < pairs; j++) {
        uint64_t both;
        memcpy(&both, code + 2 * j, sizeof both); /* each of 4 bits only: the second comes 28 bits down */
        out[j] = (uint8_t)(both | both >> 28);
    }
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

/* Blocks of the usual lengths, of which a chunk has whole ones, in loops of a length that the compiler knows. */
#define IN_SHORT_BLOCKS(LOOP, block) \
    do { \
        if ((block) == 16) LOOP(16); \
        else if ((block) == 32) LOOP(32); \
        else if ((block) == 128) LOOP(128); \
        else LOOP(0); \
    } while (0)

/* BLOCK(at, m, row) of the blocks, and parts of blocks, of a chunk; `block` is 0 where the compiler knows none. */
#define EACH_BLOCK(BLOCK, of, start, end, block) \
    do { \
        size_t at = start, row = start / of->block; \
        if (block) \
            for (; at + (block) <= end; at += (block), row++) { BLOCK(at, (block), row); } \
        for (size_t m; at < end; at += m, row++) { \
            m = smaller((row + 1) * of->block, end) - at; \
            BLOCK(at, m, row); \
        } \
    } while (0)

BODY void fetch(const float *x, size_t m) {
    for (size_t j = 0; j < m; j += 16) __builtin_prefetch(x + j); /* a line of the cache each */
}

BODY void encode_chunk(const Encode *e, const Format *f, size_t start, size_t end, uint32_t *code, int stochastic,
                       int special, const size_t block) {
#define ENCODE(at, m, row) \
    fetch(e->ahead + at, m); \
    encode_block(e->x + at, code + (at - start), m, e->factors[row], f, draws_from(e->noise, at), stochastic, special)
    EACH_BLOCK(ENCODE, e, start, end, block);
}

BODY void encode_chunks(const Encode *e, const Format *f, int stochastic, int special, const size_t block) {
    uint32_t code[CHUNK];
    for (size_t start = 0; start < e->numel; start += CHUNK) {
        size_t count = smaller(CHUNK, e->numel - start);
        encode_chunk(e, f, start, start + count, code, stochastic, special, block);
        pack_codes(code, e->codes + (f->width == 8 ? start : start / 2), count, f->width);
    }
}

BODY void encode_special(const Encode *e, const Format *f, int stochastic, int special) {
#define CHUNKS(block) encode_chunks(e, f, stochastic, special, block)
    IN_SHORT_BLOCKS(CHUNKS, e->block);
#undef CHUNKS
}

BODY void encode_rounded(const Encode *e, const Format *f, int stochastic) {
    int special = special_of(f);
    if (special == NEITHER) encode_special(e, f, stochastic, NEITHER);
    else if (special == ALIKE) encode_special(e, f, stochastic, ALIKE);
    else encode_special(e, f, stochastic, BOTH);
}

BODY void encode_values(const Encode *e, const Format *f) {
    if (e->stochastic) encode_rounded(e, f, 1);
    else encode_rounded(e, f, 0);
}

/* What a code stands for, times the unit of its block. Below the smallest exponent a number is what it would be in the
 * binade above, less one. */
BODY void decode_block(const uint32_t *restrict code, float *restrict out, size_t m, float unit, const Format *f,
                       int sign, int special) {
    const int up = 23 - f->mantissa, sign_up = 32 - f->width;
    const uint32_t magnitudes = (1u << (f->width - 1)) - 1, bias = (uint32_t)(127 - f->bias) << 23;
    const uint32_t finite = (uint32_t)f->finite, infinity = (uint32_t)f->infinity;
    const float lowest = float_of(bias + (1u << 23));
#pragma GCC unroll 1
    for (size_t j = 0; j < m; j++) {
        uint32_t magnitude = code[j] & magnitudes, bits = (magnitude << up) + bias;
        uint32_t low = bits_of(float_of(bits + (1u << 23)) - lowest);
        bits = bits < bias + (1u << 23) ? low : bits;
        if (special != NEITHER) bits = magnitude >= finite ? 0x7fc00000u : bits;
        if (special == BOTH) bits = magnitude == infinity ? 0x7f800000u : bits;
        float value = float_of(bits | (code[j] << sign_up & 0x80000000u)) * unit;
        out[j] = sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value;
    }
}

BODY void decode_chunks(const Decode *d, const Format *f, int sign, int special, const size_t block) {
    uint32_t code[CHUNK];
    for (size_t start = 0; start < d->numel; start += CHUNK) {
        size_t end = start + smaller(CHUNK, d->numel - start);
        unpack_codes(d->codes + (f->width == 8 ? start : start / 2), code, end - start, f->width);
#define DECODE(at, m, row) decode_block(code + (at - start), d->out + at, m, d->units[row], f, sign, special)
        EACH_BLOCK(DECODE, d, start, end, block);
    }
}

BODY void decode_special(const Decode *d, const Format *f, int sign, int special) {
#define CHUNKS(block) decode_chunks(d, f, sign, special, block)
    IN_SHORT_BLOCKS(CHUNKS, d->block);
#undef CHUNKS
}

BODY void decode_signed(const Decode *d, const Format *f, int sign) {
    int special = special_of(f);
    if (special == NEITHER) decode_special(d, f, sign, NEITHER);
    else if (special == ALIKE) decode_special(d, f, sign, ALIKE);
    else decode_special(d, f, sign, BOTH);
}

BODY void decode_values(const Decode *d, const Format *f) {
    if (d->sign > 0) decode_signed(d, f, 1);
    else if (d->sign < 0) decode_signed(d, f, -1);
    else decode_signed(d, f, 0);
}
