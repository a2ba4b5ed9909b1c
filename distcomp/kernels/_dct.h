/* The cosine transform of many columns at once, and its inverse: dct.py's reference once more.
 *
 * A transform of an even number of rows is two of half as many: of the sums of rows from both ends, which are every
 * second coefficient, and of their differences over twice a cosine, whose neighbours added are the others (Lee, 1984).
 * From BASE rows down it is a product with a matrix, in two halves for the same reason. The inverse goes the same way
 * backwards. Every addition has its place: the same bits on any machine.
 */
#define BASE 16
#define COLUMNS 8 /* that are transformed side by side */

typedef float Rows8[COLUMNS];

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
BODY void product(Rows8 *restrict out, size_t stride, const Rows8 *restrict in, size_t in_stride,
                  const float *restrict matrix, size_t m, int transposed) {
    for (size_t k = 0; k < m; k++) {
        Rows8 sum;
        for (size_t c = 0; c < COLUMNS; c++) sum[c] = in[0][c] * matrix[transposed ? k : k * m];
        for (size_t j = 1; j < m; j++)
            for (size_t c = 0; c < COLUMNS; c++)
                sum[c] += in[j * in_stride][c] * matrix[transposed ? j * m + k : k * m + j];
        for (size_t c = 0; c < COLUMNS; c++) out[k * stride][c] = sum[c];
    }
}

/* Row i of the first half and of the second: the sum of a[i] and a[m-1-i], and their difference. */
BODY void butterfly(const Rows8 *restrict a, Rows8 *restrict b, size_t m, const float *factor) {
    size_t half = m / 2;
    for (size_t i = 0; i < half; i++)
        for (size_t c = 0; c < COLUMNS; c++) {
            float u = a[i][c], v = a[m - 1 - i][c], difference = u - v;
            b[i][c] = u + v;
            b[half + i][c] = factor ? difference * factor[i] : difference;
        }
}

BODY void butterfly_back(const Rows8 *restrict a, Rows8 *restrict b, size_t m, const float *factor) {
    size_t half = m / 2;
    for (size_t i = 0; i < half; i++)
        for (size_t c = 0; c < COLUMNS; c++) {
            float u = a[i][c], v = factor ? a[half + i][c] * factor[i] : a[half + i][c];
            b[i][c] = u + v;
            b[m - 1 - i][c] = u - v;
        }
}

/* The halves' coefficients in turn: from the second, the sum of two neighbours. */
BODY void interleaved(const Rows8 *restrict a, Rows8 *restrict b, size_t m) {
    size_t half = m / 2;
    for (size_t k = 0; k < half; k++)
        for (size_t c = 0; c < COLUMNS; c++) {
            b[2 * k][c] = a[k][c];
            b[2 * k + 1][c] = k + 1 < half ? a[half + k][c] + a[half + k + 1][c] : a[half + k][c];
        }
}

BODY void interleaved_back(const Rows8 *restrict a, Rows8 *restrict b, size_t m) {
    size_t half = m / 2;
    for (size_t k = 0; k < half; k++)
        for (size_t c = 0; c < COLUMNS; c++) {
            b[k][c] = a[2 * k][c];
            b[half + k][c] = k ? a[2 * k + 1][c] + a[2 * k - 1][c] : a[1][c];
        }
}

BODY void swap(Rows8 **a, Rows8 **b) {
    Rows8 *c = *a;
    *a = *b;
    *b = c;
}

/* n rows in a, and room for as many in b; returns the one of the two that holds the coefficients. */
BODY Rows8 *dct_columns(Rows8 *a, Rows8 *b, size_t n, const float *factors) {
    size_t base = base_of(n);
    for (size_t m = n; m > base; m /= 2) {
        for (size_t at = 0; at < n; at += m) butterfly((const Rows8 *)(a + at), b + at, m, factors);
        swap(&a, &b);
        factors += m / 2;
    }
    for (size_t at = 0; at < n; at += base) {
        if (base % 2) {
            product(b + at, 1, (const Rows8 *)(a + at), 1, factors, base, 0);
            continue;
        }
        Rows8 halves[BASE];
        butterfly((const Rows8 *)(a + at), halves, base, NULL);
        product(b + at, 2, (const Rows8 *)halves, 1, factors, base / 2, 0);
        product(b + at + 1, 2, (const Rows8 *)(halves + base / 2), 1, factors + base * base / 4, base / 2, 0);
    }
    swap(&a, &b);
    for (size_t m = 2 * base; m <= n; m *= 2) {
        for (size_t at = 0; at < n; at += m) interleaved((const Rows8 *)(a + at), b + at, m);
        swap(&a, &b);
    }
    const float *scale = factors + (base % 2 ? base * base : base * base / 2);
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < COLUMNS; c++) a[k][c] *= scale[k];
    return a;
}

BODY Rows8 *inverse_columns(Rows8 *a, Rows8 *b, size_t n, const float *factors) {
    size_t base = base_of(n);
    const float *matrices = factors + (n - base), *scale = matrices + (base % 2 ? base * base : base * base / 2);
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < COLUMNS; c++) a[k][c] *= scale[k];
    for (size_t m = n; m > base; m /= 2) {
        for (size_t at = 0; at < n; at += m) interleaved_back((const Rows8 *)(a + at), b + at, m);
        swap(&a, &b);
    }
    for (size_t at = 0; at < n; at += base) {
        if (base % 2) {
            product(b + at, 1, (const Rows8 *)(a + at), 1, matrices, base, 1);
            continue;
        }
        Rows8 halves[BASE];
        product(halves, 1, (const Rows8 *)(a + at), 2, matrices, base / 2, 1);
        product(halves + base / 2, 1, (const Rows8 *)(a + at + 1), 2, matrices + base * base / 4, base / 2, 1);
        butterfly_back((const Rows8 *)halves, b + at, base, NULL);
    }
    swap(&a, &b);
    const float *factor = matrices;
    for (size_t m = 2 * base; m <= n; m *= 2) {
        factor -= m / 2;
        for (size_t at = 0; at < n; at += m) butterfly_back((const Rows8 *)(a + at), b + at, m, factor);
        swap(&a, &b);
    }
    return a;
}
