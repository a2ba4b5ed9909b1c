/* Products of a large matrix M (a x b) with a few vectors, each at the speed at which M is read or written.
 *
 * Factors lie as rows: p is [rank][a], q is [rank][b]. Every sum is taken in one order, whatever the instruction
 * set, the alignment and the number of threads: the same bits everywhere.
 */
#include <stdint.h>
#include <string.h>

#include "_lowrank.h"

#define BODY static inline __attribute__((always_inline))
#define LANES 16
#define ROWS 4    /* of M at a time, so that a factor is loaded once for all of them */
#define FACTORS 4 /* rows of a factor at a time: their sums stay in registers */
#define MOST 8    /* the largest rank, FEW in lowrank.py; more is a matter for BLAS */
#define SPAN 2048 /* columns at a time, so that a factor's piece stays in the first cache */

typedef float Lanes __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *p, *q, *m; /* as far as they are given */
    float *out;
    size_t a, b, rank;
    size_t p_stride, stride, out_stride; /* from a row of p, of M, of out to the next */
    int subtract;
} Product;

typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define load(from) ((Lanes) * (const Anywhere *)(from)) /* no functions: they would pass vectors by value */
#define store(to, lanes) (*(Anywhere *)(to) = (lanes))

BODY float sum_of(const float *summands) {
    float lanes[LANES];
    memcpy(lanes, summands, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* out[k][i] = sum_j q[k][j] m[i][j]: lane l adds the columns j = l mod LANES; the rest comes last. */
BODY void dots(const Product *x, size_t i, size_t k, const size_t rows, const size_t factors) {
    const float *m = x->m + i * x->stride, *q = x->q + k * x->b;
    const size_t b = x->b, stride = x->stride;
    Lanes sums[2][FACTORS];
    memset(sums, 0, sizeof sums);
    size_t j = 0;
    for (; j + LANES <= b; j += LANES)
        for (size_t f = 0; f < factors; f++) {
            Lanes factor = load(q + f * b + j);
            for (size_t t = 0; t < rows; t++) sums[t][f] += factor * load(m + t * stride + j);
        }
    for (size_t t = 0; t < rows; t++)
        for (size_t f = 0; f < factors; f++) {
            float sum = sum_of((const float *)&sums[t][f]);
            for (size_t rest = j; rest < b; rest++) sum += q[f * b + rest] * m[t * stride + rest];
            x->out[(k + f) * x->out_stride + i + t] = sum;
        }
}

BODY void times_rows_body(const Product *x) {
    for (size_t i = 0; i < x->a; i += 2) {
        size_t rows = x->a - i < 2 ? 1 : 2, k = 0;
        for (; k + FACTORS <= x->rank; k += FACTORS)
            if (rows == 2) dots(x, i, k, 2, FACTORS);
            else dots(x, i, k, 1, FACTORS);
        for (; k < x->rank; k++)
            if (rows == 2) dots(x, i, k, 2, 1);
            else dots(x, i, k, 1, 1);
    }
}

/* out[k][j] += sum over a few rows i of p[k][i] m[i][j], row after row, for the columns from j to end. */
BODY void add_rows(const Product *x, size_t i, const size_t rows, size_t k, const size_t factors, size_t j,
                   size_t end) {
    const float *m = x->m + i * x->stride;
    const size_t stride = x->stride;
    float *out = x->out + k * x->out_stride, p[FACTORS][ROWS];
    for (size_t f = 0; f < factors; f++)
        for (size_t t = 0; t < rows; t++) p[f][t] = x->p[(k + f) * x->p_stride + i + t];
    for (; j + LANES <= end; j += LANES) {
        Lanes row[ROWS];
        for (size_t t = 0; t < rows; t++) row[t] = load(m + t * stride + j);
        for (size_t f = 0; f < factors; f++) {
            Lanes sum = load(out + f * x->out_stride + j);
            for (size_t t = 0; t < rows; t++) sum += p[f][t] * row[t];
            store(out + f * x->out_stride + j, sum);
        }
    }
    for (; j < end; j++)
        for (size_t f = 0; f < factors; f++) {
            float sum = out[f * x->out_stride + j];
            for (size_t t = 0; t < rows; t++) sum += p[f][t] * m[t * stride + j];
            out[f * x->out_stride + j] = sum;
        }
}

BODY void add_rows_of_all(const Product *x, size_t i, const size_t rows, size_t j, size_t end) {
    size_t k = 0;
    for (; k + FACTORS <= x->rank; k += FACTORS) add_rows(x, i, rows, k, FACTORS, j, end);
    for (; k < x->rank; k++) add_rows(x, i, rows, k, 1, j, end);
}

BODY void times_columns_body(const Product *x) {
    for (size_t k = 0; k < x->rank; k++) memset(x->out + k * x->out_stride, 0, sizeof(float) * x->b);
    for (size_t j = 0; j < x->b; j += SPAN) {
        size_t end = x->b - j < SPAN ? x->b : j + SPAN, i = 0;
        for (; i + ROWS <= x->a; i += ROWS) add_rows_of_all(x, i, ROWS, j, end);
        for (; i < x->a; i++) add_rows_of_all(x, i, 1, j, end);
    }
}

/* out[i][j] = sum_k p[k][i] q[k][j], or out[i][j] -= it, for a few rows and the columns from j to end. */
BODY void outer_rows(const Product *x, size_t i, const size_t rows, const size_t rank, size_t j, size_t end,
                     const int subtract) {
    const float *q = x->q;
    const size_t b = x->b, stride = x->out_stride;
    float *out = x->out + i * stride, p[ROWS][MOST] = {0};
    for (size_t t = 0; t < rows; t++)
        for (size_t k = 0; k < rank; k++) p[t][k] = x->p[k * x->p_stride + i + t];
    for (; j + LANES <= end; j += LANES) {
        Lanes sum[ROWS] = {0};
        for (size_t k = 0; k < rank; k++) {
            Lanes factor = load(q + k * b + j);
            for (size_t t = 0; t < rows; t++) sum[t] += p[t][k] * factor;
        }
        for (size_t t = 0; t < rows; t++) {
            float *to = out + t * stride + j;
            store(to, subtract ? load(to) - sum[t] : sum[t]);
        }
    }
    for (; j < end; j++)
        for (size_t t = 0; t < rows; t++) {
            float *to = out + t * stride + j, sum = 0.0f;
            for (size_t k = 0; k < rank; k++) sum += p[t][k] * q[k * b + j];
            *to = subtract ? *to - sum : sum;
        }
}

BODY void outer_of(const Product *x, const size_t rank, const int subtract) {
    for (size_t j = 0; j < x->b; j += SPAN) {
        size_t end = x->b - j < SPAN ? x->b : j + SPAN, i = 0;
        for (; i + ROWS <= x->a; i += ROWS) outer_rows(x, i, ROWS, rank, j, end, subtract);
        for (; i < x->a; i++) outer_rows(x, i, 1, rank, j, end, subtract);
    }
}

#define OUTER(rank) \
    if (x->subtract) outer_of(x, rank, 1); \
    else outer_of(x, rank, 0)

BODY void outer_body(const Product *x) { /* the usual ranks unrolled */
    switch (x->rank) {
    case 1: OUTER(1); break;
    case 2: OUTER(2); break;
    case 4: OUTER(4); break;
    default: OUTER(x->rank);
    }
}

typedef struct {
    const char *name;
    void (*times_rows)(const Product *), (*times_columns)(const Product *), (*outer)(const Product *);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void times_rows_##name(const Product *x) { times_rows_body(x); } \
    TARGET static void times_columns_##name(const Product *x) { times_columns_body(x); } \
    TARGET static void outer_##name(const Product *x) { outer_body(x); } \
    static const Variant name##_variant = {#name, times_rows_##name, times_columns_##name, outer_##name};

VARIANT(generic, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx2,avx512f"))))
#endif

static const Variant *serving(const char *name) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (!strcmp(name, "avx512")) return &avx512_variant;
    if (!strcmp(name, "avx2")) return &avx2_variant;
#endif
    (void)name;
    return &generic_variant;
}

/* How many elements `rows` rows of `columns`, `stride` apart, reach over; 0 for none, -1 for what cannot be. */
static Py_ssize_t reach(Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride) {
    Py_ssize_t end;
    if (rows < 0 || columns < 0 || (rows > 1 && stride < columns)) return -1;
    if (!rows || !columns) return 0;
    if (__builtin_mul_overflow(rows - 1, stride, &end) || __builtin_add_overflow(end, columns, &end)) return -1;
    return end;
}

static int fits(Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride, Py_ssize_t given) {
    Py_ssize_t needed = reach(rows, columns, stride);
    return needed >= 0 && needed <= given;
}

typedef void (*Multiply)(const Product *);

static Multiply multiply(const char *kind) {
    const Variant *variant = serving(instruction_set());
    return !strcmp(kind, "rows")      ? variant->times_rows
           : !strcmp(kind, "columns") ? variant->times_columns
                                      : variant->outer;
}

PyObject *py_lowrank(PyObject *self, PyObject *args) {
    (void)self;
    const char *kind;
    unsigned long long p, q, m, out;
    Py_ssize_t a, b, rank, p_stride, stride, out_stride, p_size, q_size, m_size, out_size;
    int subtract;
    if (!PyArg_ParseTuple(args, "sKKKKnnnnnnp(nnnn)", &kind, &p, &q, &m, &out, &a, &b, &rank, &p_stride, &stride,
                          &out_stride, &subtract, &p_size, &q_size, &m_size, &out_size))
        return NULL;
    int rows = !strcmp(kind, "rows"), columns = !strcmp(kind, "columns"), outer = !strcmp(kind, "outer");
    if (!rows && !columns && !outer) return PyErr_Format(PyExc_ValueError, "there is no product named %s", kind);
    if ((outer && rank > MOST) || (!rows && !fits(rank, a, p_stride, p_size)) ||
        (!columns && !fits(rank, b, b, q_size)) || (!outer && !fits(a, b, stride, m_size)) ||
        !fits(outer ? a : rank, outer || columns ? b : a, out_stride, out_size))
        return PyErr_Format(PyExc_ValueError, "a product of rank %zd with %zd x %zd reaches outside its buffers",
                            rank, a, b);
    Product x = {
        .p = (const float *)(uintptr_t)p, .q = (const float *)(uintptr_t)q, .m = (const float *)(uintptr_t)m,
        .out = (float *)(uintptr_t)out, .a = (size_t)a, .b = (size_t)b, .rank = (size_t)rank,
        .p_stride = (size_t)p_stride, .stride = (size_t)stride, .out_stride = (size_t)out_stride,
        .subtract = subtract};
    Multiply run = multiply(kind);
    Py_BEGIN_ALLOW_THREADS
    run(&x);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Many matrices in one call. A line of the table: rank, a, b, and where p, q, m and out begin in their buffers. */
PyObject *py_lowrank_pieces(PyObject *self, PyObject *args) {
    (void)self;
    const char *kind;
    unsigned long long p, q, m, out, table;
    Py_ssize_t pieces;
    int subtract;
    if (!PyArg_ParseTuple(args, "sKKKKKnp", &kind, &p, &q, &m, &out, &table, &pieces, &subtract)) return NULL;
    Multiply run = multiply(kind);
    int outer = !strcmp(kind, "outer"), rows = !strcmp(kind, "rows");
    Py_BEGIN_ALLOW_THREADS
    const int64_t *line = (const int64_t *)(uintptr_t)table;
    for (Py_ssize_t i = 0; i < pieces; i++, line += 7) {
        size_t a = (size_t)line[1], b = (size_t)line[2];
        Product x = {
            .p = (const float *)(uintptr_t)p + line[3], .q = (const float *)(uintptr_t)q + line[4],
            .m = (const float *)(uintptr_t)m + line[5], .out = (float *)(uintptr_t)out + line[6],
            .a = a, .b = b, .rank = (size_t)line[0], .p_stride = a, .stride = b,
            .out_stride = outer || !rows ? b : a, .subtract = subtract};
        run(&x);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
