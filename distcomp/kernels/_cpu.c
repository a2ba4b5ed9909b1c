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
#include "_dct_chunks.h"
#include "_entropy.h"
#include "_header.h"
#include "_inside.h"
#include "_integers.h"
#include "_lowrank.h"
#include "_minifloat.h"
#include "_mixing.h"
#include "_rows.h"
#include "_select.h"
#include "_subspace.h"
#include "_twomeans.h"
#include "_words.h"

/* The bodies once more for each instruction set. */
typedef struct {
    const char *name;
    void (*quantize)(const Quantize *);
    void (*dequantize)(const Dequantize *);
    void (*mean)(const Mean *);
    int (*all_finite_32)(const uint32_t *, size_t);
    int (*all_finite_16)(const uint16_t *, size_t, uint16_t);
    Sums (*checksum)(const uint8_t *, size_t);
    void (*permuted)(int64_t *, size_t, uint64_t, int, const uint64_t *);
    void (*exponents)(const uint32_t *, uint8_t *, size_t, uint32_t, uint32_t);
    void (*scale_by_exponents)(const uint8_t *, float *, size_t);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void quantize_##name(const Quantize *q) { quantize_body(q); } \
    TARGET static void dequantize_##name(const Dequantize *d) { dequantize_body(d); } \
    TARGET static void mean_##name(const Mean *m) { mean_body(m); } \
    TARGET static int all_finite_32_##name(const uint32_t *x, size_t n) { return all_finite_32_body(x, n); } \
    TARGET static int all_finite_16_##name(const uint16_t *x, size_t n, uint16_t e) { \
        return all_finite_16_body(x, n, e); \
    } \
    TARGET static Sums checksum_##name(const uint8_t *data, size_t n) { return checksum_body(data, n); } \
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
        #name, quantize_##name, dequantize_##name, mean_##name, all_finite_32_##name, all_finite_16_##name, \
        checksum_##name, permuted_##name, exponents_##name, scale_by_exponents_##name};

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

/* ---------------------------------------------------------------------------------------------- Python's side */

/* One line of the table of many pieces that lie in one buffer: see pieces.py. */
typedef struct {
    int64_t at, numel, codes, scales, first;
} Piece;

/* Values, their codes and their scales, of which a table's pieces are parts; sizes are in elements. */
typedef struct {
    unsigned long long values, codes, scales;
    Py_ssize_t values_size, codes_size, scales_size, block;
    int bits;
} Coded;

/* packing.py's block_bytes: the sum over a code's parts of ceil(count * width / 8). */
static int64_t block_bytes(int64_t count, int bits) {
    int64_t bytes = 0;
    for (int width = 8; width; width /= 2)
        if (bits & width) bytes += count / 8 * width + (count % 8 * width + 7) / 8;
    return bytes;
}

static int piece_is_inside(const Coded *all, const Piece *piece) {
    int64_t numel = piece->numel, block = all->block;
    if (!inside(piece->at, numel, all->values_size) || numel > INT64_MAX / 8) return 0;
    int64_t whole = numel / block, rest = numel % block;
    int64_t bytes = (whole ? whole * block_bytes(block, all->bits) : 0) + block_bytes(rest, all->bits);
    return inside(piece->codes, bytes, all->codes_size) && inside(piece->scales, whole + !!rest, all->scales_size);
}

/* One block of codes, for pieces that were looked at; NULL, with an error, where one reaches outside. */
static uint8_t *scratch_for(const Coded *all, const Piece *pieces, Py_ssize_t count) {
    int64_t longest = 1;
    if (count < 0 || all->block < 1 || all->bits < 1 || all->bits > 8) {
        refused("these numbers of pieces, blocks or bits");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!piece_is_inside(all, &pieces[i])) {
            outside("piece", i);
            return NULL;
        }
        if (pieces[i].numel > longest) longest = pieces[i].numel;
    }
    uint8_t *scratch = malloc(smaller((size_t)longest, (size_t)all->block));
    if (!scratch) PyErr_NoMemory();
    return scratch;
}

static PyObject *quantize_all(const Coded *all, const Piece *piece, Py_ssize_t count, const uint64_t *keys,
                              Quantize q) {
    if (q.norm < MAX || q.norm > GIVEN || (q.powers && all->bits < 2)) return refused("this norm or these levels");
    q.scratch = scratch_for(all, piece, count);
    if (!q.scratch) return NULL;
    q.block = (size_t)all->block;
    q.bits = all->bits;
    const float *residual = q.residual;
    float *owed = q.owed;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++, piece++) {
        q.residual = owed ? residual + piece->at : NULL; /* as long as the values */
        q.owed = owed ? owed + piece->at : NULL;
        q.x = (const float *)(uintptr_t)all->values + piece->at;
        q.codes = (uint8_t *)(uintptr_t)all->codes + piece->codes;
        q.scales = (float *)(uintptr_t)all->scales + piece->scales;
        q.numel = (size_t)piece->numel;
        q.first = (uint32_t)piece->first;
        q.key_low = (uint32_t)keys[i];
        q.key_high = (uint32_t)(keys[i] >> 32);
        chosen->quantize(&q);
    }
    Py_END_ALLOW_THREADS
    free(q.scratch);
    Py_RETURN_NONE;
}

static PyObject *dequantize_all(const Coded *all, const Piece *piece, Py_ssize_t count, Dequantize d) {
    if (d.powers && all->bits < 2) return refused("these levels");
    d.scratch = scratch_for(all, piece, count);
    if (!d.scratch) return NULL;
    d.block = (size_t)all->block;
    d.bits = all->bits;
    const float *base = d.base;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++, piece++) {
        d.base = base ? base + piece->at : NULL;
        d.codes = (const uint8_t *)(uintptr_t)all->codes + piece->codes;
        d.scales = (const float *)(uintptr_t)all->scales + piece->scales;
        d.out = (float *)(uintptr_t)all->values + piece->at;
        d.numel = (size_t)piece->numel;
        chosen->dequantize(&d);
    }
    Py_END_ALLOW_THREADS
    free(d.scratch);
    Py_RETURN_NONE;
}

static PyObject *mean_all(const Coded *all, const Piece *piece, Py_ssize_t count, Mean mean) {
    if (mean.each.powers && all->bits < 2) return refused("these levels");
    mean.each.scratch = scratch_for(all, piece, count);
    if (!mean.each.scratch) return NULL;
    mean.each.block = (size_t)all->block;
    mean.each.bits = all->bits;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++, piece++) {
        mean.at = (size_t)piece->at;
        mean.codes = (size_t)piece->codes;
        mean.row = (size_t)piece->scales;
        mean.each.out = (float *)(uintptr_t)all->values + piece->at;
        mean.each.numel = (size_t)piece->numel;
        chosen->mean(&mean);
    }
    Py_END_ALLOW_THREADS
    free(mean.each.scratch);
    Py_RETURN_NONE;
}

#define CODED(all) \
    &(all).values, &(all).codes, &(all).scales, &(all).values_size, &(all).codes_size, &(all).scales_size

static PyObject *py_quantize(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long key;
    Py_ssize_t numel;
    unsigned int first;
    Coded all;
    Quantize q = {0};
    if (!PyArg_ParseTuple(args, "KKK(nnn)nniKIpip", CODED(all), &numel, &all.block, &all.bits, &key, &first,
                          &q.stochastic, &q.norm, &q.powers))
        return NULL;
    Piece piece = {.numel = numel, .first = first};
    uint64_t keys[1] = {key};
    return quantize_all(&all, &piece, 1, keys, q);
}

static PyObject *py_dequantize(PyObject *self, PyObject *args) {
    (void)self;
    Py_ssize_t numel;
    Coded all;
    Dequantize d = {0};
    if (!PyArg_ParseTuple(args, "KKK(nnn)nnipif", CODED(all), &numel, &all.block, &all.bits, &d.powers, &d.sign,
                          &d.times))
        return NULL;
    Piece piece = {.numel = numel};
    return dequantize_all(&all, &piece, 1, d);
}

static PyObject *py_quantize_pieces(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long table, keys, residual, owed;
    Py_ssize_t pieces;
    Coded all;
    Quantize q = {0};
    if (!PyArg_ParseTuple(args, "KKK(nnn)KnKnipip(KK)", CODED(all), &table, &pieces, &keys, &all.block, &all.bits,
                          &q.stochastic, &q.norm, &q.powers, &residual, &owed))
        return NULL;
    q.residual = (const float *)(uintptr_t)residual;
    q.owed = (float *)(uintptr_t)owed;
    return quantize_all(&all, (const Piece *)(uintptr_t)table, pieces, (const uint64_t *)(uintptr_t)keys, q);
}

static PyObject *py_dequantize_pieces(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long table, base;
    Py_ssize_t pieces;
    Coded all;
    Dequantize d = {0};
    if (!PyArg_ParseTuple(args, "KKK(nnn)KnnipifK", CODED(all), &table, &pieces, &all.block, &all.bits, &d.powers,
                          &d.sign, &d.times, &base))
        return NULL;
    d.base = (const float *)(uintptr_t)base; /* as long as the values */
    return dequantize_all(&all, (const Piece *)(uintptr_t)table, pieces, d);
}

static PyObject *py_dequantize_mean(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long sources, table;
    Py_ssize_t count, pieces;
    Coded all = {0};
    Mean mean = {0};
    if (!PyArg_ParseTuple(args, "KKn(nnn)Knnipf", &all.values, &sources, &count, &all.values_size, &all.codes_size,
                          &all.scales_size, &table, &pieces, &all.block, &all.bits, &mean.each.powers,
                          &mean.each.times))
        return NULL;
    if (count < 1) return refused("the mean of nothing");
    mean.sources = (const Source *)(uintptr_t)sources;
    mean.count = (size_t)count;
    return mean_all(&all, (const Piece *)(uintptr_t)table, pieces, mean);
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

/* One number of both sums, as a header holds it. */
uint64_t checksum_of(const uint8_t *data, size_t bytes) {
    Sums sums = chosen->checksum(data, bytes);
    return (uint64_t)sums.weighted << 32 | sums.sum;
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
    Py_ssize_t numel, codes_size;
    unsigned int first;
    if (!PyArg_ParseTuple(args, "KK(nn)KI", &x, &codes, &numel, &codes_size, &key, &first)) return NULL;
    if (!inside(0, numel, codes_size)) return refused("more elements than codes");
    Py_BEGIN_ALLOW_THREADS
    chosen->exponents((const uint32_t *)(uintptr_t)x, (uint8_t *)(uintptr_t)codes, (size_t)numel,
                      first + (uint32_t)key, (uint32_t)(key >> 32));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_scale_by_exponents(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long codes, out;
    Py_ssize_t codes_size, numel;
    if (!PyArg_ParseTuple(args, "KK(nn)", &codes, &out, &codes_size, &numel)) return NULL;
    if (!inside(0, numel, codes_size)) return refused("more elements than codes");
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
    {"quantize", py_quantize, METH_VARARGS,
     "x, codes, scales, sizes of the three, numel, block, bits, key, first, stochastic, norm, powers"},
    {"dequantize", py_dequantize, METH_VARARGS,
     "out, codes, scales, sizes of the three, numel, block, bits, powers, sign, times"},
    {"quantize_pieces", py_quantize_pieces, METH_VARARGS,
     "x, codes, scales, sizes of the three, table, pieces, keys, block, bits, stochastic, norm, powers, (residual, owed) or zeros"},
    {"dequantize_pieces", py_dequantize_pieces, METH_VARARGS,
     "out, codes, scales, sizes of the three, table, pieces, block, bits, powers, sign, times, base or 0"},
    {"dequantize_mean", py_dequantize_mean, METH_VARARGS,
     "out, sources (codes and scales, or values and 0), how many, sizes of values, codes and scales of each, table, "
     "pieces, block, bits, powers, times"},
    {"top_rows", py_top_rows, METH_VARARGS, "x, places, sizes of the two, table, rows"},
    {"write_rows", py_write_rows, METH_VARARGS, "places, codes, sizes of the two, table, rows"},
    {"read_rows", py_read_rows, METH_VARARGS, "places, codes, sizes of the two, table, rows"},
    {"changed_words", py_changed_words, METH_VARARGS, "before, after, places, numel, itemsize, most -> how many"},
    {"fingerprint", py_fingerprint, METH_VARARGS, "words, numel, itemsize, first, seed -> sum"},
    {"move", py_move, METH_VARARGS, "from, to, sizes of the two, table, pieces"},
    {"lowrank_pieces", py_lowrank_pieces, METH_VARARGS,
     "kind, p, q, m, out, table, pieces, subtract, sizes of the four"},
    {"all_finite", py_all_finite, METH_VARARGS, "x, numel, exponent mask -> bool"},
    {"checksum", py_checksum, METH_VARARGS, "data, bytes -> (sum, weighted sum)"},
    {"write_header", py_write_header, METH_VARARGS,
     "wire, bytes behind the header, rank, fingerprint, exchange, finite"},
    {"read_header", py_read_header, METH_VARARGS,
     "wire, bytes behind the header, rank, fingerprint, exchange -> finite, None where it is not as agreed"},
    {"permuted", py_permuted, METH_VARARGS, "places, count, numel, bits, keys"},
    {"exponents", py_exponents, METH_VARARGS, "x, codes, sizes of the two, key, first"},
    {"scale_by_exponents", py_scale_by_exponents, METH_VARARGS, "codes, out, sizes of the two"},
    {"entropy_encode", py_entropy_encode, METH_VARARGS,
     "data, out, lengths, periods, sizes of the four, first block, blocks"},
    {"entropy_decode", py_entropy_decode, METH_VARARGS, "coded, out, sizes of the two, first block, blocks -> bool"},
    {"minifloat_encode", py_minifloat_encode, METH_VARARGS,
     "(x, codes, blocks' scales, groups' scales), sizes of the four, table, spans, block, "
     "(width, mantissa, bias, largest, infinity, nan, finite), (rule, blocks of a group, least, up), "
     "(keys, how many), (keys of signs, how many)"},
    {"minifloat_decode", py_minifloat_decode, METH_VARARGS,
     "(out, codes, blocks' scales, groups' scales), sizes of the four, table, spans, block, "
     "(width, mantissa, bias, largest, infinity, nan, finite), (rule, blocks of a group, least, up), "
     "(keys of signs, how many), sign"},
    {"mix", py_mix, METH_VARARGS,
     "out, models, weights of all but the first, how many, (first element, end, size), (x, public, beyond, gamma) or zeros"},
    {"pack_signs", py_pack_signs, METH_VARARGS, "x, words, sizes of the two, samples, channels, places, plain"},
    {"binary_conv", py_binary_conv, METH_VARARGS,
     "x, weight, scale, bias, out, sizes of the five, samples, (channels, height, width), "
     "(outputs, kh, kw, stride, padding), (out_height, out_width), rows, plain"},
    {"lowrank", py_lowrank, METH_VARARGS,
     "rows, columns or outer; p, q, m, out, a, b, rank, p_stride, stride, out_stride, subtract, "
     "sizes of the four"},
    {"dct", py_dct, METH_VARARGS,
     "kind (the largest, put, all), x, values, places, sizes of the three, table, lines, factors, how many, sign"},
    {"encode_two_means", py_encode_two_means, METH_VARARGS,
     "x, codes, scales, sizes of the three, table, lines, first value, values"},
    {"put_two_means", py_put_two_means, METH_VARARGS, "out, codes, scales, sizes of the three, table, lines, sign"},
    {"grid_encode", py_grid_encode, METH_VARARGS, "x, codes, sizes of the two, table, lines, keys, spacing, bits"},
    {"grid_decode", py_grid_decode, METH_VARARGS, "out, codes, sizes of the two, spacing, bits, sign"},
    {"pack_integers", py_pack_integers, METH_VARARGS, "integers, codes, sizes of the two, bits, whether to unpack"},
    {"subspace_project", py_subspace_project, METH_VARARGS,
     "x, 0, coefficients, table, lines, addresses of bases, of offsets, sizes of x and coefficients"},
    {"subspace_restore", py_subspace_restore, METH_VARARGS,
     "coefficients, mean, out, table, lines, addresses of bases, 0, sizes of out and coefficients"},
    {"squares", py_squares, METH_VARARGS, "x, mean, out, table, pieces, size of x"},
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
