/* The cosine transform of many columns at once, and its inverse: dct.py's reference once more.
 *
 * A transform of an even number of rows is two of half as many (Plonka & Tasche, 2005): the second kind is one of the
 * second and one of the fourth, of sums and of differences of rows from both ends; the fourth is two of the second, of
 * rotated pairs; the third, which is the inverse, is the second backwards. An odd number of rows is a product with a
 * matrix. Every addition has its place: the same bits on any machine.
 *
 * Included by _dct.c once for each instruction set, with COLUMNS, which are transformed side by side and fill a register,
 * and NAMED and TARGET for its functions.
 */
typedef float NAMED(Lanes) __attribute__((vector_size(4 * COLUMNS), aligned(4)));
#define LANE NAMED(Lanes) /* one row of them */

/* Rows i and n-1-i of x become rows i of two halves; of the third kind, two neighbours do. */
BODY void NAMED(split)(int kind, const LANE *x, LANE *y, size_t n, const float *factors, size_t i) {
    size_t h = n / 2;
    if (kind == III) {
        y[i] = x[2 * i];
        y[h + i] = x[2 * i + 1];
        return;
    }
    LANE u = x[i], v = x[n - 1 - i];
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
BODY void NAMED(join)(int kind, const LANE *x, LANE *y, size_t n, size_t i) {
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

/* From x into y; both are written. The number of rows is known to the compiler, which keeps what it can in registers. */
BODY void NAMED(steps_1)(int kind, LANE *x, LANE *y, const float *factors) {
    *y = kind == IV ? *x * factors[1] : *x;
}

#define STEPS(n, half) \
    BODY void NAMED(steps_##n)(int kind, LANE *x, LANE *y, const float *factors) { \
        _Pragma("GCC unroll 32") for (size_t i = 0; i < half; i++) NAMED(split)(kind, x, y, n, factors, i); \
        NAMED(steps_##half)(FIRST(kind), y, x, factors + n); \
        NAMED(steps_##half)(SECOND(kind), y + half, x + half, factors + n); \
        _Pragma("GCC unroll 32") for (size_t i = 0; i < half; i++) NAMED(join)(kind, x, y, n, i); \
    }
STEPS(2, 1)
STEPS(4, 2)
STEPS(8, 4)
STEPS(16, 8)
STEPS(32, 16)
#undef STEPS

/* out[k] = sum over j of matrix[k][j] in[j], in rising order; transposed: of matrix[j][k]. */
BODY void NAMED(product)(const LANE *restrict in, LANE *restrict out, const float *restrict matrix, size_t m, int transposed) {
    for (size_t k = 0; k < m; k++) {
        LANE sum = in[0] * matrix[transposed ? k : k * m];
        for (size_t j = 1; j < m; j++) sum += in[j] * matrix[transposed ? j * m + k : k * m + j];
        out[k] = sum;
    }
}

/* The same of any number of rows, in memory. */
TARGET static void NAMED(along)(int kind, LANE *x, LANE *y, size_t n, const float *factors) {
    if (n % 2) {
        NAMED(product)(x, y, kind == IV ? factors + n * n : factors, n, kind == III);
        return;
    }
    if (n == 16) {
        if (kind == II) NAMED(steps_16)(II, x, y, factors);
        if (kind == III) NAMED(steps_16)(III, x, y, factors);
        if (kind == IV) NAMED(steps_16)(IV, x, y, factors);
        return;
    }
    size_t half = n / 2;
    for (size_t i = 0; i < half; i++) NAMED(split)(kind, x, y, n, factors, i);
    NAMED(along)(FIRST(kind), y, x, half, factors + n);
    NAMED(along)(SECOND(kind), y + half, x + half, half, factors + n);
    for (size_t i = 0; i < half; i++) NAMED(join)(kind, x, y, n, i);
}

#define ROW(x, stride, i) (*(LANE *)((x) + (i) * (stride)))
#define CONST_ROW(x, stride, i) (*(const LANE *)((x) + (i) * (stride)))

/* SIDE rows of COLUMNS columns. Each half is scaled where it is read, and written where it is done: registers are few. */
BODY void NAMED(side)(int kind, const float *from, size_t stride, float *to, size_t to_stride, const float *factors,
                      const float *scale) {
    const size_t half = SIDE / 2;
    LANE x[SIDE], y[SIDE];
    if (kind == II) {
#pragma GCC unroll 32
        for (size_t i = 0; i < half; i++) {
            LANE u = CONST_ROW(from, stride, i), v = CONST_ROW(from, stride, SIDE - 1 - i);
            x[i] = u + v;
            x[half + i] = u - v;
        }
        NAMED(steps_32)(II, x, y, factors + SIDE);
#pragma GCC unroll 32
        for (size_t i = 0; i < half; i++) ROW(to, to_stride, 2 * i) = y[i] * scale[2 * i];
        NAMED(steps_32)(IV, x + half, y + half, factors + SIDE);
#pragma GCC unroll 32
        for (size_t i = 0; i < half; i++) ROW(to, to_stride, 2 * i + 1) = y[half + i] * scale[2 * i + 1];
        return;
    }
#pragma GCC unroll 32
    for (size_t i = 0; i < half; i++) x[half + i] = CONST_ROW(from, stride, 2 * i + 1) * scale[2 * i + 1];
    NAMED(steps_32)(IV, x + half, y + half, factors + SIDE);
#pragma GCC unroll 32
    for (size_t i = 0; i < half; i++) x[i] = CONST_ROW(from, stride, 2 * i) * scale[2 * i];
    NAMED(steps_32)(III, x, y, factors + SIDE);
#pragma GCC unroll 32
    for (size_t i = 0; i < half; i++) {
        ROW(to, to_stride, i) = y[i] + y[half + i];
        ROW(to, to_stride, SIDE - 1 - i) = y[i] - y[half + i];
    }
}

/* n rows of COLUMNS columns: their coefficients (kind II), or from those to the rows (III). */
BODY void NAMED(columns_body)(int kind, const float *from, size_t stride, float *to, size_t to_stride, size_t n,
                              const float *factors, const Room *room) {
    const float *scale = factors + factors_of(n) - n;
    if (n == SIDE) {
        NAMED(side)(kind, from, stride, to, to_stride, factors, scale);
        return;
    }
    LANE *a = (LANE *)room->a, *b = (LANE *)room->b;
    for (size_t i = 0; i < n; i++)
        a[i] = kind == III ? CONST_ROW(from, stride, i) * scale[i] : CONST_ROW(from, stride, i);
    NAMED(along)(kind, a, b, n, factors);
    for (size_t i = 0; i < n; i++) ROW(to, to_stride, i) = kind == II ? b[i] * scale[i] : b[i];
}

#define WAY(way, kind) \
    TARGET static void NAMED(way##_columns)(const float *from, size_t stride, float *to, size_t to_stride, size_t n, \
                                            const float *factors, const Room *room) { \
        NAMED(columns_body)(kind, from, stride, to, to_stride, n, factors, room); \
    } \
    TARGET static void NAMED(way##_turned)(const Rows *x, float *to, const size_t *place, const Room *room) { \
        turned_body(x, to, place, room, COLUMNS, NAMED(way##_columns)); \
    } \
    TARGET static void NAMED(way##_straight)(const Rows *x, float *to, size_t stride, const Room *room) { \
        straight_body(x, to, stride, room, COLUMNS, NAMED(way##_columns)); \
    }
WAY(forward, II)
WAY(backward, III)
#undef WAY
#undef ROW
#undef CONST_ROW
#undef LANE
#undef NAMED
#undef TARGET
#undef COLUMNS
