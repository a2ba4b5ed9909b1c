/* The cosine transform of many columns at once, and its inverse: dct.py's reference once more.
 *
 * A transform of an even number of rows is two of half as many (Plonka & Tasche, 2005): the second kind is one of the
 * second and one of the fourth, of sums and of differences of rows from both ends; the fourth is two of the second, of
 * rotated pairs; the third, which is the inverse, is the second backwards. An odd number of rows is a product with a
 * matrix. Every addition has its place: the same bits on any machine.
 */
#define COLUMNS 8 /* that are transformed side by side */
#define SIDE 64   /* the usual number of rows, all of whose steps are laid out for the compiler */

typedef float Row8 __attribute__((vector_size(4 * COLUMNS), aligned(4))); /* one row of them */

enum { II, III, IV }; /* kinds of transforms */

/* Rows that a transform of n ends in, after halving. */
static size_t base_of(size_t n) {
    while (n % 2 == 0) n /= 2;
    return n;
}

/* Numbers of a table: of every halving the n/2 cosines and sines, two matrices of the odd rest, and n scales. */
static size_t factors_of(size_t n) {
    size_t base = base_of(n);
    return 2 * (n - base) + 2 * base * base + n;
}

/* Rows i and n-1-i of x become rows i of two halves; of the third kind, two neighbours do. */
BODY void split(int kind, const Row8 *x, Row8 *y, size_t n, const float *factors, size_t i) {
    size_t h = n / 2;
    if (kind == III) {
        y[i] = x[2 * i];
        y[h + i] = x[2 * i + 1];
        return;
    }
    Row8 u = x[i], v = x[n - 1 - i];
    if (kind == II) {
        y[i] = u + v;
        y[h + i] = u - v;
    } else {
        float c = factors[i], s = factors[h + i];
        y[i] = u * c + v * s;
        y[h + i] = i % 2 ? v * c - u * s : u * s - v * c;
    }
}

/* Two rows of y from the halves, transformed. */
BODY void join(int kind, const Row8 *x, Row8 *y, size_t n, size_t i) {
    size_t h = n / 2;
    if (kind == III) {
        y[i] = x[i] + x[h + i];
        y[n - 1 - i] = x[i] - x[h + i];
    } else if (kind == II) {
        y[2 * i] = x[i];
        y[2 * i + 1] = x[h + i];
    } else if (i == 0) {
        y[0] = x[0];
        y[n - 1] = x[h];
    } else {
        y[2 * i - 1] = x[i] + x[n - i];
        y[2 * i] = x[i] - x[n - i];
    }
}

#define FIRST(kind) ((kind) == III ? III : II) /* what the halves are */
#define SECOND(kind) ((kind) == IV ? II : IV)

/* From x into y; both are written. The number of rows is known to the compiler, which keeps what it can in registers. */
BODY void steps_1(int kind, Row8 *x, Row8 *y, const float *factors) { *y = kind == IV ? *x * factors[1] : *x; }

#define STEPS(n, half) \
    BODY void steps_##n(int kind, Row8 *x, Row8 *y, const float *factors) { \
        _Pragma("GCC unroll 32") for (size_t i = 0; i < half; i++) split(kind, x, y, n, factors, i); \
        steps_##half(FIRST(kind), y, x, factors + n); \
        steps_##half(SECOND(kind), y + half, x + half, factors + n); \
        _Pragma("GCC unroll 32") for (size_t i = 0; i < half; i++) join(kind, x, y, n, i); \
    }
STEPS(2, 1)
STEPS(4, 2)
STEPS(8, 4)
STEPS(16, 8)
STEPS(32, 16)
STEPS(64, 32)

/* out[k] = sum over j of matrix[k][j] in[j], in rising order; transposed: of matrix[j][k]. */
BODY void product(const Row8 *restrict in, Row8 *restrict out, const float *restrict matrix, size_t m, int transposed) {
    for (size_t k = 0; k < m; k++) {
        Row8 sum = in[0] * matrix[transposed ? k : k * m];
        for (size_t j = 1; j < m; j++) sum += in[j] * matrix[transposed ? j * m + k : k * m + j];
        out[k] = sum;
    }
}

/* The same of any number of rows, in memory. `again` is this function, for the same instruction set. */
typedef void (*Along)(int, Row8 *, Row8 *, size_t, const float *);

BODY void along_body(int kind, Row8 *x, Row8 *y, size_t n, const float *factors, Along again) {
    if (n % 2) {
        product(x, y, kind == IV ? factors + n * n : factors, n, kind == III);
        return;
    }
    if (n == 16) {
        if (kind == II) steps_16(II, x, y, factors);
        if (kind == III) steps_16(III, x, y, factors);
        if (kind == IV) steps_16(IV, x, y, factors);
        return;
    }
    size_t half = n / 2;
    for (size_t i = 0; i < half; i++) split(kind, x, y, n, factors, i);
    again(FIRST(kind), y, x, half, factors + n);
    again(SECOND(kind), y + half, x + half, half, factors + n);
    for (size_t i = 0; i < half; i++) join(kind, x, y, n, i);
}

/* n rows of COLUMNS columns: their coefficients (kind II), or from those to the rows (III). a and b are room. */
BODY void columns_body(int kind, const float *from, size_t stride, float *to, size_t to_stride, size_t n,
                       const float *factors, Row8 *a, Row8 *b, Along along) {
    const float *scale = factors + factors_of(n) - n;
    if (n == SIDE) {
        Row8 x[SIDE], y[SIDE];
#pragma GCC unroll 64
        for (size_t i = 0; i < SIDE; i++)
            x[i] = kind == III ? *(const Row8 *)(from + i * stride) * scale[i] : *(const Row8 *)(from + i * stride);
        steps_64(kind, x, y, factors);
#pragma GCC unroll 64
        for (size_t i = 0; i < SIDE; i++) *(Row8 *)(to + i * to_stride) = kind == II ? y[i] * scale[i] : y[i];
        return;
    }
    for (size_t i = 0; i < n; i++)
        a[i] = kind == III ? *(const Row8 *)(from + i * stride) * scale[i] : *(const Row8 *)(from + i * stride);
    along(kind, a, b, n, factors);
    for (size_t i = 0; i < n; i++) *(Row8 *)(to + i * to_stride) = kind == II ? b[i] * scale[i] : b[i];
}
