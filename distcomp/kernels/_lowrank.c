/* Products of a large matrix M (a x b) with a few vectors, each at the speed at which M is read or written.
 *
 * Factors lie as rows: p is [rank][a], q is [rank][b]. Every sum is taken in one order, whatever the instruction
 * set, the alignment and the number of threads: the same bits everywhere.
 */
#include <stdint.h>
#include <string.h>

#include "_inside.h"
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
    const float *residual, *given; /* where there is a residual, M is what is given and it, */
    float *sum;                    /* and is left here, which is m, too */
} Product;

typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define load(from) ((Lanes) * (const Anywhere *)(from)) /* no functions: they would pass vectors by value */
#define store(to, lanes) (*(Anywhere *)(to) = (lanes))

typedef float Eight __attribute__((vector_size(32)));
typedef float EightAnywhere __attribute__((vector_size(32), aligned(4), may_alias));

#define load_eight(from) ((Eight) * (const EightAnywhere *)(from))

#define BLOCK 16 /* sums that are added up together */

typedef struct { /* of LANES: a register each, where Lanes would lie in memory */
    Eight low, high;
} Halves;

/* Lanes of two vectors, side by side: which of `left`, then which of `right`, from 8 on. */
#define lanes_of(left, right, ...) __builtin_shuffle(left, right, (Index){__VA_ARGS__})
typedef int Index __attribute__((vector_size(32)));

/* Each of the sums' lanes added up, the upper half onto the lower one until there is one: all of a block at once,
 * two vectors becoming one at each halving. */
BODY void add_up(const Halves *sums, float *totals) {
    Eight eight[BLOCK], four[BLOCK / 2], two[BLOCK / 4];
    for (size_t s = 0; s < BLOCK; s++) eight[s] = sums[s].low + sums[s].high;
    for (size_t s = 0; s < BLOCK / 2; s++) /* of 2s, then of 2s + 1 */
        four[s] = lanes_of(eight[2 * s], eight[2 * s + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
                  lanes_of(eight[2 * s], eight[2 * s + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    for (size_t s = 0; s < BLOCK / 4; s++) /* of 4s, 4s + 2, 4s + 1, 4s + 3 */
        two[s] = lanes_of(four[2 * s], four[2 * s + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                 lanes_of(four[2 * s], four[2 * s + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    for (size_t s = 0; s < BLOCK / 8; s++) {
        Eight one = lanes_of(two[2 * s], two[2 * s + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
                    lanes_of(two[2 * s], two[2 * s + 1], 1, 3, 9, 11, 5, 7, 13, 15);
        Eight ordered = lanes_of(one, one, 0, 4, 1, 5, 2, 6, 3, 7);
        memcpy(totals + 8 * s, &ordered, sizeof ordered);
    }
}

/* Of M where there is a residual: made, for up to two rows and the columns from j to end. */
BODY void add_residual(const Product *x, size_t i, const size_t rows, size_t j, size_t end) {
    for (size_t t = 0; t < rows; t++)
        for (size_t c = (i + t) * x->stride + j; c < (i + t) * x->stride + end; c++)
            x->sum[c] = x->given[c] + x->residual[c];
}

#define sum_of_eight(x, at) /* of M, left where it belongs */ \
    ((Eight)(*(EightAnywhere *)((x)->sum + (at)) = \
                 load_eight((x)->given + (at)) + load_eight((x)->residual + (at))))

/* sums[t * per_row + f][l] = sum of q[k + f][j] m[i + t][j] over the columns j = l mod LANES up to the last whole
 * LANES: few enough of them that they stay in registers. `adding`: M is made by the way. */
BODY void accumulate(const Product *x, size_t i, size_t k, const size_t rows, const size_t factors,
                     const size_t per_row, const int adding, Halves *sums) {
    const float *m = x->m + i * x->stride, *q = x->q + k * x->b;
    Eight low[2][2] = {0}, high[2][2] = {0};
    for (size_t j = 0; j + LANES <= x->b; j += LANES) {
        Eight row_low[2], row_high[2];
        for (size_t t = 0; t < rows; t++) {
            size_t at = t * x->stride + j, in = i * x->stride + at;
            row_low[t] = adding ? sum_of_eight(x, in) : load_eight(m + at);
            row_high[t] = adding ? sum_of_eight(x, in + 8) : load_eight(m + at + 8);
        }
        for (size_t f = 0; f < factors; f++) {
            Eight factor_low = load_eight(q + f * x->b + j), factor_high = load_eight(q + f * x->b + j + 8);
            for (size_t t = 0; t < rows; t++) {
                low[t][f] += factor_low * row_low[t];
                high[t][f] += factor_high * row_high[t];
            }
        }
    }
    if (adding) add_residual(x, i, rows, x->b - x->b % LANES, x->b);
    for (size_t t = 0; t < rows; t++)
        for (size_t f = 0; f < factors; f++) sums[t * per_row + f] = (Halves){low[t][f], high[t][f]};
}

#define ACCUMULATE(adding) \
    if (one && last) accumulate(x, i + t, k + f, 1, 1, factors, adding, at); \
    else if (one) accumulate(x, i + t, k + f, 2, 1, factors, adding, at); \
    else if (last) accumulate(x, i + t, k + f, 1, 2, factors, adding, at); \
    else accumulate(x, i + t, k + f, 2, 2, factors, adding, at)

/* out[k + f][i + t] = sum_j q[k + f][j] m[i + t][j] for up to BLOCK / factors rows; the last columns, too few for
 * LANES, are added last. */
BODY void dots(const Product *x, size_t i, size_t k, size_t rows, const size_t factors) {
    const float *m = x->m + i * x->stride, *q = x->q + k * x->b;
    Halves sums[BLOCK];
    float totals[BLOCK];
    if (rows * factors < BLOCK) memset(sums, 0, sizeof sums);
    for (size_t t = 0; t < rows; t += 2) {
        for (size_t f = 0; f < factors; f += 2) {
            Halves *at = sums + t * factors + f;
            const int one = factors - f == 1, last = rows - t == 1;
            if (x->residual && k + f == 0) { ACCUMULATE(1); } /* M is not there yet */
            else { ACCUMULATE(0); }
        }
    }
    add_up(sums, totals);
    for (size_t t = 0; t < rows; t++)
        for (size_t f = 0; f < factors; f++) {
            float sum = totals[t * factors + f];
            for (size_t rest = x->b - x->b % LANES; rest < x->b; rest++)
                sum += q[f * x->b + rest] * m[t * x->stride + rest];
            x->out[(k + f) * x->out_stride + i + t] = sum;
        }
}

/* The rows from i to end with `factors` of the factor's rows, from k on. */
BODY void dots_of_all(const Product *x, size_t i, size_t end, size_t k, const size_t factors) {
    for (; i + BLOCK / factors <= end; i += BLOCK / factors) dots(x, i, k, BLOCK / factors, factors);
    if (i < end) dots(x, i, k, end - i, factors);
}

/* Some rows with all of the factor's: what is read of M once is still near when it is read again. */
BODY void times_some_rows(const Product *x, size_t i, size_t end) {
    size_t k = 0;
    for (; k + FACTORS <= x->rank; k += FACTORS) dots_of_all(x, i, end, k, FACTORS);
    if (x->rank - k == 3) dots_of_all(x, i, end, k, 3);
    else if (x->rank - k == 2) dots_of_all(x, i, end, k, 2);
    else if (k < x->rank) dots_of_all(x, i, end, k, 1);
}

BODY void times_rows_body(const Product *x) {
    for (size_t i = 0; i < x->a; i += BLOCK) times_some_rows(x, i, x->a - i < BLOCK ? x->a : i + BLOCK);
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
    if (x->rank - k == 3) add_rows(x, i, rows, k, 3, j, end);
    else if (x->rank - k == 2) add_rows(x, i, rows, k, 2, j, end);
    else if (k < x->rank) add_rows(x, i, rows, k, 1, j, end);
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
    case 3: OUTER(3); break;
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

#define AVX512 "avx2,avx512f"
#include "_variants.h"

/* Whether `rows` rows of `columns`, `stride` apart, lie in the `size` elements from their first on. */
static int rows_are_inside(Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride, Py_ssize_t size) {
    Py_ssize_t last;
    if (rows < 0 || columns < 0 || size < 0 || (rows > 1 && stride < columns)) return 0;
    if (!rows || !columns) return 1;
    return !__builtin_mul_overflow(rows - 1, stride, &last) && inside(last, columns, size);
}

typedef void (*Multiply)(const Product *);

/* A kind of product: what does it, and which of p, q and m it reads. */
typedef struct {
    Multiply run;
    int p, q, m;
} Kind;

static int kind_named(const char *name, Kind *kind) {
    const Variant *variant = serving(instruction_set());
    if (!strcmp(name, "rows")) *kind = (Kind){variant->times_rows, 0, 1, 1};
    else if (!strcmp(name, "columns")) *kind = (Kind){variant->times_columns, 1, 0, 1};
    else if (!strcmp(name, "outer")) *kind = (Kind){variant->outer, 1, 1, 0};
    else {
        PyErr_Format(PyExc_ValueError, "there is no product named %s", name);
        return 0;
    }
    return 1;
}

/* How many elements p, q, m and out have from where a product begins in them. */
typedef struct {
    Py_ssize_t p, q, m, out;
} Sizes;

/* A product of nothing is not run: a rank of 2^62 with empty factors has no bytes, but takes for ever. */
static void run_product(const Kind *kind, const Product *x) {
    if (kind->m ? x->rank && (kind->p ? x->b : x->a) : x->a && x->b) kind->run(x);
}

static int product_is_inside(const Kind *kind, Py_ssize_t a, Py_ssize_t b, Py_ssize_t rank, Py_ssize_t p_stride,
                             Py_ssize_t stride, Py_ssize_t out_stride, Sizes sizes) {
    Py_ssize_t out_rows = kind->m ? rank : a, out_columns = kind->m && !kind->p ? a : b;
    return (kind->m || rank <= MOST) && a >= 0 && b >= 0 && rank >= 0 &&
           (!kind->p || rows_are_inside(rank, a, p_stride, sizes.p)) &&
           (!kind->q || rows_are_inside(rank, b, b, sizes.q)) &&
           (!kind->m || rows_are_inside(a, b, stride, sizes.m)) &&
           rows_are_inside(out_rows, out_columns, out_stride, sizes.out);
}

PyObject *py_lowrank(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    unsigned long long p, q, m, out;
    Py_ssize_t a, b, rank, p_stride, stride, out_stride;
    unsigned long long residual = 0, sum = 0; /* as long as m */
    int subtract;
    Kind kind;
    Sizes sizes;
    if (!PyArg_ParseTuple(args, "sKKKKnnnnnnp(nnnn)|(KK)", &name, &p, &q, &m, &out, &a, &b, &rank, &p_stride,
                          &stride, &out_stride, &subtract, &sizes.p, &sizes.q, &sizes.m, &sizes.out, &residual,
                          &sum) ||
        !kind_named(name, &kind))
        return NULL;
    if (!product_is_inside(&kind, a, b, rank, p_stride, stride, out_stride, sizes))
        return PyErr_Format(PyExc_ValueError, "a product of rank %zd with %zd x %zd reaches outside its buffers",
                            rank, a, b);
    Product x = {
        .p = (const float *)(uintptr_t)p, .q = (const float *)(uintptr_t)q,
        .m = (const float *)(uintptr_t)(residual ? sum : m), .given = (const float *)(uintptr_t)m,
        .out = (float *)(uintptr_t)out, .a = (size_t)a, .b = (size_t)b, .rank = (size_t)rank,
        .p_stride = (size_t)p_stride, .stride = (size_t)stride, .out_stride = (size_t)out_stride,
        .subtract = subtract, .residual = (const float *)(uintptr_t)residual, .sum = (float *)(uintptr_t)sum};
    Py_BEGIN_ALLOW_THREADS
    run_product(&kind, &x);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* One of many matrices: where its factors, itself and the result begin in their buffers. Rows follow one another. */
typedef struct {
    int64_t rank, a, b, p, q, m, out;
} Line;

static int64_t out_stride_of(const Kind *kind, const Line *line) { return kind->m && !kind->p ? line->a : line->b; }

static int line_is_inside(const Kind *kind, const Line *line, const Sizes *all) {
    if (!inside(line->p, 0, all->p) || !inside(line->q, 0, all->q) || !inside(line->m, 0, all->m) ||
        !inside(line->out, 0, all->out))
        return 0;
    Sizes left = {all->p - line->p, all->q - line->q, all->m - line->m, all->out - line->out};
    return product_is_inside(kind, line->a, line->b, line->rank, line->a, line->b, out_stride_of(kind, line), left);
}

PyObject *py_lowrank_pieces(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    unsigned long long p, q, m, out, table, residual = 0, sum = 0; /* the last two as long as m */
    Py_ssize_t pieces;
    int subtract;
    Kind kind;
    Sizes sizes;
    if (!PyArg_ParseTuple(args, "sKKKKKnp(nnnn)|(KK)", &name, &p, &q, &m, &out, &table, &pieces, &subtract,
                          &sizes.p, &sizes.q, &sizes.m, &sizes.out, &residual, &sum) ||
        !kind_named(name, &kind))
        return NULL;
    const Line *line = (const Line *)(uintptr_t)table;
    for (Py_ssize_t i = 0; i < pieces; i++)
        if (!line_is_inside(&kind, &line[i], &sizes)) return outside("product", i);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < pieces; i++, line++) {
        Product x = {
            .p = (const float *)(uintptr_t)p + line->p, .q = (const float *)(uintptr_t)q + line->q,
            .m = (const float *)(uintptr_t)(residual ? sum : m) + line->m,
            .given = (const float *)(uintptr_t)m + line->m, .out = (float *)(uintptr_t)out + line->out,
            .a = (size_t)line->a, .b = (size_t)line->b, .rank = (size_t)line->rank, .p_stride = (size_t)line->a,
            .stride = (size_t)line->b, .out_stride = (size_t)out_stride_of(&kind, line), .subtract = subtract,
            .residual = residual ? (const float *)(uintptr_t)residual + line->m : NULL,
            .sum = sum ? (float *)(uintptr_t)sum + line->m : NULL};
        run_product(&kind, &x);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
