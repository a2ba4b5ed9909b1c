/* Chunks of matrices as their largest cosine coefficients: one chunk at a time, which stays in the cache.
 *
 * A line of the table is a matrix of `down` x `across` chunks of `high` x `wide` elements. A chunk's coefficients are
 * those of its columns, laid on their side, then of what are columns now: [wide][high], and so they stay. Back it goes
 * the same way: what few coefficients there are lie in few columns, and only these are transformed.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_cpu.h"
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

/* --------------------------------------------------------------------------------------------------- one side */

#define SIDE 64      /* the usual one, all of whose steps are laid out for the compiler */
#define MOST_LANES 16 /* columns that are transformed side by side, at most */

enum { II, III, IV };                          /* kinds of transforms, */
#define FIRST(kind) ((kind) == III ? III : II) /* and what their halves are */
#define SECOND(kind) ((kind) == IV ? II : IV)

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

/* n rows of m columns, and how far apart the rows are. */
typedef struct {
    const float *from;
    size_t stride, n, m;
    const float *factors;
} Rows;

/* Room for n rows of MOST_LANES each: two for the transform, one for columns that do not fill a row, one for what comes
 * out. */
typedef struct {
    float *a, *b, *some, *done;
} Room;

typedef void (*Columns)(const float *, size_t, float *, size_t, size_t, const float *, const Room *);

typedef struct {
    void (*turned)(const Rows *, float *, const size_t *, const Room *);
    void (*straight)(const Rows *, float *, size_t, const Room *);
} Way;

typedef struct {
    size_t lanes;
    Way forward, backward;
} Variant;

typedef float Row4 __attribute__((vector_size(16), aligned(4)));
typedef float Row8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t Index4 __attribute__((vector_size(16)));
typedef int32_t Index8 __attribute__((vector_size(32)));

/* Column c of four rows becomes the row of n that place[c] says: neighbours change places, then pairs of them. */
BODY void lay_4(const float *y, size_t stride, float *to, size_t n, const size_t *place) {
    Row4 rows[4], twos[4];
    for (size_t i = 0; i < 4; i++) rows[i] = *(const Row4 *)(y + i * stride);
    for (size_t i = 0; i < 4; i += 2) {
        twos[i] = __builtin_shuffle(rows[i], rows[i + 1], (Index4){0, 4, 1, 5});
        twos[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], (Index4){2, 6, 3, 7});
    }
    for (size_t j = 0; j < 2; j++) {
        *(Row4 *)(to + place[2 * j] * n) = __builtin_shuffle(twos[j], twos[j + 2], (Index4){0, 1, 4, 5});
        *(Row4 *)(to + place[2 * j + 1] * n) = __builtin_shuffle(twos[j], twos[j + 2], (Index4){2, 3, 6, 7});
    }
}

/* The same of eight: at last halves change places, too. */
BODY void lay_8(const float *y, size_t stride, float *to, size_t n, const size_t *place) {
    Row8 rows[8], twos[8], fours[8];
    for (size_t i = 0; i < 8; i++) rows[i] = *(const Row8 *)(y + i * stride);
    for (size_t i = 0; i < 8; i += 2) {
        twos[i] = __builtin_shuffle(rows[i], rows[i + 1], (Index8){0, 8, 1, 9, 4, 12, 5, 13});
        twos[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], (Index8){2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (size_t i = 0; i < 8; i += 4)
        for (size_t j = 0; j < 2; j++) {
            fours[i + 2 * j] = __builtin_shuffle(twos[i + j], twos[i + j + 2], (Index8){0, 1, 8, 9, 4, 5, 12, 13});
            fours[i + 2 * j + 1] = __builtin_shuffle(twos[i + j], twos[i + j + 2], (Index8){2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (size_t i = 0; i < 4; i++) {
        *(Row8 *)(to + place[i] * n) = __builtin_shuffle(fours[i], fours[i + 4], (Index8){0, 1, 2, 3, 8, 9, 10, 11});
        *(Row8 *)(to + place[i + 4] * n) =
            __builtin_shuffle(fours[i], fours[i + 4], (Index8){4, 5, 6, 7, 12, 13, 14, 15});
    }
}

/* The columns from `at` on, at most `lanes`, transformed, into `to`. Returns how many they are. */
BODY size_t some_columns(const Rows *x, size_t at, float *to, size_t to_stride, const Room *room, size_t lanes,
                         Columns columns) {
    size_t count = smaller(lanes, x->m - at), stride = x->stride;
    const float *from = x->from + at;
    if (count < lanes) {
        memset(room->some, 0, sizeof(float) * lanes * x->n);
        for (size_t i = 0; i < x->n; i++) memcpy(room->some + i * lanes, from + i * stride, sizeof(float) * count);
        from = room->some;
        stride = lanes;
    }
    columns(from, stride, to, to_stride, x->n, x->factors, room);
    return count;
}

/* The transform of the rows, laid on its side: column c becomes row place[c] of n. */
BODY void turned_body(const Rows *x, float *to, const size_t *place, const Room *room, size_t lanes, Columns columns) {
    const float *y = room->done;
    size_t n = x->n, tile = lanes > 8 ? 8 : lanes;
    for (size_t at = 0; at < x->m; at += lanes) {
        size_t count = some_columns(x, at, room->done, lanes, room, lanes, columns), k = 0;
        for (; count == lanes && k + tile <= n; k += tile)
            for (size_t c = 0; c < lanes; c += tile)
                (tile == 4 ? lay_4 : lay_8)(y + k * lanes + c, lanes, to + k, n, place + at + c);
        for (size_t c = 0; c < count; c++)
            for (size_t i = k; i < n; i++) to[place[at + c] * n + i] = y[i * lanes + c];
    }
}

/* The transform of the rows as it is. */
BODY void straight_body(const Rows *x, float *to, size_t stride, const Room *room, size_t lanes, Columns columns) {
    for (size_t at = 0; at < x->m; at += lanes) {
        if (at + lanes <= x->m) {
            some_columns(x, at, to + at, stride, room, lanes, columns);
            continue;
        }
        size_t count = some_columns(x, at, room->done, lanes, room, lanes, columns);
        for (size_t i = 0; i < x->n; i++)
            memcpy(to + i * stride + at, room->done + i * lanes, sizeof(float) * count);
    }
}

#define NAMED(name) name##_generic
#define TARGET
#define COLUMNS 4
#include "_dct.h"
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define AVX512 "avx2,avx512f,avx512bw,avx512dq,avx512vl"
#define NAMED(name) name##_avx2
#define TARGET __attribute__((target("avx2")))
#define COLUMNS 8
#include "_dct.h"
#define NAMED(name) name##_avx512
#define TARGET __attribute__((target(AVX512)))
#define COLUMNS 16
#include "_dct.h"
#endif

#define VARIANT(name, TARGET) \
    static const Variant name##_variant = {sizeof(Lanes_##name) / sizeof(float), \
                                           {forward_turned_##name, forward_straight_##name}, \
                                           {backward_turned_##name, backward_straight_##name}};
#include "_variants.h"

/* ----------------------------------------------------------------------------------------------------- chunks */

/* Room for one chunk, and what works on it. */
typedef struct {
    float *near; /* its elements: rows of a matrix lie a power of two apart, and would push each other out of the cache */
    float *turned, *chunk;
    size_t *each, *place; /* 0, 1, 2, ...; which columns of a chunk have coefficients */
    int64_t *slot;        /* and the other way round: -1 for the others */
    Room room;
    Search search;
    const Variant *variant;
    TopRow top_row;
} Scratch;

/* Where the elements of chunk (row, column) of a matrix begin. */
static size_t chunk_start(const Line *line, size_t row, size_t column) {
    size_t wide = (size_t)line->wide, stride = (size_t)line->across * wide;
    return (size_t)line->at + row * (size_t)line->high * stride + column * wide;
}

/* Of chunk (row, column) of a matrix: its coefficients, in s->chunk. */
static void forward_chunk(const float *x, const Line *line, size_t row, size_t column, const float *factors,
                          const Scratch *s) {
    size_t high = (size_t)line->high, wide = (size_t)line->wide;
    Rows rows = {x + chunk_start(line, row, column), (size_t)line->across * wide, high, wide,
                 factors + line->high_factors};
    Rows columns = {s->turned, high, wide, high, factors + line->wide_factors};
    s->variant->forward.turned(&rows, s->turned, s->each, &s->room);
    s->variant->forward.straight(&columns, s->chunk, high, &s->room);
}

/* The elements in s->near written (sign 0), added (1) or subtracted (-1). */
static void put_near(float *to, const Line *line, int sign, const Scratch *s) {
    size_t high = (size_t)line->high, wide = (size_t)line->wide, stride = (size_t)line->across * wide;
    for (size_t i = 0; i < high; i++) {
        const float *restrict y = s->near + i * wide;
        float *restrict out = to + i * stride;
        if (!sign) memcpy(out, y, sizeof(float) * wide);
        for (size_t j = 0; sign > 0 && j < wide; j++) out[j] += y[j];
        for (size_t j = 0; sign < 0 && j < wide; j++) out[j] -= y[j];
    }
}

/* From the coefficients in s->chunk, m columns of them, back to elements, put into the matrix. */
static void backward_chunk(float *x, const Line *line, size_t row, size_t column, const float *factors, size_t m,
                           const size_t *place, const Scratch *s, int sign) {
    size_t high = (size_t)line->high, wide = (size_t)line->wide;
    Rows columns = {s->chunk, m, wide, m, factors + line->wide_factors};
    Rows rows = {s->turned, wide, high, wide, factors + line->high_factors};
    s->variant->backward.turned(&columns, s->turned, place, &s->room);
    s->variant->backward.straight(&rows, s->near, wide, &s->room);
    put_near(x + chunk_start(line, row, column), line, sign, s);
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

/* Which row of a chunk laid on its side a place is in; `shift` is the logarithm of `high`, or -1. */
BODY size_t row_of(size_t at, size_t high, int shift) { return shift < 0 ? at / high : at >> shift; }

static int logarithm(size_t n) { return n & (n - 1) ? -1 : __builtin_ctzll(n); }

/* Lay `count` values at places from `start` on into the columns of s->chunk that have any, which is zero before: the
 * `used` columns of it are s->place. Returns how far apart its rows are: a multiple of what is transformed together. */
static size_t lay_out(const float *values, const int64_t *places, int64_t count, int64_t start, const Line *line,
                      const Scratch *s, size_t *used) {
    size_t high = (size_t)line->high, size = high * (size_t)line->wide, lanes = s->variant->lanes;
    int shift = logarithm(high);
    *used = 0;
    for (size_t k = 0; k < high; k++) s->slot[k] = -1;
    for (int64_t i = 0; i < count; i++) {
        size_t at = (size_t)(places[i] - start), k = at - row_of(at, high, shift) * high;
        if (at < size && s->slot[k] < 0) {
            s->place[*used] = k;
            s->slot[k] = (int64_t)(*used)++;
        }
    }
    size_t m = (*used + lanes - 1) / lanes * lanes;
    for (size_t c = *used; c < m; c++) s->place[c] = high; /* a row of s->turned that nobody reads */
    for (int64_t i = 0; i < count; i++) {
        size_t at = (size_t)(places[i] - start), row = row_of(at, high, shift);
        if (at < size) s->chunk[row * m + (size_t)s->slot[at - row * high]] = values[i];
    }
    return m;
}

/* All zero again, for the next chunk. */
static void cleared(const int64_t *places, int64_t count, int64_t start, const Line *line, const Scratch *s, size_t used,
                    size_t m) {
    size_t high = (size_t)line->high, wide = (size_t)line->wide;
    int shift = logarithm(high);
    for (size_t c = 0; c < used; c++) memset(s->turned + s->place[c] * wide, 0, sizeof(float) * wide);
    for (int64_t i = 0; i < count; i++) {
        size_t at = (size_t)(places[i] - start), row = row_of(at, high, shift);
        if (at < high * wide) s->chunk[row * m + (size_t)s->slot[at - row * high]] = 0.0f;
    }
}

/* The elements of chunks whose coefficients are `values` at `places`, and zero elsewhere. */
static void put_chunks(const Buffers *all, const Line *line, Scratch *s) {
    int64_t size = line->high * line->wide, count = line->count;
    EACH_CHUNK(line, number, row, column) {
        int64_t place = line->place + (int64_t)number * count, start = line->at + (int64_t)number * size;
        const int64_t *places = all->places + place;
        size_t used, m = lay_out(all->values + place, places, count, start, line, s, &used);
        backward_chunk(all->x, line, row, column, all->factors, m, s->place, s, all->sign);
        cleared(places, count, start, line, s, used, m);
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
            backward_chunk(all->x, line, row, column, all->factors, (size_t)line->high, s->each, s, 0);
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

/* `bytes` of a block of memory that `next` goes through; only counted where there is no block yet. */
static void *taken(char **next, size_t *total, size_t bytes) {
    size_t whole = (bytes + 63) / 64 * 64;
    char *here = *next;
    if (here) *next += whole;
    *total += whole;
    return here;
}

/* Everything in a scratch, for chunks of `size` and sides of `side`, with room for `found` in a search. */
static size_t lay_scratch(Scratch *s, char *block, size_t size, size_t side, size_t found) {
    size_t total = 0, rows = sizeof(float) * MOST_LANES * side, wider = side + MOST_LANES;
    s->room.a = taken(&block, &total, rows);
    s->room.b = taken(&block, &total, rows);
    s->room.some = taken(&block, &total, rows);
    s->room.done = taken(&block, &total, rows);
    s->near = taken(&block, &total, sizeof(float) * size);
    s->turned = taken(&block, &total, sizeof(float) * (size + side)); /* and the row that nobody reads */
    s->chunk = taken(&block, &total, sizeof(float) * (size + MOST_LANES * side));
    s->each = taken(&block, &total, sizeof(size_t) * wider);
    s->place = taken(&block, &total, sizeof(size_t) * wider);
    s->slot = taken(&block, &total, sizeof(int64_t) * wider);
    s->search.places = taken(&block, &total, sizeof(int64_t) * found);
    s->search.magnitudes = taken(&block, &total, sizeof(int32_t) * found);
    return total;
}

/* Room for the largest chunk of any line, in one block that is returned; NULL, with an error, where there is none. */
static char *make_scratch(Scratch *s, const Line *line, Py_ssize_t lines) {
    size_t size = 1, side = 1, found = 1;
    for (Py_ssize_t i = 0; i < lines; i++) {
        size_t high = (size_t)line[i].high, wide = (size_t)line[i].wide;
        size_t wanted = room_for(high * wide, (size_t)line[i].count) + LANES, longer = high > wide ? high : wide;
        if (high * wide > size) size = high * wide;
        if (longer > side) side = longer;
        if (wanted > found) found = wanted;
    }
    char *block = calloc(lay_scratch(s, NULL, size, side, found) + 64, 1);
    if (!block) {
        PyErr_NoMemory();
        return NULL;
    }
    lay_scratch(s, block + (64 - (uintptr_t)block % 64), size, side, found);
    for (size_t i = 0; i < side; i++) s->each[i] = i;
    s->search.guess = -1;
    return block;
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
    char *block = make_scratch(&scratch, line, all.lines);
    if (!block) return NULL;
    Buffers buffers = {(float *)(uintptr_t)all.x, (float *)(uintptr_t)all.values, (int64_t *)(uintptr_t)all.places,
                       (const float *)(uintptr_t)all.factors, sign};
    void (*chunks)(const Buffers *, const Line *, Scratch *) =
        kind == TOP ? top_chunks : kind == PUT ? put_chunks : dense_chunks;
    scratch.variant = serving(instruction_set());
    scratch.top_row = top_row_of(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.lines; i++) chunks(&buffers, line + i, &scratch);
    Py_END_ALLOW_THREADS
    free(block);
    Py_RETURN_NONE;
}
