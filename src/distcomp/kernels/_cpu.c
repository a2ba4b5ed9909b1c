/* CPU twins of reference.py, bit for bit. Plain C, no torch headers: Python passes addresses and sizes.
 *
 * Each function handles one contiguous run of blocks with the interpreter lock released; Python splits a large
 * tensor between threads on block boundaries. The loops are written so that a compiler vectorizes them; every body
 * is compiled once for each instruction set below and the best one is picked when the module loads. Built with
 * -ffp-contract=off: a fused multiply-add would give other bits on machines that have it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little-endian; on this machine distcomp uses its plain-torch reference"
#endif

#define LANES 16
#define SMALLEST_SCALE 0x1p-120f
#define BODY static inline __attribute__((always_inline))

typedef struct {
    const float *x;
    uint8_t *codes;
    float *scales;
    uint8_t *scratch; /* one block of unpacked codes */
    size_t numel, block;
    int bits, stochastic, given;
    float s; /* levels: kept here because a compiler that knows the constant splits the loops by value and loses SIMD */
    uint32_t key_low, key_high, first;
} Quantize;

typedef struct {
    const uint8_t *codes;
    const float *scales;
    float *out;
    uint8_t *scratch;
    size_t numel, block;
    int bits, sign;
    float times;
} Dequantize;

typedef struct {
    uint32_t sum, weighted;
} Sums;

BODY uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

BODY float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

BODY size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

BODY float levels(int bits) { return bits > 1 ? (float)((1 << (bits - 1)) - 1) : 1.0f; }

/* lowbias32 with a 64-bit key, the low half already added to the counter; its upper 24 bits */
BODY float uniform_24(uint32_t x, uint32_t key_high) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= key_high;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return (float)(int32_t)(x >> 8);
}

/* The comparisons are so turned that a NaN becomes s. */
BODY float clamped(float y, float s) {
    y = y < s ? y : s;
    return y > -s ? y : -s;
}

/* p + u with one rounding: u = u24 / 2^24 is exact, so fusing changes no bit where the machine can. */
BODY float plus_scaled(float p, float u24, int modern) {
    return modern ? __builtin_fmaf(u24, 0x1p-24f, p) : p + u24 * 0x1p-24f;
}

BODY float floored(float y, int modern) {
    if (modern) return __builtin_floorf(y);
    float t = (float)(int32_t)y;
    return t > y ? t - 1.0f : t;
}

/* Half to even, for |y| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits. */
BODY int32_t rounded(float y) { return (int32_t)(bits_of(y + 0x1.8p23f) - 0x4b400000u); }

BODY float block_max(const float *x, size_t m) {
    int32_t largest = 0;
    for (size_t j = 0; j < m; j++) {
        int32_t magnitude = (int32_t)(bits_of(x[j]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = float_of((uint32_t)largest);
    return scale < SMALLEST_SCALE ? 0.0f : scale;
}

BODY float block_mean(const float *x, size_t m) {
    float lane[LANES] = {0};
    size_t whole = m - m % LANES;
    for (size_t j = 0; j < whole; j += LANES)
        for (size_t i = 0; i < LANES; i++) lane[i] += float_of(bits_of(x[j + i]) & 0x7fffffffu);
    for (size_t j = whole; j < m; j++) lane[j - whole] += float_of(bits_of(x[j]) & 0x7fffffffu);
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0] / (float)m;
}

BODY void sign_codes(const float *restrict x, uint8_t *restrict code, size_t m) {
    for (size_t j = 0; j < m; j++) code[j] = x[j] >= 0.0f;
}

BODY void stochastic_codes(
    const float *restrict x, uint8_t *restrict code, size_t m, float inverse, const Quantize *q, uint32_t counter, int modern) {
    uint32_t key_high = q->key_high;
    float s = q->s, to_low_byte = 0x1.8p23f + s; 
    counter += q->key_low;
    for (size_t j = 0; j < m; j++) {
        float y = plus_scaled(x[j] * inverse, uniform_24(counter + (uint32_t)j, key_high), modern);
        code[j] = (uint8_t)bits_of(floored(clamped(y, s), modern) + to_low_byte);
    }
}

BODY void nearest_codes(const float *restrict x, uint8_t *restrict code, size_t m, float inverse, float s) {
    for (size_t j = 0; j < m; j++) code[j] = (uint8_t)(rounded(clamped(x[j] * inverse, s)) + (int32_t)s);
}

/* One part of the planar layout: `width` bits at `shift` of each code; returns the bytes written. */
BODY size_t pack_part(const uint8_t *restrict code, uint8_t *restrict out, size_t m, int width, int shift) {
    size_t planes = (size_t)(8 / width), height = (m + planes - 1) / planes;
    uint8_t mask = (uint8_t)((1 << width) - 1);
    for (size_t p = 0; p < planes; p++) {
        size_t start = smaller(p * height, m), count = smaller(height, m - start);
        const uint8_t *restrict from = code + start;
        for (size_t j = 0; j < count; j++) {
            uint8_t part = (uint8_t)(((from[j] >> shift) & mask) << (p * (size_t)width));
            out[j] = p ? out[j] | part : part;
        }
    }
    return height;
}

BODY size_t unpack_part(const uint8_t *restrict in, uint8_t *restrict code, size_t m, int width, int shift) {
    size_t planes = (size_t)(8 / width), height = (m + planes - 1) / planes;
    uint8_t mask = (uint8_t)((1 << width) - 1);
    for (size_t p = 0; p < planes; p++) {
        size_t start = smaller(p * height, m), count = smaller(height, m - start);
        uint8_t *restrict to = code + start;
        for (size_t j = 0; j < count; j++) {
            uint8_t part = (uint8_t)(((in[j] >> (p * (size_t)width)) & mask) << shift);
            to[j] = shift ? to[j] | part : part;
        }
    }
    return height;
}

/* A code of `bits` bits is laid down as its parts of 8, 4, 2 and 1 bits, low bits first. */
BODY size_t pack(const uint8_t *code, uint8_t *out, size_t m, int bits) {
    size_t at = 0;
    int shift = 0;
    for (int width = 8; width > 0; width /= 2)
        if (bits & width) {
            at += pack_part(code, out + at, m, width, shift);
            shift += width;
        }
    return at;
}

BODY size_t unpack(const uint8_t *in, uint8_t *code, size_t m, int bits) {
    size_t at = 0;
    int shift = 0;
    for (int width = 8; width > 0; width /= 2)
        if (bits & width) {
            at += unpack_part(in + at, code, m, width, shift);
            shift += width;
        }
    return at;
}

BODY void quantize_bits(const Quantize *q, int bits, int stochastic, int modern) {
    uint8_t *out = q->codes;
    float s = q->s;
    for (size_t start = 0, row = 0; start < q->numel; start += q->block, row++) {
        const float *x = q->x + start;
        size_t m = smaller(q->block, q->numel - start);
        if (!q->given) q->scales[row] = bits == 1 ? block_mean(x, m) : block_max(x, m);
        if (bits == 1) {
            sign_codes(x, q->scratch, m);
        } else {
            float scale = q->scales[row], inverse = scale < SMALLEST_SCALE ? 0.0f : s / scale;
            uint32_t first = q->first + (uint32_t)start;
            if (stochastic)
                stochastic_codes(x, q->scratch, m, inverse, q, first, modern);
            else
                nearest_codes(x, q->scratch, m, inverse, s);
        }
        out += pack(q->scratch, out, m, bits);
    }
}

BODY void dequantize_bits(const Dequantize *d, int bits, int sign) {
    const uint8_t *in = d->codes;
    float s = levels(bits), times = d->times;
    int32_t step = bits == 1 ? 2 : 1, zero = (int32_t)s;
    for (size_t start = 0, row = 0; start < d->numel; start += d->block, row++) {
        size_t m = smaller(d->block, d->numel - start);
        const uint8_t *restrict code = d->scratch;
        float *restrict out = d->out + start;
        float unit = d->scales[row] / s;
        in += unpack(in, d->scratch, m, bits);
        for (size_t j = 0; j < m; j++) {
            float value = (float)(step * (int32_t)code[j] - zero) * unit;
            out[j] = (sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value) * times;
        }
    }
}

#define EACH_WIDTH(bits, CASE) \
    switch (bits) { \
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) \
    }

BODY void quantize_body(const Quantize *q, int modern) {
#define CASE(b) \
    case b: \
        if (q->stochastic) quantize_bits(q, b, 1, modern); \
        else quantize_bits(q, b, 0, modern); \
        break;
    EACH_WIDTH(q->bits, CASE)
#undef CASE
}

BODY void dequantize_body(const Dequantize *d) {
#define CASE(b) \
    case b: \
        if (d->sign > 0) dequantize_bits(d, b, 1); \
        else if (d->sign < 0) dequantize_bits(d, b, -1); \
        else dequantize_bits(d, b, 0); \
        break;
    EACH_WIDTH(d->bits, CASE)
#undef CASE
}

/* All exponent bits set means inf or NaN. Looked at in stretches, so that a bad value ends the search early. */
#define STRETCH 4096

BODY int all_finite_32_body(const uint32_t *x, size_t numel) {
    for (size_t start = 0; start < numel; start += STRETCH) {
        size_t end = smaller(start + STRETCH, numel);
        uint32_t bad = 0;
        for (size_t j = start; j < end; j++) bad |= (x[j] & 0x7f800000u) == 0x7f800000u;
        if (bad) return 0;
    }
    return 1;
}

BODY int all_finite_16_body(const uint16_t *x, size_t numel, uint16_t exponent) {
    for (size_t start = 0; start < numel; start += STRETCH) {
        size_t end = smaller(start + STRETCH, numel);
        uint16_t bad = 0;
        for (size_t j = start; j < end; j++) bad |= (x[j] & exponent) == exponent;
        if (bad) return 0;
    }
    return 1;
}

BODY Sums checksum_body(const uint8_t *data, size_t bytes) {
    Sums sums = {0, 0};
    size_t words = bytes / 4;
    for (size_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, data + 4 * i, 4);
        sums.sum += word;
        sums.weighted += ((uint32_t)i + 1) * word;
    }
    if (bytes % 4) {
        uint32_t word = 0;
        memcpy(&word, data + 4 * words, bytes % 4);
        sums.sum += word;
        sums.weighted += ((uint32_t)words + 1) * word;
    }
    return sums;
}

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
    TARGET static int all_finite_16_##name(const uint16_t *x, size_t n, uint16_t exponent) { \
        return all_finite_16_body(x, n, exponent); \
    } \
    TARGET static Sums checksum_##name(const uint8_t *data, size_t n) { return checksum_body(data, n); } \
    static const Variant name##_variant = {#name,          quantize_##name,      dequantize_##name, \
                                           all_finite_32_##name, all_finite_16_##name, checksum_##name};

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
    q.s = levels(q.bits);
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
    if (!PyArg_ParseTuple(args, "KKKnniif", &codes, &scales, &out, &numel, &block, &d.bits, &d.sign, &d.times))
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
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_cpu", .m_doc = "CPU kernels of distcomp", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__cpu(void) {
    chosen = variant_named(NULL);
    return PyModule_Create(&module);
}
