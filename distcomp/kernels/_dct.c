/* Chunks of matrices as their largest cosine coefficients: one chunk at a time, which stays in the cache.
 *
 * A line of the table is a matrix of `down` x `across` chunks of `high` x `wide` elements. A chunk's coefficients are
 * those of its columns, then of its rows; between the two it is laid on its side.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_cpu.h"
#include "_dct.h"
#include "_dct_chunks.h"
#include "_inside.h"
#include "_top.h"

typedef struct {
    int64_t at, down, high, across, wide;
    int64_t count, place;               /* how many coefficients of a chunk are sent, and where the first is written */
    int64_t high_factors, wide_factors; /* where the tables of the two sides begin */
} Line;

typedef struct {
    float *x, *values;
    int64_t *places;
    const float *factors;
    int sign; /* of what is put */
} Buffers;

typedef int32_t Index8 __attribute__((vector_size(4 * COLUMNS)));

/* As many rows as there are columns become columns, `stride` apart: halves of rows change places, then quarters, then
 * neighbours. */
BODY void lay_on_side(const Row8 *y, float *to, size_t stride) {
    Row8 fours[COLUMNS], twos[COLUMNS];
    for (size_t i = 0; i < 4; i++) {
        fours[i] = __builtin_shuffle(y[i], y[i + 4], (Index8){0, 1, 2, 3, 8, 9, 10, 11});
        fours[i + 4] = __builtin_shuffle(y[i], y[i + 4], (Index8){4, 5, 6, 7, 12, 13, 14, 15});
    }
    for (size_t i = 0; i < COLUMNS; i += 4)
        for (size_t j = i; j < i + 2; j++) {
            twos[j] = __builtin_shuffle(fours[j], fours[j + 2], (Index8){0, 1, 8, 9, 4, 5, 12, 13});
            twos[j + 2] = __builtin_shuffle(fours[j], fours[j + 2], (Index8){2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (size_t i = 0; i < COLUMNS; i += 2) {
        *(Row8 *)(to + i * stride) = __builtin_shuffle(twos[i], twos[i + 1], (Index8){0, 8, 2, 10, 4, 12, 6, 14});
        *(Row8 *)(to + (i + 1) * stride) = __builtin_shuffle(twos[i], twos[i + 1], (Index8){1, 9, 3, 11, 5, 13, 7, 15});
    }
}

/* Transform the n rows of `from`, m columns of them, into `to`, laid on its side: [m][n]. a and b are room for n rows. */
BODY void turned_body(const float *restrict from, size_t stride, size_t n, size_t m, float *restrict to,
                      const float *factors, Row8 *a, Row8 *b, int inverse) {
    for (size_t at = 0; at < m; at += COLUMNS) {
        size_t columns = smaller(COLUMNS, m - at);
        if (columns == COLUMNS)
            for (size_t i = 0; i < n; i++) a[i] = *(const Row8 *)(from + i * stride + at);
        else
            for (size_t i = 0; i < n; i++) {
                a[i] = (Row8){0};
                memcpy(a + i, from + i * stride + at, sizeof(float) * columns);
            }
        const Row8 *y = (const Row8 *)(inverse ? inverse_columns(a, b, n, factors) : dct_columns(a, b, n, factors));
        size_t k = 0;
        for (; columns == COLUMNS && k + COLUMNS <= n; k += COLUMNS) lay_on_side(y + k, to + at * n + k, n);
        for (size_t c = 0; c < columns; c++)
            for (size_t i = k; i < n; i++) to[(at + c) * n + i] = y[i][c];
    }
}

typedef void (*Turned)(const float *, size_t, size_t, size_t, float *, const float *, Row8 *, Row8 *);

typedef struct {
    Turned forward, backward;
} Variant;

#define TURNED(way, name, TARGET, inverse) \
    TARGET static void way##_##name(const float *from, size_t stride, size_t n, size_t m, float *to, \
                                    const float *factors, Row8 *a, Row8 *b) { \
        turned_body(from, stride, n, m, to, factors, a, b, inverse); \
    }
#define VARIANT(name, TARGET) \
    TURNED(forward, name, TARGET, 0) \
    TURNED(backward, name, TARGET, 1) \
    static const Variant name##_variant = {forward_##name, backward_##name};

#include "_variants.h"

/* ----------------------------------------------------------------------------------------------------- chunks */

/* Room for one chunk, and what works on it. */
typedef struct {
    float *turned, *chunk;
    Row8 *a, *b;
    Search search;
    const Variant *variant;
    TopRow top_row;
} Scratch;

/* Of chunk (row, column) of a matrix: its coefficients, in s->chunk. */
static void forward_chunk(const float *x, const Line *line, size_t row, size_t column, const float *factors,
                          const Scratch *s) {
    size_t high = (size_t)line->high, wide = (size_t)line->wide, stride = (size_t)line->across * wide;
    x += (size_t)line->at + row * high * stride + column * wide;
    s->variant->forward(x, stride, high, wide, s->turned, factors + line->high_factors, s->a, s->b);
    s->variant->forward(s->turned, high, wide, high, s->chunk, factors + line->wide_factors, s->a, s->b);
}

/* From the coefficients in s->chunk back to elements, put into the matrix. */
static void backward_chunk(float *x, const Line *line, size_t row, size_t column, const float *factors,
                           const Scratch *s, int sign) {
    size_t high = (size_t)line->high, wide = (size_t)line->wide, stride = (size_t)line->across * wide;
    x += (size_t)line->at + row * high * stride + column * wide;
    s->variant->backward(s->chunk, wide, high, wide, s->turned, factors + line->high_factors, s->a, s->b);
    s->variant->backward(s->turned, high, wide, high, s->chunk, factors + line->wide_factors, s->a, s->b);
    for (size_t i = 0; i < high; i++) {
        const float *restrict value = s->chunk + i * wide;
        float *restrict out = x + i * stride;
        if (sign > 0)
            for (size_t j = 0; j < wide; j++) out[j] += value[j];
        else if (sign < 0)
            for (size_t j = 0; j < wide; j++) out[j] -= value[j];
        else
            memcpy(out, value, sizeof(float) * wide);
    }
}

#define EACH_CHUNK(line, number, row, column) \
    for (size_t number = 0, row = 0; row < (size_t)(line)->down; row++) \
        for (size_t column = 0; column < (size_t)(line)->across; column++, number++)

/* The largest coefficients of each chunk: their values, and where in a buffer of coefficients they are. */
static void top_chunks(const Buffers *all, const Line *line, Scratch *s) {
    int64_t size = line->high * line->wide, count = line->count;
    EACH_CHUNK(line, number, row, column) {
        forward_chunk(all->x, line, row, column, all->factors, s);
        int64_t place = line->place + (int64_t)number * count, start = line->at + (int64_t)number * size;
        Row found = {.start = 0, .length = size, .count = count, .place = place};
        s->top_row(s->chunk, &found, &s->search, all->places);
        for (int64_t i = place; i < place + count; i++) {
            all->values[i] = s->chunk[all->places[i]];
            all->places[i] += start;
        }
    }
}

/* The elements of chunks whose coefficients are `values` at `places`, and zero elsewhere. */
static void put_chunks(const Buffers *all, const Line *line, Scratch *s) {
    int64_t size = line->high * line->wide, count = line->count;
    EACH_CHUNK(line, number, row, column) {
        int64_t place = line->place + (int64_t)number * count, start = line->at + (int64_t)number * size;
        memset(s->chunk, 0, sizeof(float) * (size_t)size);
        for (int64_t i = place; i < place + count; i++) {
            int64_t at = all->places[i] - start;
            if (at >= 0 && at < size) s->chunk[at] = all->values[i];
        }
        backward_chunk(all->x, line, row, column, all->factors, s, all->sign);
    }
}

/* All coefficients of a buffer, chunk after chunk; or back from them. */
static void dense_chunks(const Buffers *all, const Line *line, Scratch *s) {
    size_t size = (size_t)(line->high * line->wide);
    EACH_CHUNK(line, number, row, column) {
        float *y = all->values + (size_t)line->at + number * size;
        if (all->sign >= 0) {
            forward_chunk(all->x, line, row, column, all->factors, s);
            memcpy(y, s->chunk, sizeof(float) * size);
        } else {
            memcpy(s->chunk, y, sizeof(float) * size);
            backward_chunk(all->x, line, row, column, all->factors, s, 0);
        }
    }
}

/* ---------------------------------------------------------------------------------------------- Python's side */

enum { TOP, PUT, DENSE };

typedef struct {
    unsigned long long x, values, places, table, factors;
    Py_ssize_t x_size, values_size, places_size, lines, factors_size;
} All;

static int line_is_inside(const All *all, const Line *line, int kind) {
    int64_t sides[] = {line->down, line->high, line->across, line->wide}, numel;
    if (!product_inside(sides, 4, all->x_size) || line->high < 1 || line->wide < 1 || line->count < 0 ||
        line->count > line->high * line->wide)
        return 0;
    numel = line->down * line->high * line->across * line->wide;
    int64_t sent[] = {line->down, line->across, line->count}, number = line->down * line->across * line->count;
    if (!inside(line->at, numel, all->x_size) || (kind == DENSE && !inside(line->at, numel, all->values_size)) ||
        !inside(line->high_factors, (int64_t)factors_of((size_t)line->high), all->factors_size) ||
        !inside(line->wide_factors, (int64_t)factors_of((size_t)line->wide), all->factors_size))
        return 0;
    return kind == DENSE || (product_inside(sent, 3, all->values_size) && inside(line->place, number, all->values_size) &&
                             inside(line->place, number, all->places_size));
}

/* Room for the largest chunk of any line. Returns 0, with an error, where there is none. */
static int make_scratch(Scratch *s, const Line *line, Py_ssize_t lines) {
    size_t size = 1, side = 1, room = 1;
    for (Py_ssize_t i = 0; i < lines; i++) {
        size_t high = (size_t)line[i].high, wide = (size_t)line[i].wide;
        size_t wanted = room_for(high * wide, (size_t)line[i].count) + LANES, longer = high > wide ? high : wide;
        if (high * wide > size) size = high * wide;
        if (longer > side) side = longer;
        if (wanted > room) room = wanted;
    }
    size_t floats = 2 * size + 2 * COLUMNS * side;
    char *all = calloc(room * (sizeof(int64_t) + sizeof(int32_t)) + floats * sizeof(float) + 64, 1);
    if (!all) {
        PyErr_NoMemory();
        return 0;
    }
    s->search.places = (int64_t *)all;
    s->search.magnitudes = (int32_t *)(s->search.places + room);
    s->search.guess = -1;
    s->a = (Row8 *)(s->search.magnitudes + room);
    s->b = s->a + side;
    s->turned = (float *)(s->b + side);
    s->chunk = s->turned + size;
    return 1;
}

PyObject *py_dct(PyObject *self, PyObject *args) {
    (void)self;
    All all;
    int kind, sign;
    if (!PyArg_ParseTuple(args, "iKKK(nnn)KnKni", &kind, &all.x, &all.values, &all.places, &all.x_size,
                          &all.values_size, &all.places_size, &all.table, &all.lines, &all.factors, &all.factors_size,
                          &sign))
        return NULL;
    const Line *line = (const Line *)(uintptr_t)all.table;
    if (kind < TOP || kind > DENSE) return refused("this kind of transform");
    for (Py_ssize_t i = 0; i < all.lines; i++)
        if (!line_is_inside(&all, line + i, kind)) return outside("line", i);
    Scratch scratch;
    if (!make_scratch(&scratch, line, all.lines)) return NULL;
    Buffers buffers = {(float *)(uintptr_t)all.x, (float *)(uintptr_t)all.values, (int64_t *)(uintptr_t)all.places,
                       (const float *)(uintptr_t)all.factors, sign};
    void (*chunks)(const Buffers *, const Line *, Scratch *) =
        kind == TOP ? top_chunks : kind == PUT ? put_chunks : dense_chunks;
    scratch.variant = serving(instruction_set());
    scratch.top_row = top_row_of(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.lines; i++) chunks(&buffers, line + i, &scratch);
    Py_END_ALLOW_THREADS
    free(scratch.search.places);
    Py_RETURN_NONE;
}
