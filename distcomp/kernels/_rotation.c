/* Random rotations: rotation.py's reference once more, in loops that a compiler vectorizes.
 *
 * Built with -ffp-contract=off, and the butterflies are in the reference's order: each instruction set gives the same
 * bits.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <string.h>

#include "_cpu.h"
#include "_inside.h"
#include "_rotation.h"

#define SIDE 128u /* SIDE in rotation.py */

/* v_j <- -x_j where the number that key and place draw is below a half, else x_j. */
BODY void turn_signs(const float *x, float *v, uint32_t counter, uint32_t key_high) {
    for (size_t j = 0; j < SIDE; j++) {
        uint32_t drawn = random_24(counter + (uint32_t)j, key_high);
        v[j] = float_of(bits_of(x[j]) ^ (~drawn << 8 & 0x80000000u));
    }
}

/* Pairs that are `half` apart become their sum and their difference; in `groups` of twice as many. */
#define BUTTERFLIES(half) \
    for (size_t g = 0; g < SIDE; g += 2 * (half)) \
        for (size_t j = g; j < g + (half); j++) { \
            float a = v[j], b = v[j + (half)]; \
            v[j] = a + b; \
            v[j + (half)] = a - b; \
        }

BODY void transform(float *restrict v, float unit) {
    BUTTERFLIES(1)
    BUTTERFLIES(2)
    BUTTERFLIES(4)
    BUTTERFLIES(8)
    BUTTERFLIES(16)
    BUTTERFLIES(32)
    BUTTERFLIES(64)
    for (size_t j = 0; j < SIDE; j++) v[j] *= unit;
}

/* Rows of x, each in a room of its own meanwhile, into values, which may be x. */
BODY void rotate_body(const float *x, float *values, size_t rows, uint32_t counter, uint32_t key_high, float unit,
                      int back) {
    float v[SIDE];
    for (size_t row = 0; row < rows; row++, x += SIDE, values += SIDE, counter += (uint32_t)SIDE) {
        if (back) memcpy(v, x, sizeof v);
        else turn_signs(x, v, counter, key_high);
        transform(v, unit);
        if (back) turn_signs(v, values, counter, key_high);
        else memcpy(values, v, sizeof v);
    }
}

typedef struct {
    void (*rotate)(const float *, float *, size_t, uint32_t, uint32_t, float, int);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void rotate_##name(const float *x, float *v, size_t rows, uint32_t counter, uint32_t high, \
                                     float unit, int back) { \
        rotate_body(x, v, rows, counter, high, unit, back); \
    } \
    static const Variant name##_variant = {rotate_##name};

#include "_variants.h"

/* One line of rotation.py's table: rows of SIDE values, the first of which is element `first` of its parameter. */
typedef struct {
    int64_t at, rows, first, owner;
} Line;

PyObject *py_rotate(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x_at, values_at, table_at, keys_at; /* x is as long as the values */
    Py_ssize_t size, lines, keys_size;
    int back;
    if (!PyArg_ParseTuple(args, "KKnKnKnp", &x_at, &values_at, &size, &table_at, &lines, &keys_at, &keys_size, &back)) return NULL;
    const Line *line = (const Line *)(uintptr_t)table_at;
    for (Py_ssize_t i = 0; i < lines; i++) {
        int64_t most = (int64_t)(size / (Py_ssize_t)SIDE);
        if (line[i].rows < 0 || line[i].rows > most || !inside(line[i].at, line[i].rows * (int64_t)SIDE, size) ||
            !inside(line[i].owner, 1, keys_size))
            return outside("line", i);
    }
    const uint64_t *keys = (const uint64_t *)(uintptr_t)keys_at;
    const float unit = (float)(1 / sqrt((double)SIDE));
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < lines; i++, line++) {
        uint64_t key = keys[line->owner];
        variant->rotate((const float *)(uintptr_t)x_at + line->at, (float *)(uintptr_t)values_at + line->at,
                        (size_t)line->rows, (uint32_t)key + (uint32_t)line->first, (uint32_t)(key >> 32), unit, back);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
