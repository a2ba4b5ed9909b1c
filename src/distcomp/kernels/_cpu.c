/* CPU twins of reference.py, bit for bit. Plain C, no torch headers: Python passes addresses and sizes.
 *
 * Each function handles one contiguous run of blocks with the interpreter lock released; Python splits a large
 * tensor between threads on block boundaries. The best instruction set is picked when the module loads.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_cpu.h"

/* The bodies once more for each instruction set. */
typedef struct {
    const char *name;
    void (*quantize)(const Quantize *);
    void (*dequantize)(const Dequantize *);
    int (*all_finite_32)(const uint32_t *, size_t);
    int (*all_finite_16)(const uint16_t *, size_t, uint16_t);
    Sums (*checksum)(const uint8_t *, size_t);
} Variant;

#define VARIANT(name, TARGET, modern) \
    TARGET static void quantize_##name(const Quantize *q) { quantize_body(q, modern); } \
    TARGET static void dequantize_##name(const Dequantize *d) { dequantize_body(d); } \
    TARGET static int all_finite_32_##name(const uint32_t *x, size_t n) { return all_finite_32_body(x, n); } \
    TARGET static int all_finite_16_##name(const uint16_t *x, size_t n, uint16_t e) { \
        return all_finite_16_body(x, n, e); \
    } \
    TARGET static Sums checksum_##name(const uint8_t *data, size_t n) { return checksum_body(data, n); } \
    static const Variant name##_variant = { \
        #name, quantize_##name, dequantize_##name, all_finite_32_##name, all_finite_16_##name, checksum_##name};

VARIANT(generic, , 0)
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
VARIANT(avx2, __attribute__((target("avx2,fma"))), 1)
VARIANT(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), 1)
#define HAVE_X86_VARIANTS
#endif

static const Variant *chosen = &generic_variant;

static const Variant *variant_named(const char *name) {
#ifdef HAVE_X86_VARIANTS
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (!name || !strcmp(name, "avx512"))) return &avx512_variant;
    if (avx2 && (!name || !strcmp(name, "avx2"))) return &avx2_variant;
#endif
    return !name || !strcmp(name, "generic") ? &generic_variant : NULL;
}

/* Python's side: addresses come as integers that the wrapper in cpu.py has checked. */
static uint8_t *scratch_for(size_t numel, size_t block) {
    size_t bytes = smaller(numel, block);
    uint8_t *scratch = malloc(bytes ? bytes : 1);
    if (!scratch) PyErr_NoMemory();
    return scratch;
}

static PyObject *py_quantize(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, codes, scales, key;
    Py_ssize_t numel, block;
    unsigned int first;
    Quantize q;
    if (!PyArg_ParseTuple(args, "KKKnniKIpp", &x, &codes, &scales, &numel, &block, &q.bits, &key, &first,
                          &q.stochastic, &q.given))
        return NULL;
    q.x = (const float *)(uintptr_t)x;
    q.codes = (uint8_t *)(uintptr_t)codes;
    q.scales = (float *)(uintptr_t)scales;
    q.numel = (size_t)numel;
    q.block = (size_t)block;
    q.key_low = (uint32_t)key;
    q.key_high = (uint32_t)(key >> 32);
    q.first = first;
    q.scratch = scratch_for(q.numel, q.block);
    if (!q.scratch) return NULL;
    Py_BEGIN_ALLOW_THREADS
    chosen->quantize(&q);
    Py_END_ALLOW_THREADS
    free(q.scratch);
    Py_RETURN_NONE;
}

static PyObject *py_dequantize(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long codes, scales, out;
    Py_ssize_t numel, block;
    Dequantize d;
    if (!PyArg_ParseTuple(args, "KKKnniif", &codes, &scales, &out, &numel, &block, &d.bits, &d.sign,
                          &d.times))
        return NULL;
    d.codes = (const uint8_t *)(uintptr_t)codes;
    d.scales = (const float *)(uintptr_t)scales;
    d.out = (float *)(uintptr_t)out;
    d.numel = (size_t)numel;
    d.block = (size_t)block;
    d.scratch = scratch_for(d.numel, d.block);
    if (!d.scratch) return NULL;
    Py_BEGIN_ALLOW_THREADS
    chosen->dequantize(&d);
    Py_END_ALLOW_THREADS
    free(d.scratch);
    Py_RETURN_NONE;
}

static PyObject *py_all_finite(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x;
    Py_ssize_t numel;
    unsigned int exponent;
    int finite;
    if (!PyArg_ParseTuple(args, "KnI", &x, &numel, &exponent)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (exponent > 0xffffu)
        finite = chosen->all_finite_32((const uint32_t *)(uintptr_t)x, (size_t)numel);
    else
        finite = chosen->all_finite_16((const uint16_t *)(uintptr_t)x, (size_t)numel, (uint16_t)exponent);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

static PyObject *py_checksum(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long data;
    Py_ssize_t bytes;
    Sums sums;
    if (!PyArg_ParseTuple(args, "Kn", &data, &bytes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    sums = chosen->checksum((const uint8_t *)(uintptr_t)data, (size_t)bytes);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("II", (unsigned int)sums.sum, (unsigned int)sums.weighted);
}

static PyObject *py_use(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    const Variant *variant = variant_named(name);
    if (!variant) return PyErr_Format(PyExc_ValueError, "this machine has no instruction set named %s", name);
    chosen = variant;
    Py_RETURN_NONE;
}

static PyObject *py_instruction_set(PyObject *self, PyObject *args) {
    (void)self;
    (void)args;
    return PyUnicode_FromString(chosen->name);
}

static PyMethodDef methods[] = {
    {"quantize", py_quantize, METH_VARARGS, "x, codes, scales, numel, block, bits, key, first, stochastic, given"},
    {"dequantize", py_dequantize, METH_VARARGS, "codes, scales, out, numel, block, bits, sign, times"},
    {"all_finite", py_all_finite, METH_VARARGS, "x, numel, exponent mask -> bool"},
    {"checksum", py_checksum, METH_VARARGS, "data, bytes -> (sum, weighted sum)"},
    {"use", py_use, METH_VARARGS, "choose an instruction set by name: generic, avx2 or avx512"},
    {"instruction_set", py_instruction_set, METH_NOARGS, "the one in use"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_cpu",
    .m_doc = "CPU kernels of distcomp",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cpu(void) {
    chosen = variant_named(NULL);
    return PyModule_Create(&module);
}
