/* Floats of 4 and 8 bits: minifloat.py's reference once more, in loops that a compiler vectorizes.
 *
 * Built with -ffp-contract=off. Every operation rounds on its own, so that each instruction set gives the same bits.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_cpu.h"
#include "_inside.h"
#include "_minifloat.h"

#define CHUNK 1024 /* codes that are made before they are packed: a multiple of the eight that are packed at a time */

/* Blocks of the usual lengths in loops of a length that the compiler knows: it need not ask after every few values. */
#define IN_SHORT_BLOCKS(LOOP, m) \
    do { \
        if ((m) == 16) \
            LOOP(16); \
        else if ((m) == 32) \
            LOOP(32); \
        else \
            LOOP(m); \
    } while (0)

/* A sign, `width - 1 - mantissa` bits of exponent and `mantissa` bits behind the point. */
typedef struct {
    int width, mantissa, bias;
    float largest;
    int infinity, nan; /* their codes, or that of the largest number where there are none */
    int finite;        /* how many magnitudes are numbers: from here on codes are infinity and NaN */
} Format;

typedef struct {
    const float *x, *inverses; /* one factor for each block */
    uint8_t *codes;
    size_t numel, block;
    int stochastic;
    uint32_t key_low, key_high, first;
} Encode;

typedef struct {
    const uint8_t *codes;
    const float *units; /* one for each block */
    float *out;
    size_t numel, block;
    int sign;
} Decode;

/* |x| times inverse, as a multiple of the distance between neighbours in its binade, rounded; then its code. */
BODY void encode_block(const float *restrict x, uint8_t *restrict code, size_t m, float inverse, const Format *f,
                       const Encode *e, uint32_t counter, int stochastic) {
    const int mantissa = f->mantissa, sign_at = f->width - 1, lowest = 128 - f->bias;
    const float largest = f->largest;
    const int infinity = f->infinity, nan = f->nan;
    const uint32_t key_high = e->key_high;
    counter += e->key_low;
#pragma GCC unroll 1 /* 16 values at full length would be a row of scalars */
    for (size_t j = 0; j < m; j++) {
        uint32_t bits = bits_of(x[j]), magnitude = bits & 0x7fffffffu;
        float y = float_of(magnitude) * inverse;
        y = y < largest ? y : largest; /* a NaN, too, for now */
        int32_t exponent = (int32_t)(bits_of(y) >> 23);
        exponent = exponent > lowest ? exponent : lowest;
        float steps = y * float_of((uint32_t)(254 + mantissa - exponent) << 23);
        int32_t n;
        if (stochastic)
            n = (int32_t)(((uint32_t)(int32_t)(steps * 0x1p24f) + random_24(counter + (uint32_t)j, key_high)) >> 24);
        else
            n = rounded(steps);
        int32_t c = ((exponent - lowest) << mantissa) + n;
        c = magnitude == 0x7f800000u ? infinity : c;
        c = magnitude > 0x7f800000u ? nan : c;
        code[j] = (uint8_t)(c | (int32_t)(bits >> 31 << sign_at));
    }
}

/* Two codes of 4 bits to a byte, the first in the low half. */
BODY void pack_pairs(const uint8_t *restrict code, uint8_t *restrict out, size_t m) {
    size_t pairs = m / 2;
    for (size_t j = 0; j < pairs; j++) out[j] = (uint8_t)(code[2 * j] | code[2 * j + 1] << 4);
    if (m % 2) out[pairs] = code[m - 1];
}

BODY void unpack_pairs(const uint8_t *restrict in, uint8_t *restrict code, size_t m) {
    size_t pairs = m / 2;
    for (size_t j = 0; j < pairs; j++) {
        code[2 * j] = in[j] & 15;
        code[2 * j + 1] = in[j] >> 4;
    }
    if (m % 2) code[m - 1] = in[pairs] & 15;
}

BODY void encode_codes(const Encode *e, const Format *f, size_t start, size_t count, uint8_t *code, int stochastic) {
    size_t row = start / e->block;
    for (size_t at = start; at < start + count; row++) {
        size_t m = smaller((row + 1) * e->block, start + count) - at;
#define ENCODE(m) \
    encode_block(e->x + at, code + (at - start), m, e->inverses[row], f, e, e->first + (uint32_t)at, stochastic)
        IN_SHORT_BLOCKS(ENCODE, m);
        at += m;
    }
}

BODY void encode_body(const Encode *e, const Format *f) {
    uint8_t scratch[CHUNK];
    for (size_t start = 0; start < e->numel; start += CHUNK) {
        size_t count = smaller(CHUNK, e->numel - start);
        uint8_t *code = f->width == 8 ? e->codes + start : scratch;
        if (e->stochastic)
            encode_codes(e, f, start, count, code, 1);
        else
            encode_codes(e, f, start, count, code, 0);
        if (f->width == 4) pack_pairs(scratch, e->codes + start / 2, count);
    }
}

BODY float value_of(int32_t code, int mantissa, int bias, int infinity, int finite, int sign_at) {
    int32_t magnitude = code & ((1 << sign_at) - 1), field = magnitude >> mantissa;
    int32_t n = (magnitude & ((1 << mantissa) - 1)) | (field > 0) << mantissa;
    int32_t exponent = field > 0 ? field : 1;
    float value = (float)n * float_of((uint32_t)(exponent - bias - mantissa + 127) << 23);
    uint32_t bits = bits_of(value);
    bits = magnitude >= finite ? (magnitude == infinity ? 0x7f800000u : 0x7fc00000u) : bits;
    return float_of(bits | (uint32_t)(code >> sign_at) << 31);
}

BODY void put_values(const uint8_t *restrict code, float *restrict out, size_t m, float unit, const Format *f,
                     int sign) {
    const int mantissa = f->mantissa, bias = f->bias, finite = f->finite, sign_at = f->width - 1;
    const int infinity = f->infinity < f->nan ? f->infinity : -1;
#pragma GCC unroll 1
    for (size_t j = 0; j < m; j++) {
        float value = value_of(code[j], mantissa, bias, infinity, finite, sign_at) * unit;
        out[j] = sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value;
    }
}

BODY void decode_spans(const Decode *d, const Format *f, int sign) {
    uint8_t scratch[CHUNK];
    for (size_t start = 0; start < d->numel; start += CHUNK) {
        size_t end = start + smaller(CHUNK, d->numel - start), row = start / d->block;
        const uint8_t *code = f->width == 8 ? d->codes + start : scratch;
        if (f->width == 4) unpack_pairs(d->codes + start / 2, scratch, end - start);
        for (size_t at = start; at < end; row++) {
            size_t m = smaller((row + 1) * d->block, end) - at;
#define PUT(m) put_values(code + (at - start), d->out + at, m, d->units[row], f, sign)
            IN_SHORT_BLOCKS(PUT, m);
            at += m;
        }
    }
}

BODY void decode_body(const Decode *d, const Format *f) {
    if (d->sign > 0)
        decode_spans(d, f, 1);
    else if (d->sign < 0)
        decode_spans(d, f, -1);
    else
        decode_spans(d, f, 0);
}

/* The largest magnitude of each block by the order of the integers that bits are: a NaN is above an infinity. */
BODY void maxima_body(const float *x, float *maxima, size_t numel, size_t block) {
    for (size_t start = 0, row = 0; start < numel; start += block, row++) {
        size_t m = smaller(block, numel - start);
        int32_t largest = 0;
        for (size_t j = 0; j < m; j++) {
            int32_t magnitude = (int32_t)(bits_of(x[start + j]) & 0x7fffffffu);
            largest = magnitude > largest ? magnitude : largest;
        }
        maxima[row] = float_of((uint32_t)largest);
    }
}

typedef struct {
    const float *maxima;
    float *inverses;
    uint8_t *codes;
    size_t numel;
    int exponent, highest;
} Powers;

/* The exponent of each block's scale, which is a power of two, and one over the scale; 255 and 0 of inf and NaN. */
BODY void powers_body(const Powers *p) {
    const float *restrict maxima = p->maxima;
    float *restrict inverses = p->inverses;
    uint8_t *restrict codes = p->codes;
    const int32_t exponent = p->exponent, highest = p->highest;
    for (size_t i = 0; i < p->numel; i++) {
        int32_t bits = (int32_t)bits_of(maxima[i]);
        int32_t code = (bits >> 23) - exponent + ((bits & 0x7fffff) > highest);
        code = code > 1 ? code : 1;
        int bad = bits >= 0x7f800000;
        codes[i] = (uint8_t)(bad ? 255 : code);
        inverses[i] = float_of(bad ? 0 : (uint32_t)(254 - code) << 23);
    }
}

typedef struct {
    void (*encode)(const Encode *, const Format *);
    void (*decode)(const Decode *, const Format *);
    void (*maxima)(const float *, float *, size_t, size_t);
    void (*powers)(const Powers *);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void encode_##name(const Encode *e, const Format *f) { encode_body(e, f); } \
    TARGET static void decode_##name(const Decode *d, const Format *f) { decode_body(d, f); } \
    TARGET static void maxima_##name(const float *x, float *m, size_t n, size_t b) { maxima_body(x, m, n, b); } \
    TARGET static void powers_##name(const Powers *p) { powers_body(p); } \
    static const Variant name##_variant = {encode_##name, decode_##name, maxima_##name, powers_##name};

#include "_variants.h"

/* ---------------------------------------------------------------------------------------------- Python's side */

/* One line of the table of minifloat.py's Spans: where values, code bytes and blocks begin. */
typedef struct {
    int64_t at, numel, codes, row, first;
} Span;

/* The buffers that a table speaks of, and how many elements each has. */
typedef struct {
    unsigned long long values, codes, rows, table, keys;
    Py_ssize_t values_size, codes_size, rows_size, spans, keys_size, block;
} Spans;

static int spans_are_inside(const Spans *all, int width) {
    const Span *span = (const Span *)(uintptr_t)all->table;
    if (all->block < 1 || (width != 4 && width != 8) || (width == 4 && all->block % 2) || all->spans < 0) {
        refused("this block or width of codes");
        return 0;
    }
    for (Py_ssize_t i = 0; i < all->spans; i++) {
        int64_t numel = span[i].numel;
        if (!inside(span[i].at, numel, all->values_size) ||
            !inside(span[i].codes, width == 8 ? numel : numel / 2 + numel % 2, all->codes_size) ||
            !inside(span[i].row, numel / all->block + !!(numel % all->block), all->rows_size)) {
            outside("span", i);
            return 0;
        }
    }
    return 1;
}

static int format_is_possible(const Format *f) {
    int exponents = f->width - 1 - f->mantissa;
    if ((f->width == 4 || f->width == 8) && f->mantissa >= 1 && exponents >= 1 && f->bias >= 0 && f->bias < 32)
        return 1;
    refused("this format");
    return 0;
}

#define FORMAT(f) &(f).width, &(f).mantissa, &(f).bias, &(f).largest, &(f).infinity, &(f).nan, &(f).finite
#define SPANS(all) \
    &(all).values, &(all).codes, &(all).rows, &(all).values_size, &(all).codes_size, &(all).rows_size, &(all).table, \
        &(all).spans, &(all).block

PyObject *py_minifloat_encode(PyObject *self, PyObject *args) {
    (void)self;
    Spans all = {0};
    Format f;
    Encode e = {0};
    if (!PyArg_ParseTuple(args, "KKK(nnn)Knn(iiifiii)Knp", SPANS(all), FORMAT(f), &all.keys, &all.keys_size,
                          &e.stochastic) ||
        !format_is_possible(&f) || !spans_are_inside(&all, f.width))
        return NULL;
    if (e.stochastic && all.keys_size < all.spans) return refused("fewer keys than spans");
    const Span *span = (const Span *)(uintptr_t)all.table;
    const uint64_t *keys = (const uint64_t *)(uintptr_t)all.keys;
    const Variant *variant = serving(instruction_set());
    e.block = (size_t)all.block;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.spans; i++, span++) {
        e.x = (const float *)(uintptr_t)all.values + span->at;
        e.codes = (uint8_t *)(uintptr_t)all.codes + span->codes;
        e.inverses = (const float *)(uintptr_t)all.rows + span->row;
        e.numel = (size_t)span->numel;
        e.first = (uint32_t)span->first;
        if (e.stochastic) {
            e.key_low = (uint32_t)keys[i];
            e.key_high = (uint32_t)(keys[i] >> 32);
        }
        variant->encode(&e, &f);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_minifloat_decode(PyObject *self, PyObject *args) {
    (void)self;
    Spans all = {0};
    Format f;
    Decode d = {0};
    if (!PyArg_ParseTuple(args, "KKK(nnn)Knn(iiifiii)i", SPANS(all), FORMAT(f), &d.sign) || !format_is_possible(&f) ||
        !spans_are_inside(&all, f.width))
        return NULL;
    const Span *span = (const Span *)(uintptr_t)all.table;
    const Variant *variant = serving(instruction_set());
    d.block = (size_t)all.block;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.spans; i++, span++) {
        d.out = (float *)(uintptr_t)all.values + span->at;
        d.codes = (const uint8_t *)(uintptr_t)all.codes + span->codes;
        d.units = (const float *)(uintptr_t)all.rows + span->row;
        d.numel = (size_t)span->numel;
        variant->decode(&d, &f);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_block_maxima(PyObject *self, PyObject *args) {
    (void)self;
    Spans all = {0};
    if (!PyArg_ParseTuple(args, "KK(nn)Knn", &all.values, &all.rows, &all.values_size, &all.rows_size, &all.table,
                          &all.spans, &all.block))
        return NULL;
    all.codes_size = PY_SSIZE_T_MAX; /* no codes are read or written */
    if (!spans_are_inside(&all, 8)) return NULL;
    const Span *span = (const Span *)(uintptr_t)all.table;
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.spans; i++, span++)
        variant->maxima((const float *)(uintptr_t)all.values + span->at, (float *)(uintptr_t)all.rows + span->row,
                        (size_t)span->numel, (size_t)all.block);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_power_scales(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long maxima, codes, inverses;
    Py_ssize_t numel;
    Powers p;
    if (!PyArg_ParseTuple(args, "KKKnii", &maxima, &codes, &inverses, &numel, &p.exponent, &p.highest)) return NULL;
    if (numel < 0) return refused("fewer blocks than none");
    p.maxima = (const float *)(uintptr_t)maxima;
    p.codes = (uint8_t *)(uintptr_t)codes;
    p.inverses = (float *)(uintptr_t)inverses;
    p.numel = (size_t)numel;
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    variant->powers(&p);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
