/* Slices of matrices in a flat buffer, by their coefficients in bases of bfloat16, and back.
 *
 * A matrix [units, slices, run] of float32 holds slice s as its elements [:, s, :], K = units * run of them. A basis is
 * [dims, K], its rows shared by some neighbouring slices. The sums are float32, each taken in one order, whatever the
 * instruction set: what all ranks restore is the same to the bit.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_inside.h"
#include "_subspace.h"

#define LANES 16
#define BLOCK 32   /* elements of a row that are loaded at once: pairs of bfloat16 */
#define SPAN 512   /* elements of a slice at a time, so that a few slices' stay in the first cache */
#define TOGETHER 9 /* slices at a time: those of a 3 x 3 convolution */

typedef struct {
    void (*dots_of_tile)(const uint16_t *basis, size_t stride, size_t dims, const float *tile, size_t slices,
                         size_t blocks, float *sums);
    void (*blocks_of)(const uint16_t *basis, size_t stride, size_t dims, const float *c, size_t slices,
                      float *values);
    void (*squares)(const float *x, const float *mean, size_t n, double *whole, double *centred);
} Variant;

#define NAME(x) x##_generic
#define WIDTH 4
#define MOST_SLICES 3
#define MOST_ROWS 1
#include "_subspace_loops.h"
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define NAME(x) x##_avx2
#define WIDTH 8
#define MOST_SLICES 3
#define MOST_ROWS 1
#include "_subspace_loops.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define NAME(x) x##_avx512
#define WIDTH 16
#define MOST_SLICES 9
#define MOST_ROWS 2
#include "_subspace_loops.h"
#pragma GCC pop_options
#define HAVE_X86_VARIANTS
#endif

static const Variant *serving(const char *name) {
#ifdef HAVE_X86_VARIANTS
    if (!strcmp(name, "avx512")) return &variant_avx512;
    if (!strcmp(name, "avx2")) return &variant_avx2;
#endif
    (void)name;
    return &variant_generic;
}

/* The slices that share a basis: see subspace.py. */
typedef struct {
    int64_t at, units, slices, run;    /* the matrix, and where it begins in the flat buffer */
    int64_t first, count;              /* those of its slices */
    int64_t dims, coefficients, above; /* rows in use, where the coefficients begin, rows of an offset */
} Line;

/* What a call is about. */
typedef struct {
    const float *x, *mean;
    float *coefficients, *out;
    const Line *line;
    const uint64_t *bases, *offsets; /* an address for each line */
    const Variant *variant;
    float *tile, *sums; /* scratch */
} Call;

/* Where the elements of a block lie, from the first of slice 0: those of even index, then those of odd ones. */
static void places_of(const Line *line, size_t begin, size_t count, size_t *place) {
    size_t run = (size_t)line->run, row = (size_t)line->slices * run, unit = begin / run, within = begin % run;
    for (size_t i = 0; i < count; i++) {
        place[i / 2 + (i & 1) * LANES] = unit * row + within;
        if (++within == run) within = 0, unit++;
    }
}

/* A block of each of some slices, zeros behind their last elements. */
static void gather_block(const Line *line, const float *x, size_t begin, size_t slices, float *tile) {
    size_t left = (size_t)(line->units * line->run) - begin, count = left < BLOCK ? left : BLOCK, place[BLOCK];
    if (line->units == 1 && count == BLOCK) { /* a slice in one run: no places to look up */
        for (x += begin; slices; slices--, x += line->run, tile += SPAN)
            for (size_t i = 0; i < LANES; i++) tile[i] = x[2 * i], tile[LANES + i] = x[2 * i + 1];
        return;
    }
    places_of(line, begin, count, place);
    for (size_t s = 0; s < slices; s++, x += line->run, tile += SPAN) {
        if (count == BLOCK) {
            for (size_t i = 0; i < BLOCK; i++) tile[i] = x[place[i]];
            continue;
        }
        memset(tile, 0, BLOCK * sizeof *tile);
        for (size_t i = 0; i < count; i++) tile[i / 2 + (i & 1) * LANES] = x[place[i / 2 + (i & 1) * LANES]];
    }
}

static float folded(const float *lanes) {
    float sum[LANES];
    memcpy(sum, lanes, sizeof sum);
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

/* A tile's products. The last block of a row may be a part of one: it is looked at with zeros behind it. */
static void add_tile(const Call *call, const Line *line, const uint16_t *basis, size_t begin, size_t slices) {
    size_t k = (size_t)(line->units * line->run), end = k - begin < SPAN ? k : begin + SPAN;
    size_t dims = (size_t)line->dims, whole = (end - begin) / BLOCK, rest = (end - begin) % BLOCK;
    const float *x = call->x + line->at;
    for (size_t i = 0; begin + i < end; i += BLOCK) gather_block(line, x, begin + i, slices, call->tile + i);
    call->variant->dots_of_tile(basis + begin, k, dims, call->tile, slices, whole, call->sums);
    for (size_t row = 0; rest && row < dims; row++) {
        uint16_t last[BLOCK] = {0};
        memcpy(last, basis + row * k + begin + whole * BLOCK, rest * sizeof *last);
        call->variant->dots_of_tile(last, BLOCK, 1, call->tile + whole * BLOCK, slices, 1,
                                    call->sums + row * TOGETHER * LANES);
    }
}

static void project(Call call, const Line *line, const uint16_t *basis, const float *offset) {
    size_t k = (size_t)(line->units * line->run), dims = (size_t)line->dims;
    float *out = call.coefficients + line->coefficients;
    call.x += line->first * line->run;
    for (size_t s = 0, slices; s < (size_t)line->count; s += slices, call.x += slices * (size_t)line->run) {
        slices = (size_t)line->count - s < TOGETHER ? (size_t)line->count - s : TOGETHER;
        memset(call.sums, 0, dims * TOGETHER * LANES * sizeof *call.sums);
        for (size_t begin = 0; begin < k; begin += SPAN) add_tile(&call, line, basis, begin, slices);
        for (size_t t = 0; t < slices; t++)
            for (size_t row = 0; row < dims; row++)
                out[(s + t) * dims + row] = folded(call.sums + (row * TOGETHER + t) * LANES) -
                                            offset[(s + t) * (size_t)line->above + row];
    }
}

/* A block of some slices to where it lies, with the means added. */
static void scatter_block(const Call *call, const Line *line, size_t begin, size_t count, size_t shift,
                          size_t slices) {
    size_t place[BLOCK], from = (size_t)line->at + shift;
    const float *values = call->tile;
    if (line->units == 1 && count == BLOCK) {
        for (from += begin; slices; slices--, from += (size_t)line->run, values += BLOCK) {
            const float *mean = call->mean + from;
            float *out = call->out + from;
            for (size_t i = 0; i < LANES; i++) {
                out[2 * i] = values[i] + mean[2 * i];
                out[2 * i + 1] = values[LANES + i] + mean[2 * i + 1];
            }
        }
        return;
    }
    places_of(line, begin, count, place);
    for (size_t s = 0; s < slices; s++, from += (size_t)line->run, values += BLOCK) {
        const float *mean = call->mean + from;
        float *out = call->out + from;
        if (count == BLOCK)
            for (size_t i = 0; i < BLOCK; i++) out[place[i]] = values[i] + mean[place[i]];
        else
            for (size_t i = 0; i < count; i++) {
                size_t at = i / 2 + (i & 1) * LANES;
                out[place[at]] = values[at] + mean[place[at]];
            }
    }
}

static void restore(const Call *call, const Line *line, const uint16_t *basis) {
    size_t k = (size_t)(line->units * line->run), dims = (size_t)line->dims;
    uint16_t *last = (uint16_t *)call->sums; /* rows that end within a block, with zeros behind them */
    for (size_t s = 0, slices; s < (size_t)line->count; s += slices) {
        const float *c = call->coefficients + line->coefficients + s * dims;
        slices = (size_t)line->count - s < TOGETHER ? (size_t)line->count - s : TOGETHER;
        for (size_t begin = 0; begin < k; begin += BLOCK) {
            size_t count = k - begin < BLOCK ? k - begin : BLOCK;
            for (size_t row = 0; count < BLOCK && row < dims; row++) {
                memset(last + row * BLOCK, 0, BLOCK * sizeof *last);
                memcpy(last + row * BLOCK, basis + row * k + begin, count * sizeof *last);
            }
            if (count < BLOCK) call->variant->blocks_of(last, BLOCK, dims, c, slices, call->tile);
            else call->variant->blocks_of(basis + begin, k, dims, c, slices, call->tile);
            scatter_block(call, line, begin, count, ((size_t)line->first + s) * (size_t)line->run, slices);
        }
    }
}

static int line_is_inside(const Line *line, Py_ssize_t flat, Py_ssize_t coefficients) {
    int64_t matrix[] = {line->units, line->slices, line->run}, own[] = {line->count, line->dims};
    return line->units >= 0 && line->run > 0 && line->dims >= 0 && line->dims <= line->above &&
           line->above < INT32_MAX && inside(line->first, line->count, line->slices) &&
           inside(line->at, 0, flat) && product_inside(matrix, 3, flat - line->at) &&
           inside(line->coefficients, 0, coefficients) && product_inside(own, 2, coefficients - line->coefficients);
}

/* Scratch for lines that were looked at; 0, with an error, where one reaches outside. */
static int prepared(Call *call, Py_ssize_t lines, Py_ssize_t flat, Py_ssize_t coefficients) {
    int64_t most = 1;
    for (Py_ssize_t i = 0; i < lines; i++) {
        if (!line_is_inside(&call->line[i], flat, coefficients)) return outside("slice", i) != NULL;
        if (call->line[i].dims > most) most = call->line[i].dims;
    }
    call->variant = serving(instruction_set());
    call->tile = malloc(TOGETHER * (SPAN + (size_t)most * LANES) * sizeof(float));
    if (!call->tile) return PyErr_NoMemory() != NULL;
    call->sums = call->tile + TOGETHER * SPAN;
    return 1;
}

/* Two signatures that differ in what they read: (x, -) to coefficients, and (coefficients, mean) to out. */
static PyObject *run(PyObject *args, int restores) {
    unsigned long long from, beside, to, table, bases, offsets;
    Py_ssize_t lines, flat, coefficients;
    if (!PyArg_ParseTuple(args, "KKKKnKK(nn)", &from, &beside, &to, &table, &lines, &bases, &offsets, &flat,
                          &coefficients))
        return NULL;
    Call call = {
        .x = (const float *)(uintptr_t)from, .mean = (const float *)(uintptr_t)beside,
        .coefficients = (float *)(uintptr_t)(restores ? from : to), .out = (float *)(uintptr_t)to,
        .line = (const Line *)(uintptr_t)table, .bases = (const uint64_t *)(uintptr_t)bases,
        .offsets = (const uint64_t *)(uintptr_t)offsets};
    if (!prepared(&call, lines, flat, coefficients)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < lines; i++) {
        const uint16_t *basis = (const uint16_t *)(uintptr_t)call.bases[i];
        if (restores) restore(&call, &call.line[i], basis);
        else project(call, &call.line[i], basis, (const float *)(uintptr_t)call.offsets[i]);
    }
    Py_END_ALLOW_THREADS
    free(call.tile);
    Py_RETURN_NONE;
}

PyObject *py_subspace_project(PyObject *self, PyObject *args) {
    (void)self;
    return run(args, 0);
}

PyObject *py_subspace_restore(PyObject *self, PyObject *args) {
    (void)self;
    return run(args, 1);
}

/* out[i] = the squares of piece i added up, and those of its distances from the mean. */
PyObject *py_squares(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, mean, out, table;
    Py_ssize_t pieces, size;
    if (!PyArg_ParseTuple(args, "KKKKnn", &x, &mean, &out, &table, &pieces, &size)) return NULL;
    const int64_t *piece = (const int64_t *)(uintptr_t)table;
    for (Py_ssize_t i = 0; i < pieces; i++)
        if (!inside(piece[2 * i], piece[2 * i + 1], size)) return outside("piece", i);
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    double *sums = (double *)(uintptr_t)out;
    for (Py_ssize_t i = 0; i < pieces; i++, piece += 2, sums += 2) {
        sums[0] = sums[1] = 0;
        for (int64_t at = piece[0], end = piece[0] + piece[1]; at < end; at += SPAN)
            variant->squares((const float *)(uintptr_t)x + at, (const float *)(uintptr_t)mean + at,
                             (size_t)(end - at < SPAN ? end - at : SPAN), &sums[0], &sums[1]);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
