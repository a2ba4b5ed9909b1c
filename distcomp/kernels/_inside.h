/* Addresses cannot be checked; offsets, counts and sizes can. Every entry point is told how many elements each of its
 * buffers has and asks here, without overflow, before it reads: what reaches outside is a ValueError. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* Whether the `count` elements from `at` on lie within a buffer of `size`. */
static inline int inside(int64_t at, int64_t count, int64_t size) {
    return at >= 0 && count >= 0 && count <= size && at <= size - count;
}

/* The same of a product of counts, none of them negative. */
static inline int product_inside(const int64_t *counts, int number, int64_t size) {
    int64_t product = 1;
    for (int i = 0; i < number; i++)
        if (counts[i] < 0 || __builtin_mul_overflow(product, counts[i], &product)) return 0;
    return product <= size;
}

static inline PyObject *refused(const char *what) { return PyErr_Format(PyExc_ValueError, "%s cannot be", what); }

/* NULL, and a ValueError that names the line of the table. */
static inline PyObject *outside(const char *what, Py_ssize_t line) {
    return PyErr_Format(PyExc_ValueError, "%s %zd reaches outside its buffers", what, line);
}
