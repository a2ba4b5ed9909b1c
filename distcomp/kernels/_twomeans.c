/* One bit per value and two means per unit: two_means.py's reference once more.
 *
 * Sums are in double, in 16 lanes of each chunk of a unit, chunks one after the other: an order that any machine keeps.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_cpu.h"
#include "_inside.h"
#include "_twomeans.h"

#define CHUNK 4096 /* elements of a unit that are added in lanes */
#define SIGNS 4096 /* signs that are packed together: eight planes, as packing.py has it */

/* One line of the table: a parameter's values, and its units of `length`, of which the first lacks `before`. */
typedef struct {
    int64_t at, numel, before, length, scale, units;
} Line;

typedef struct {
    double high, low; /* sums of what is >= 0 and of what is < 0: a NaN is neither */
    size_t above, below;
} Sums2;

BODY void fold(double *lane) {
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) lane[i] += lane[i + half];
}

typedef float Floats4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Masks4 __attribute__((vector_size(16)));
typedef double Doubles4 __attribute__((vector_size(32)));

/* Those of four values that a mask has all bits of, the others 0. */
#define WHERE(mask, v) (Floats4)((mask) & (Masks4)(v))
#define ADD(to, v) to += (Doubles4){(v)[0], (v)[1], (v)[2], (v)[3]}

/* Add m elements, a multiple of the lanes, the first of them in lane 0: lanes and counts stay in registers. */
BODY void add_whole(const float *x, size_t m, double *high, double *low, Sums2 *sums) {
    Doubles4 highs[LANES / 4], lows[LANES / 4];
    Masks4 above = {0}, below = {0};
    const Floats4 zero = {0};
    memcpy(highs, high, sizeof highs);
    memcpy(lows, low, sizeof lows);
    for (size_t j = 0; j < m; j += LANES) {
#pragma GCC unroll 4
        for (size_t i = 0; i < LANES / 4; i++) {
            Floats4 v = *(const Floats4 *)(x + j + 4 * i);
            Floats4 positive = WHERE(v >= zero, v), negative = WHERE(v < zero, v);
            ADD(highs[i], positive);
            ADD(lows[i], negative);
            above -= v >= zero;
            below -= v < zero;
        }
    }
    memcpy(high, highs, sizeof highs);
    memcpy(low, lows, sizeof lows);
    sums->above += (size_t)(above[0] + above[1] + above[2] + above[3]);
    sums->below += (size_t)(below[0] + below[1] + below[2] + below[3]);
}

/* The same of fewer than LANES elements, each to the lane of its place. */
BODY void add_few(const float *x, size_t m, double *high, double *low, Sums2 *sums) {
    for (size_t j = 0; j < m; j++) {
        high[j] += x[j] >= 0.0f ? (double)x[j] : 0.0;
        low[j] += x[j] < 0.0f ? (double)x[j] : 0.0;
        sums->above += x[j] >= 0.0f;
        sums->below += x[j] < 0.0f;
    }
}

/* m elements of one chunk, the first of which is number `first` in it. */
BODY void add_chunk(const float *x, size_t first, size_t m, Sums2 *sums) {
    double high[LANES] = {0}, low[LANES] = {0};
    size_t lane = first % LANES, head = smaller((LANES - lane) % LANES, m), whole = (m - head) / LANES * LANES;
    add_few(x, head, high + lane, low + lane, sums);
    add_whole(x + head, whole, high, low, sums);
    add_few(x + head + whole, m - head - whole, high, low, sums);
    fold(high);
    fold(low);
    sums->high += high[0];
    sums->low += low[0];
}

/* The signs of a block, m of them in eight planes: a byte has a bit of each. */
BODY void pack_block(const float *restrict x, uint8_t *restrict out, size_t m) {
    const size_t height = (m + 7) / 8, full = m > 7 * height ? m - 7 * height : 0; /* bytes with all their planes */
    for (size_t j = 0; j < full; j++) {
        uint32_t byte = 0;
        for (size_t p = 0; p < 8; p++) byte |= x[j + p * height] >= 0.0f ? 1u << p : 0;
        out[j] = (uint8_t)byte;
    }
    for (size_t j = full; j < height; j++) {
        uint32_t byte = 0;
        for (size_t p = 0; j + p * height < m; p++) byte |= x[j + p * height] >= 0.0f ? 1u << p : 0;
        out[j] = (uint8_t)byte;
    }
}

/* A run of values of a buffer of `total`, which begins with a block of signs: units and blocks that begin in it. */
typedef struct {
    const float *x;
    uint8_t *codes;
    float *scales;
    size_t start, end, total;
    size_t packed; /* up to here there are signs */
} Run;

/* The signs of the blocks that end up to `end`: of what has just been added up, and lies in the cache. */
BODY void pack_up_to(Run *run, size_t end) {
    while (run->packed < run->end) {
        size_t m = smaller(SIGNS, run->total - run->packed);
        if (run->packed + m > end) return;
        pack_block(run->x + run->packed, run->codes + run->packed / 8, m);
        run->packed += m;
    }
}

/* One unit's values, from `at` to `end` of its line, and its two means. */
BODY void encode_unit(Run *run, const Line *line, size_t unit, size_t at, size_t end) {
    Sums2 sums = {0, 0, 0, 0};
    const size_t line_at = (size_t)line->at;
    for (size_t place = at + (size_t)line->before - unit * (size_t)line->length, m; at < end; at += m, place += m) {
        m = smaller(CHUNK - place % CHUNK, end - at);
        add_chunk(run->x + line_at + at, place % CHUNK, m, &sums);
        pack_up_to(run, line_at + at + m);
    }
    float *high = run->scales + line->scale + unit, *low = high + line->units;
    *high = (float)(sums.high / (double)(sums.above ? sums.above : 1));
    *low = (float)(sums.low / (double)(sums.below ? sums.below : 1));
}

BODY void encode_line(Run *run, const Line *line) {
    const size_t length = (size_t)line->length, before = (size_t)line->before, numel = (size_t)line->numel;
    const size_t line_at = (size_t)line->at;
    /* Of the units, which begin at 0 and at every unit * length - before, the first that does not before the run. */
    size_t unit = run->start > line_at ? (run->start - line_at + before + length - 1) / length : 0;
    for (size_t at = unit ? unit * length - before : 0; at < numel && line_at + at < run->end; unit++) {
        size_t end = smaller((unit + 1) * length - before, numel);
        encode_unit(run, line, unit, at, end);
        at = end;
    }
}

BODY void encode_body(Run *run, const Line *line, size_t lines) {
    for (size_t i = 0; i < lines; i++) encode_line(run, line + i);
    pack_up_to(run, run->total);
}

BODY void put_bits(const uint8_t *restrict in, size_t plane, float *restrict out, size_t m, float high, float low,
                   int sign) {
    for (size_t j = 0; j < m; j++) {
        float value = in[j] >> plane & 1 ? high : low;
        out[j] = sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value;
    }
}

/* Elements from `at` to `end` of a buffer of `total`, all of one unit. */
BODY void put_unit(const uint8_t *codes, float *out, size_t at, size_t end, size_t total, float high, float low,
                   int sign) {
    while (at < end) {
        size_t block = at / SIGNS, k = at % SIGNS, m = smaller(SIGNS, total - block * SIGNS), height = (m + 7) / 8;
        size_t plane = k / height, run = smaller(end - at, smaller((plane + 1) * height, m) - k);
        const uint8_t *in = codes + block * (SIGNS / 8) + (k - plane * height);
        if (sign > 0)
            put_bits(in, plane, out + at, run, high, low, 1);
        else if (sign < 0)
            put_bits(in, plane, out + at, run, high, low, -1);
        else
            put_bits(in, plane, out + at, run, high, low, 0);
        at += run;
    }
}

BODY void put_body(const uint8_t *codes, float *out, const Line *line, const float *scales, size_t total, int sign) {
    size_t length = (size_t)line->length, before = (size_t)line->before, numel = (size_t)line->numel;
    const float *high = scales + line->scale, *low = high + line->units;
    size_t unit = 0;
    for (size_t at = 0; at < numel; unit++) {
        size_t end = smaller((unit + 1) * length - before, numel), start = (size_t)line->at;
        put_unit(codes, out, start + at, start + end, total, high[unit], low[unit], sign);
        at = end;
    }
}

typedef struct {
    void (*encode)(Run *, const Line *, size_t);
    void (*put)(const uint8_t *, float *, const Line *, const float *, size_t, int);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void encode_##name(Run *run, const Line *line, size_t lines) { encode_body(run, line, lines); } \
    TARGET static void put_##name(const uint8_t *c, float *out, const Line *line, const float *s, size_t n, int sign) { \
        put_body(c, out, line, s, n, sign); \
    } \
    static const Variant name##_variant = {encode_##name, put_##name};

#include "_variants.h"

/* ---------------------------------------------------------------------------------------------- Python's side */

typedef struct {
    unsigned long long values, codes, scales, table;
    Py_ssize_t values_size, codes_size, scales_size, lines;
} All;

#define TABLE(all) (const Line *)(uintptr_t)(all).table

static int line_is_inside(const All *all, const Line *line) {
    if (!inside(line->at, line->numel, all->values_size) || line->length < 1 || line->before < 0 ||
        line->before >= line->length || line->numel > INT64_MAX / 4 || line->length > INT64_MAX / 4)
        return 0;
    int64_t units = line->numel ? (line->before + line->numel - 1) / line->length + 1 : 0;
    return line->units == units && units <= INT64_MAX / 2 && inside(line->scale, 2 * units, all->scales_size);
}

static int lines_are_inside(const All *all) {
    for (Py_ssize_t i = 0; i < all->lines; i++)
        if (!line_is_inside(all, TABLE(*all) + i)) {
            outside("line", i);
            return 0;
        }
    return 1;
}

static int signs_are_inside(const All *all) {
    int64_t whole = all->values_size / SIGNS, rest = all->values_size % SIGNS;
    return (all->values_size >= 0 && inside(0, whole * (SIGNS / 8) + (rest + 7) / 8, all->codes_size)) ||
           refused("more values than signs") != NULL;
}

PyObject *py_encode_two_means(PyObject *self, PyObject *args) {
    (void)self;
    All all = {0};
    Py_ssize_t start, count;
    if (!PyArg_ParseTuple(args, "KKK(nnn)Knnn", &all.values, &all.codes, &all.scales, &all.values_size, &all.codes_size,
                          &all.scales_size, &all.table, &all.lines, &start, &count) ||
        !lines_are_inside(&all) || !signs_are_inside(&all))
        return NULL;
    if (!inside(start, count, all.values_size) || start % SIGNS || (count % SIGNS && start + count < all.values_size))
        return refused("a run of values that cuts a block of signs");
    Run run = {(const float *)(uintptr_t)all.values, (uint8_t *)(uintptr_t)all.codes, (float *)(uintptr_t)all.scales,
               (size_t)start, (size_t)(start + count), (size_t)all.values_size, (size_t)start};
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    variant->encode(&run, TABLE(all), (size_t)all.lines);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_put_two_means(PyObject *self, PyObject *args) {
    (void)self;
    All all = {0};
    int sign;
    if (!PyArg_ParseTuple(args, "KKK(nnn)Kni", &all.values, &all.codes, &all.scales, &all.values_size, &all.codes_size,
                          &all.scales_size, &all.table, &all.lines, &sign) ||
        !lines_are_inside(&all) || !signs_are_inside(&all))
        return NULL;
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.lines; i++)
        variant->put((const uint8_t *)(uintptr_t)all.codes, (float *)(uintptr_t)all.values, TABLE(all) + i,
                     (const float *)(uintptr_t)all.scales, (size_t)all.values_size, sign);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
