/* Random rotations of rows of SIDE values: rotation.py's reference once more, a row in the registers.
 *
 * Values are laid down anew between the butterflies, and every one adds the reference's pairs in its order: each
 * instruction set gives the same bits.
 */
#define SIDE 128u /* SIDE in rotation.py */
#define ROW (SIDE / 8)

typedef float Lanes8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words8 __attribute__((vector_size(32), aligned(4), may_alias));

/* A key's upper half, and its lower half, to which the place of the first value in its parameter has been added. */
typedef struct {
    uint32_t counter, high;
} Draws;

BODY Draws draws_from(Draws draws, size_t start) { return (Draws){draws.counter + (uint32_t)start, draws.high}; }

/* v becomes -v where random_24, of which this is the highest bit, is below a half. The row is `at` values from the
 * first one. */
BODY void turn_signs(Lanes8 *v, Draws draws, size_t at) {
    const Words8 first = (Words8){0, 1, 2, 3, 4, 5, 6, 7} + (draws.counter + (uint32_t)at);
    const Words8 high = (Words8){0} + draws.high;
#pragma GCC unroll 16
    for (size_t i = 0; i < ROW; i++) {
        Words8 x = first + 8 * (uint32_t)i;
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= high;
        x ^= x >> 15;
        x *= 0x846ca68bu;
        v[i] = (Lanes8)((Words8)v[i] ^ (~x & 0x80000000u));
    }
}

/* From vectors u and w their values of which one bit of the place is 0, and those of which it is 1; sums into u,
 * differences into w. */
#define BUTTERFLY(u, w, ...) \
    do { \
        const Words8 zeros = {__VA_ARGS__}, ones = zeros + PARTNER; \
        Lanes8 a = __builtin_shuffle(u, w, zeros), b = __builtin_shuffle(u, w, ones); \
        u = a + b; \
        w = a - b; \
    } while (0)

/* Places that are 1, 2, 4 and 8 apart, in two vectors: as they lie afterwards, so they lay before. */
BODY void transform_16(Lanes8 *first, Lanes8 *second) {
    Lanes8 u = *first, w = *second;
#define PARTNER 1
    BUTTERFLY(u, w, 0, 2, 8, 10, 4, 6, 12, 14);
    BUTTERFLY(u, w, 0, 2, 8, 10, 4, 6, 12, 14);
#undef PARTNER
#define PARTNER 4
    BUTTERFLY(u, w, 0, 1, 2, 3, 8, 9, 10, 11);
#undef PARTNER
#define PARTNER 1
    BUTTERFLY(u, w, 0, 2, 4, 6, 8, 10, 12, 14);
#undef PARTNER
    *first = u;
    *second = w;
}

BODY void transform(Lanes8 *v, float unit) {
#pragma GCC unroll 8
    for (size_t i = 0; i < ROW; i += 2) transform_16(v + i, v + i + 1);
#define BUTTERFLIES(half) \
    _Pragma("GCC unroll 16") for (size_t i = 0; i < ROW; i++) if (!(i & (half))) { \
        Lanes8 a = v[i], b = v[i + (half)]; \
        v[i] = a + b; \
        v[i + (half)] = a - b; \
    }
    BUTTERFLIES(2)
    BUTTERFLIES(4)
    BUTTERFLIES(8)
#pragma GCC unroll 16
    for (size_t i = 0; i < ROW; i++) v[i] *= unit;
}

/* The rows of x, turned, into values, and as they are the fewer than SIDE behind them. */
BODY void turn_rows(const float *restrict x, float *restrict values, size_t numel, Draws draws, float unit) {
    size_t at = 0;
    for (; at + SIDE <= numel; at += SIDE) {
        Lanes8 v[ROW];
#pragma GCC unroll 16
        for (size_t i = 0; i < ROW; i++) v[i] = *(const Lanes8 *)(x + at + 8 * i);
        turn_signs(v, draws, at);
        transform(v, unit);
#pragma GCC unroll 16
        for (size_t i = 0; i < ROW; i++) *(Lanes8 *)(values + at + 8 * i) = v[i];
    }
    for (; at < numel; at++) values[at] = x[at];
}

/* The other way: written, added (sign > 0) or subtracted. */
BODY void put_turned_back(const float *restrict values, float *restrict out, size_t numel, Draws draws, float unit,
                          int sign) {
    size_t at = 0;
    for (; at + SIDE <= numel; at += SIDE) {
        Lanes8 v[ROW];
#pragma GCC unroll 16
        for (size_t i = 0; i < ROW; i++) v[i] = *(const Lanes8 *)(values + at + 8 * i);
        transform(v, unit);
        turn_signs(v, draws, at);
#pragma GCC unroll 16
        for (size_t i = 0; i < ROW; i++) {
            Lanes8 *to = (Lanes8 *)(out + at + 8 * i);
            if (sign > 0) *to += v[i];
            else if (sign < 0) *to -= v[i];
            else *to = v[i];
        }
    }
    for (; at < numel; at++) out[at] = sign > 0 ? out[at] + values[at] : sign < 0 ? out[at] - values[at] : values[at];
}
