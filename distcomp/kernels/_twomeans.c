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

#define PART 256 /* elements that are told apart before they are added: a multiple of the lanes */

/* Add the m elements of a part to their lanes, the first of which is in lane `lane`. */
BODY void add_part(const float *restrict part, size_t lane, size_t m, double *restrict sums) {
    size_t head = smaller((LANES - lane) % LANES, m), j = 0;
    for (; j < head; j++) sums[lane + j] += (double)part[j];
    for (; j + LANES <= m; j += LANES)
        for (size_t i = 0; i < LANES; i++) sums[i] += (double)part[j + i];
    for (size_t i = 0; j < m; j++, i++) sums[i] += (double)part[j];
}

/* m elements of one chunk, the first of which is number `first` in it. */
BODY void add_chunk(const float *x, size_t first, size_t m, Sums2 *sums) {
    double high[LANES] = {0}, low[LANES] = {0};
    uint32_t above = 0, below = 0;
    for (size_t start = 0; start < m; start += PART) {
        float positive[PART], negative[PART];
        size_t count = smaller(PART, m - start), lane = (first + start) % LANES;
        for (size_t j = 0; j < count; j++) positive[j] = x[start + j] >= 0.0f ? x[start + j] : 0.0f;
        for (size_t j = 0; j < count; j++) negative[j] = x[start + j] < 0.0f ? x[start + j] : 0.0f;
        for (size_t j = 0; j < count; j++) above += x[start + j] >= 0.0f;
        for (size_t j = 0; j < count; j++) below += x[start + j] < 0.0f;
        add_part(positive, lane, count, high);
        add_part(negative, lane, count, low);
    }
    fold(high);
    fold(low);
    sums->high += high[0];
    sums->low += low[0];
    sums->above += above;
    sums->below += below;
}

BODY void means_body(const float *x, const Line *line, float *scales) {
    size_t length = (size_t)line->length, before = (size_t)line->before, numel = (size_t)line->numel;
    float *high = scales + line->scale, *low = high + line->units;
    size_t unit = 0;
    x += line->at;
    for (size_t at = before; at < before + numel; unit++) {
        size_t end = smaller((unit + 1) * length, before + numel);
        Sums2 sums = {0, 0, 0, 0};
        while (at < end) {
            size_t place = at - unit * length, m = smaller(CHUNK - place % CHUNK, end - at);
            add_chunk(x + (at - before), place % CHUNK, m, &sums);
            at += m;
        }
        high[unit] = (float)(sums.high / (double)(sums.above ? sums.above : 1));
        low[unit] = (float)(sums.low / (double)(sums.below ? sums.below : 1));
    }
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
    void (*means)(const float *, const Line *, float *);
    void (*put)(const uint8_t *, float *, const Line *, const float *, size_t, int);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void means_##name(const float *x, const Line *line, float *s) { means_body(x, line, s); } \
    TARGET static void put_##name(const uint8_t *c, float *out, const Line *line, const float *s, size_t n, int sign) { \
        put_body(c, out, line, s, n, sign); \
    } \
    static const Variant name##_variant = {means_##name, put_##name};

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

PyObject *py_two_means(PyObject *self, PyObject *args) {
    (void)self;
    All all = {0};
    if (!PyArg_ParseTuple(args, "KK(nn)Kn", &all.values, &all.scales, &all.values_size, &all.scales_size, &all.table,
                          &all.lines) ||
        !lines_are_inside(&all))
        return NULL;
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.lines; i++)
        variant->means((const float *)(uintptr_t)all.values, TABLE(all) + i, (float *)(uintptr_t)all.scales);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_put_two_means(PyObject *self, PyObject *args) {
    (void)self;
    All all = {0};
    int sign;
    if (!PyArg_ParseTuple(args, "KKK(nnn)Kni", &all.values, &all.codes, &all.scales, &all.values_size, &all.codes_size,
                          &all.scales_size, &all.table, &all.lines, &sign) ||
        !lines_are_inside(&all))
        return NULL;
    int64_t whole = all.values_size / SIGNS, rest = all.values_size % SIGNS;
    if (all.values_size < 0 || !inside(0, whole * (SIGNS / 8) + (rest + 7) / 8, all.codes_size))
        return refused("more values than signs");
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.lines; i++)
        variant->put((const uint8_t *)(uintptr_t)all.codes, (float *)(uintptr_t)all.values, TABLE(all) + i,
                     (const float *)(uintptr_t)all.scales, (size_t)all.values_size, sign);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
