/* The cosine transform of many columns at once, and its inverse: dct.py's reference once more.
 *
 * A transform of an even number of rows is two of half as many: of the sums of rows from both ends, which are every
 * second coefficient, and of their differences over twice a cosine, whose neighbours added are the others (Lee, 1984).
 * From BASE rows down it is a product with a matrix, in two halves for the same reason. The inverse goes the same way
 * backwards. Every addition has its place: the same bits on any machine.
 */
#define BASE 16
#define COLUMNS 8 /* that are transformed side by side */

typedef float Row8 __attribute__((vector_size(4 * COLUMNS), aligned(4))); /* one row of them */

/* Rows that a transform of n ends in, after halving. */
static size_t base_of(size_t n) {
    while (n > BASE && n % 2 == 0) n /= 2;
    return n;
}

/* Numbers of a table: of every halving the n/2 factors, the base's matrices, and the scale of each coefficient. */
static size_t factors_of(size_t n) {
    size_t base = base_of(n);
    return n - base + (base % 2 ? base * base : base * base / 2) + n;
}

/* out[k] = sum over j of matrix[k][j] in[j], in rising order; transposed: of matrix[j][k]. */
#define HALF (BASE / 2)
BODY void product(Row8 *restrict out, size_t stride, const Row8 *restrict in, size_t in_stride,
                  const float *restrict matrix, size_t m, int transposed) {
    if (m == HALF) { /* the usual one, unrolled: its rows stay in registers */
        Row8 rows[HALF];
        for (size_t j = 0; j < HALF; j++) rows[j] = in[j * in_stride];
#pragma GCC unroll 8
        for (size_t k = 0; k < HALF; k++) {
            Row8 sum = rows[0] * matrix[transposed ? k : k * HALF];
#pragma GCC unroll 8
            for (size_t j = 1; j < HALF; j++) sum += rows[j] * matrix[transposed ? j * HALF + k : k * HALF + j];
            out[k * stride] = sum;
        }
        return;
    }
    for (size_t k = 0; k < m; k++) {
        Row8 sum = in[0] * matrix[transposed ? k : k * m];
        for (size_t j = 1; j < m; j++) sum += in[j * in_stride] * matrix[transposed ? j * m + k : k * m + j];
        out[k * stride] = sum;
    }
}

/* Row i of the first half and of the second: the sum of a[i] and a[m-1-i], and their difference. */
BODY void butterfly(const Row8 *restrict a, Row8 *restrict b, size_t m, const float *factor) {
    size_t half = m / 2;
    for (size_t i = 0; i < half; i++) {
        Row8 u = a[i], v = a[m - 1 - i];
        b[i] = u + v;
        b[half + i] = factor ? (u - v) * factor[i] : u - v;
    }
}

BODY void butterfly_back(const Row8 *restrict a, Row8 *restrict b, size_t m, const float *factor) {
    size_t half = m / 2;
    for (size_t i = 0; i < half; i++) {
        Row8 u = a[i], v = factor ? a[half + i] * factor[i] : a[half + i];
        b[i] = u + v;
        b[m - 1 - i] = u - v;
    }
}

/* The halves' coefficients in turn: from the second, the sum of two neighbours. */
BODY void interleaved(const Row8 *restrict a, Row8 *restrict b, size_t m) {
    size_t half = m / 2;
    for (size_t k = 0; k < half; k++) {
        b[2 * k] = a[k];
        b[2 * k + 1] = k + 1 < half ? a[half + k] + a[half + k + 1] : a[half + k];
    }
}

BODY void interleaved_back(const Row8 *restrict a, Row8 *restrict b, size_t m) {
    size_t half = m / 2;
    for (size_t k = 0; k < half; k++) {
        b[k] = a[2 * k];
        b[half + k] = k ? a[2 * k + 1] + a[2 * k - 1] : a[1];
    }
}

BODY void swap(Row8 **a, Row8 **b) {
    Row8 *c = *a;
    *a = *b;
    *b = c;
}

/* n rows in a, and room for as many in b; returns the one of the two that holds the coefficients. */
BODY Row8 *dct_columns(Row8 *a, Row8 *b, size_t n, const float *factors) {
    size_t base = base_of(n);
    for (size_t m = n; m > base; m /= 2) {
        for (size_t at = 0; at < n; at += m) butterfly((const Row8 *)(a + at), b + at, m, factors);
        swap(&a, &b);
        factors += m / 2;
    }
    for (size_t at = 0; at < n; at += base) {
        if (base % 2) {
            product(b + at, 1, (const Row8 *)(a + at), 1, factors, base, 0);
            continue;
        }
        Row8 halves[BASE];
        butterfly((const Row8 *)(a + at), halves, base, NULL);
        product(b + at, 2, (const Row8 *)halves, 1, factors, base / 2, 0);
        product(b + at + 1, 2, (const Row8 *)(halves + base / 2), 1, factors + base * base / 4, base / 2, 0);
    }
    swap(&a, &b);
    for (size_t m = 2 * base; m <= n; m *= 2) {
        for (size_t at = 0; at < n; at += m) interleaved((const Row8 *)(a + at), b + at, m);
        swap(&a, &b);
    }
    const float *scale = factors + (base % 2 ? base * base : base * base / 2);
    for (size_t k = 0; k < n; k++) a[k] *= scale[k];
    return a;
}

BODY Row8 *inverse_columns(Row8 *a, Row8 *b, size_t n, const float *factors) {
    size_t base = base_of(n);
    const float *matrices = factors + (n - base), *scale = matrices + (base % 2 ? base * base : base * base / 2);
    for (size_t k = 0; k < n; k++) a[k] *= scale[k];
    for (size_t m = n; m > base; m /= 2) {
        for (size_t at = 0; at < n; at += m) interleaved_back((const Row8 *)(a + at), b + at, m);
        swap(&a, &b);
    }
    for (size_t at = 0; at < n; at += base) {
        if (base % 2) {
            product(b + at, 1, (const Row8 *)(a + at), 1, matrices, base, 1);
            continue;
        }
        Row8 halves[BASE];
        product(halves, 1, (const Row8 *)(a + at), 2, matrices, base / 2, 1);
        product(halves + base / 2, 1, (const Row8 *)(a + at + 1), 2, matrices + base * base / 4, base / 2, 1);
        butterfly_back((const Row8 *)halves, b + at, base, NULL);
    }
    swap(&a, &b);
    const float *factor = matrices;
    for (size_t m = 2 * base; m <= n; m *= 2) {
        factor -= m / 2;
        for (size_t at = 0; at < n; at += m) butterfly_back((const Row8 *)(a + at), b + at, m, factor);
        swap(&a, &b);
    }
    return a;
}
