/* Scales of two levels, a float32 for each group of blocks and an e4m3 for each block: kernels/two_level.py says the
 * same in torch, bit for bit.
 */
#include <stdint.h>
#include <string.h>

#include "_cpu.h"
#include "_inside.h"
#include "_twolevel.h"

#define MOST 0x7E /* the code of 448, e4m3's largest number */

/* A number from 2^-6 to 448 as e4m3, where all exponents are normal: to the nearest, ties to even; or up. */
static uint8_t e4m3_of(float ratio, int up) {
    uint32_t bits = bits_of(ratio);
    if (ratio != ratio) return (uint8_t)(0x7F | bits >> 31 << 7);
    uint32_t code = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return (uint8_t)(code + (up && code < MOST && float_of((code + (120 << 3)) << 20) < ratio));
}

static float of_e4m3(uint8_t code) {
    uint32_t magnitude = code & 0x7F, sign = (uint32_t)(code >> 7) << 31;
    if (magnitude == 0x7F) return float_of(0x7FF00000u | sign);
    if (magnitude >= 8) return float_of(((magnitude + (120 << 3)) << 20) | sign);
    float small = (float)magnitude * 0x1p-9f;
    return code >> 7 ? -small : small;
}

typedef struct {
    const float *maxima;
    float *scales, *inverses;
    uint8_t *codes;
    float outer_units, inner_units, smallest;
    int up;
} Encode;

/* One group of blocks. */
static void encode_group(const Encode *e, size_t group, size_t at, size_t count) {
    int32_t most = 0;
    for (size_t i = at; i < at + count; i++) {
        int32_t bits = (int32_t)bits_of(e->maxima[i]); /* as integers a NaN is the largest */
        if (bits > most) most = bits;
    }
    float largest = float_of((uint32_t)most);
    if (largest < e->smallest) largest = 0.0f;
    float outer = largest / e->outer_units, given = outer > 0 ? outer : 1.0f, inverse = 1 / given;
    int usable = outer > 0 && bits_of(outer) != 0x7F800000u;
    e->scales[group] = outer;
    for (size_t i = at; i < at + count; i++) {
        float ratio = e->maxima[i] / e->inner_units / given;
        if (ratio < 0x1p-6f) ratio = 0x1p-6f;
        if (ratio > 448.0f) ratio = 448.0f;
        e->codes[i] = e4m3_of(ratio, e->up);
        e->inverses[i] = usable ? inverse / of_e4m3(e->codes[i]) : 0.0f;
    }
}

/* The groups of parameters that have so many blocks each; NULL with an error where they reach outside. */
static int blocks_fit(const int64_t *blocks, Py_ssize_t parameters, Py_ssize_t per, Py_ssize_t rows, Py_ssize_t groups) {
    int64_t row = 0, group = 0;
    if (per < 1 || parameters < 0) return refused("these numbers of blocks") != NULL;
    for (Py_ssize_t i = 0; i < parameters; i++) {
        if (!inside(row, blocks[i], rows)) return outside("parameter", i) != NULL;
        row += blocks[i];
        group += (blocks[i] + per - 1) / per;
        if (group > groups) return outside("parameter", i) != NULL;
    }
    return 1;
}

PyObject *py_two_level_scales(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long maxima, scales, codes, inverses, table;
    Py_ssize_t rows, groups, parameters, per;
    Encode e;
    if (!PyArg_ParseTuple(args, "KKKK(nn)Knn(fff)p", &maxima, &scales, &codes, &inverses, &rows, &groups, &table,
                          &parameters, &per, &e.outer_units, &e.inner_units, &e.smallest, &e.up))
        return NULL;
    const int64_t *blocks = (const int64_t *)(uintptr_t)table;
    if (!blocks_fit(blocks, parameters, per, rows, groups)) return NULL;
    e.maxima = (const float *)(uintptr_t)maxima;
    e.scales = (float *)(uintptr_t)scales;
    e.codes = (uint8_t *)(uintptr_t)codes;
    e.inverses = (float *)(uintptr_t)inverses;
    Py_BEGIN_ALLOW_THREADS
    size_t row = 0, group = 0;
    for (Py_ssize_t i = 0; i < parameters; i++)
        for (int64_t left = blocks[i]; left > 0; left -= per, group++) {
            size_t count = (size_t)(left < per ? left : per);
            encode_group(&e, group, row, count);
            row += count;
        }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_two_level_units(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long scales, codes, units, table;
    Py_ssize_t rows, groups, parameters, per;
    if (!PyArg_ParseTuple(args, "KKK(nn)Knn", &scales, &codes, &units, &rows, &groups, &table, &parameters, &per))
        return NULL;
    const int64_t *blocks = (const int64_t *)(uintptr_t)table;
    if (!blocks_fit(blocks, parameters, per, rows, groups)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    const float *outer = (const float *)(uintptr_t)scales;
    const uint8_t *code = (const uint8_t *)(uintptr_t)codes;
    float *out = (float *)(uintptr_t)units, values[256];
    for (int i = 0; i < 256; i++) values[i] = of_e4m3((uint8_t)i);
    for (Py_ssize_t i = 0; i < parameters; i++)
        for (int64_t left = blocks[i]; left > 0; left -= per, outer++)
            for (int64_t j = 0; j < (left < per ? left : per); j++) *out++ = *outer * values[*code++];
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
