/* CPU twins of reference.py, bit for bit. Plain C, no torch headers: Python passes addresses and sizes.
 *
 * Each function handles one contiguous run of blocks with the interpreter lock released; Python splits a large
 * tensor between threads on block boundaries. The best instruction set is picked when the module loads.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_binary.h"
#include "_cpu.h"
#include "_lowrank.h"
#include "_rows.h"
#include "_select.h"

/* The bodies once more for each instruction set. */
typedef struct {
    const char *name;
    void (*quantize)(const Quantize *);
    void (*dequantize)(const Dequantize *);
    int (*all_finite_32)(const uint32_t *, size_t);
    int (*all_finite_16)(const uint16_t *, size_t, uint16_t);
    Sums (*checksum)(const uint8_t *, size_t);
    size_t (*at_least)(const uint32_t *, size_t, uint32_t, int64_t *, size_t);
    void (*permuted)(int64_t *, size_t, uint64_t, int, const uint64_t *);
    void (*exponents)(const uint32_t *, uint8_t *, size_t, uint32_t, uint32_t);
    void (*scale_by_exponents)(const uint8_t *, float *, size_t);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void quantize_##name(const Quantize *q) { quantize_body(q); } \
    TARGET static void dequantize_##name(const Dequantize *d) { dequantize_body(d); } \
    TARGET static int all_finite_32_##name(const uint32_t *x, size_t n) { return all_finite_32_body(x, n); } \
    TARGET static int all_finite_16_##name(const uint16_t *x, size_t n, uint16_t e) { \
        return all_finite_16_body(x, n, e); \
    } \
    TARGET static Sums checksum_##name(const uint8_t *data, size_t n) { return checksum_body(data, n); } \
    TARGET static size_t at_least_##name(const uint32_t *x, size_t n, uint32_t t, int64_t *p, size_t most) { \
        return at_least_body(x, n, t, p, most); \
    } \
    TARGET static void permuted_##name(int64_t *p, size_t count, uint64_t n, int bits, const uint64_t *keys) { \
        permuted_body(p, count, n, bits, keys); \
    } \
    TARGET static void exponents_##name(const uint32_t *x, uint8_t *codes, size_t n, uint32_t c, uint32_t k) { \
        exponents_body(x, codes, n, c, k); \
    } \
    TARGET static void scale_by_exponents_##name(const uint8_t *codes, float *out, size_t n) { \
        scale_by_exponents_body(codes, out, n); \
    } \
    static const Variant name##_variant = { \
        #name, quantize_##name, dequantize_##name, all_finite_32_##name, all_finite_16_##name, \
        checksum_##name, at_least_##name, permuted_##name, exponents_##name, scale_by_exponents_##name};

VARIANT(generic, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
VARIANT(avx2, __attribute__((target("avx2,fma"))))
VARIANT(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
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

/* What reaches outside its buffers is a ValueError, never a read. */
static PyObject *refused(const char *what) { return PyErr_Format(PyExc_ValueError, "%s cannot be", what); }

static int blocks_are_possible(Py_ssize_t numel, Py_ssize_t block, int bits) {
    return numel >= 0 && block > 0 && bits >= 1 && bits <= 8;
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
    if (!blocks_are_possible(numel, block, q.bits)) return refused("these numbers of elements, blocks or bits");
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
    if (!blocks_are_possible(numel, block, d.bits)) return refused("these numbers of elements, blocks or bits");
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

/* One line of the table of many pieces that lie in one buffer: see pieces.py. */
typedef struct {
    int64_t at, numel, codes, scales, first;
} Piece;

static size_t longest(const Piece *pieces, Py_ssize_t count) {
    size_t most = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if ((size_t)pieces[i].numel > most) most = (size_t)pieces[i].numel;
    return most;
}

static PyObject *py_quantize_pieces(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, codes, scales, table, keys;
    Py_ssize_t pieces, block;
    Quantize q;
    if (!PyArg_ParseTuple(args, "KKKKnKnipp", &x, &codes, &scales, &table, &pieces, &keys, &block, &q.bits,
                          &q.stochastic, &q.given))
        return NULL;
    const Piece *piece = (const Piece *)(uintptr_t)table;
    const uint64_t *key = (const uint64_t *)(uintptr_t)keys;
    q.block = (size_t)block;
    q.scratch = scratch_for(longest(piece, pieces), q.block);
    if (!q.scratch) return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < pieces; i++, piece++) {
        q.x = (const float *)(uintptr_t)x + piece->at;
        q.codes = (uint8_t *)(uintptr_t)codes + piece->codes;
        q.scales = (float *)(uintptr_t)scales + piece->scales;
        q.numel = (size_t)piece->numel;
        q.first = (uint32_t)piece->first;
        q.key_low = (uint32_t)key[i];
        q.key_high = (uint32_t)(key[i] >> 32);
        chosen->quantize(&q);
    }
    Py_END_ALLOW_THREADS
    free(q.scratch);
    Py_RETURN_NONE;
}

static PyObject *py_dequantize_pieces(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long codes, scales, out, table;
    Py_ssize_t pieces, block;
    Dequantize d;
    if (!PyArg_ParseTuple(args, "KKKKnniif", &codes, &scales, &out, &table, &pieces, &block, &d.bits, &d.sign,
                          &d.times))
        return NULL;
    const Piece *piece = (const Piece *)(uintptr_t)table;
    d.block = (size_t)block;
    d.scratch = scratch_for(longest(piece, pieces), d.block);
    if (!d.scratch) return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < pieces; i++, piece++) {
        d.codes = (const uint8_t *)(uintptr_t)codes + piece->codes;
        d.scales = (const float *)(uintptr_t)scales + piece->scales;
        d.out = (float *)(uintptr_t)out + piece->at;
        d.numel = (size_t)piece->numel;
        chosen->dequantize(&d);
    }
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
    if (numel < 0) return refused("a negative number of elements");
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
    if (bytes < 0) return refused("a negative number of bytes");
    Py_BEGIN_ALLOW_THREADS
    sums = chosen->checksum((const uint8_t *)(uintptr_t)data, (size_t)bytes);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("II", (unsigned int)sums.sum, (unsigned int)sums.weighted);
}

static PyObject *py_at_least(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, places;
    Py_ssize_t numel, most;
    unsigned int threshold;
    size_t found;
    if (!PyArg_ParseTuple(args, "KnIKn", &x, &numel, &threshold, &places, &most)) return NULL;
    if (numel < 0 || most < 0) return refused("a negative number of elements");
    Py_BEGIN_ALLOW_THREADS
    found = chosen->at_least((const uint32_t *)(uintptr_t)x, (size_t)numel, threshold,
                             (int64_t *)(uintptr_t)places, (size_t)most);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(found);
}

static PyObject *py_permuted(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long places, numel, given[HALF_ROUNDS];
    Py_ssize_t count;
    int bits;
    uint64_t keys[HALF_ROUNDS];
    if (!PyArg_ParseTuple(args, "KnKi(KKKKKK)", &places, &count, &numel, &bits, &given[0], &given[1], &given[2],
                          &given[3], &given[4], &given[5]))
        return NULL;
    if (count < 0 || bits < 0 || bits > 63 || (unsigned long long)count > numel || numel > 1ull << bits)
        return refused("more places than there are elements, or these bits,");
    for (int i = 0; i < HALF_ROUNDS; i++) keys[i] = (uint64_t)given[i];
    Py_BEGIN_ALLOW_THREADS
    chosen->permuted((int64_t *)(uintptr_t)places, (size_t)count, (uint64_t)numel, bits, keys);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_exponents(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, codes, key;
    Py_ssize_t numel;
    unsigned int first;
    if (!PyArg_ParseTuple(args, "KKnKI", &x, &codes, &numel, &key, &first)) return NULL;
    if (numel < 0) return refused("a negative number of elements");
    Py_BEGIN_ALLOW_THREADS
    chosen->exponents((const uint32_t *)(uintptr_t)x, (uint8_t *)(uintptr_t)codes, (size_t)numel,
                      first + (uint32_t)key, (uint32_t)(key >> 32));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_scale_by_exponents(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long codes, out;
    Py_ssize_t numel;
    if (!PyArg_ParseTuple(args, "KKn", &codes, &out, &numel)) return NULL;
    if (numel < 0) return refused("a negative number of elements");
    Py_BEGIN_ALLOW_THREADS
    chosen->scale_by_exponents((const uint8_t *)(uintptr_t)codes, (float *)(uintptr_t)out, (size_t)numel);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

const char *instruction_set(void) { return chosen->name; }

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
    return PyUnicode_FromString(instruction_set());
}

static PyMethodDef methods[] = {
    {"quantize", py_quantize, METH_VARARGS, "x, codes, scales, numel, block, bits, key, first, stochastic, given"},
    {"dequantize", py_dequantize, METH_VARARGS, "codes, scales, out, numel, block, bits, sign, times"},
    {"quantize_pieces", py_quantize_pieces, METH_VARARGS,
     "x, codes, scales, table, pieces, keys, block, bits, stochastic, given"},
    {"dequantize_pieces", py_dequantize_pieces, METH_VARARGS,
     "codes, scales, out, table, pieces, block, bits, sign, times"},
    {"top_rows", py_top_rows, METH_VARARGS, "x, table, rows, places, longest"},
    {"write_rows", py_write_rows, METH_VARARGS, "places, table, rows, codes"},
    {"read_rows", py_read_rows, METH_VARARGS, "codes, table, rows, places"},
    {"move", py_move, METH_VARARGS, "from, to, table, pieces"},
    {"lowrank_pieces", py_lowrank_pieces, METH_VARARGS, "kind, p, q, m, out, table, pieces, subtract"},
    {"all_finite", py_all_finite, METH_VARARGS, "x, numel, exponent mask -> bool"},
    {"checksum", py_checksum, METH_VARARGS, "data, bytes -> (sum, weighted sum)"},
    {"at_least", py_at_least, METH_VARARGS, "x, numel, threshold, places, most -> how many"},
    {"permuted", py_permuted, METH_VARARGS, "places, count, numel, bits, keys"},
    {"exponents", py_exponents, METH_VARARGS, "x, codes, numel, key, first"},
    {"scale_by_exponents", py_scale_by_exponents, METH_VARARGS, "codes, out, numel"},
    {"pack_signs", py_pack_signs, METH_VARARGS, "x, words, samples, channels, places, plain"},
    {"binary_conv", py_binary_conv, METH_VARARGS,
     "x, weight, scale, bias, out, samples, (channels, height, width), (outputs, kh, kw, stride, padding), "
     "(out_height, out_width), rows, plain"},
    {"lowrank", py_lowrank, METH_VARARGS,
     "rows, columns or outer; p, q, m, out, a, b, rank, p_stride, stride, out_stride, subtract, "
     "elements of (p, q, m, out)"},
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
