/* Scales of two levels, a float32 for each group of blocks and an e4m3 for each block: kernels/two_level.py says the
 * same in torch, bit for bit.
 */
#include <stdint.h>
#include <string.h>

#include "_cpu.h"
#include "_inside.h"
#include "_twolevel.h"

#define NORMAL (120u << 3) /* from e4m3's exponent to float32's, as codes of e4m3 */

static float of_e4m3(uint8_t code) {
    uint32_t magnitude = code & 0x7F, sign = (uint32_t)(code >> 7) << 31;
    if (magnitude == 0x7F) return float_of(0x7FF00000u | sign);
    if (magnitude >= 8) return float_of(((magnitude + NORMAL) << 20) | sign);
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

/* One group of blocks. A ratio, from 2^-6 to 448, is an e4m3 whose exponent is normal: to the nearest, ties to even; or
 * up. Where a ratio is a NaN the whole group is not usable. */
BODY void group_body(const Encode *e, size_t group, size_t at, size_t count) {
    const float *restrict maxima = e->maxima + at;
    float *restrict inverses = e->inverses + at;
    uint8_t *restrict codes = e->codes + at;
    int32_t most = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)bits_of(maxima[i]); /* as integers a NaN is the largest */
        most = bits > most ? bits : most;
    }
    float largest = float_of((uint32_t)most);
    if (largest < e->smallest) largest = 0.0f;
    const float outer = largest / e->outer_units, given = outer > 0 ? outer : 1.0f, inner_units = e->inner_units;
    const float inverse = 1 / given;
    const int usable = outer > 0 && bits_of(outer) != 0x7F800000u;
    const int up = e->up;
    e->scales[group] = outer;
    for (size_t i = 0; i < count; i++) {
        float ratio = maxima[i] / inner_units / given;
        ratio = ratio < 0x1p-6f ? 0x1p-6f : ratio;
        ratio = ratio > 448.0f ? 448.0f : ratio;
        uint32_t bits = bits_of(ratio), code = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - NORMAL;
        code += up & (float_of((code + NORMAL) << 20) < ratio); /* 448, the largest, is below none */
        codes[i] = (uint8_t)(ratio == ratio ? code : 0x7F | bits >> 31 << 7);
        float found = inverse / float_of((code + NORMAL) << 20);
        inverses[i] = usable ? found : 0.0f;
    }
}

typedef struct {
    void (*group)(const Encode *, size_t, size_t, size_t);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void group_##name(const Encode *e, size_t group, size_t at, size_t count) { \
        group_body(e, group, at, count); \
    } \
    static const Variant name##_variant = {group_##name};

#include "_variants.h"

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
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    size_t row = 0, group = 0;
    for (Py_ssize_t i = 0; i < parameters; i++)
        for (int64_t left = blocks[i]; left > 0; left -= per, group++) {
            size_t count = (size_t)(left < per ? left : per);
            variant->group(&e, group, row, count);
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
