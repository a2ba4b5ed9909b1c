/* Many short rows of a flat buffer in one call: which elements are the largest, how their places are written, and
 * moving pieces from one buffer to another. compressors/sparse.py says the same in torch, row by row.
 *
 * A table has one line for each row, made by Python (kernels/rows.py); none is followed outside its buffers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "_cpu.h"
#include "_above.h"
#include "_inside.h"
#include "_rows.h"
#include "_top.h"

#define BITMAP (-1)
#define NOTHING (-2)
#define WIDEST 15

static size_t bytes_of(size_t bits) { return (bits + 7) / 8; }

/* ------------------------------------------------------------------------------------------------------ which
 *
 * A threshold is guessed and what reaches it is gathered in one pass; a guess that finds too few or too many is
 * narrowed by counting, which is cheap. Whatever the guess, the answer is the same. Magnitudes are compared as the
 * integers that their bits are: a NaN is above an infinity, and of equal ones the lower place is taken.
 */

#define SAMPLED_FROM 65536 /* rows longer than this are not counted before a sample was */

BODY int32_t magnitude_of(float x) { return (int32_t)(bits_of(x) & 0x7fffffffu); }

/* How many are above a threshold, which may be -1: all are. */
BODY size_t count_above(const float *x, size_t n, int32_t threshold) {
    size_t total = 0;
    for (size_t start = 0; start < n; start += STRETCH) {
        size_t end = smaller(start + STRETCH, n);
        uint32_t found = 0;
        for (size_t j = start; j < end; j++) found += magnitude_of(x[j]) > threshold;
        total += found;
    }
    return total;
}

BODY size_t count_kept(const int32_t *m, size_t n, int32_t threshold) {
    uint32_t found = 0;
    for (size_t j = 0; j < n; j++) found += m[j] > threshold;
    return found;
}

#define BLOCK 64 /* words of bits that are looked at together */
#define OFTEN 2  /* ones of a word that are written unasked: most have no more, and nothing is mispredicted */

/* The places of the ones of a word, from `place` on. Returns how many. */
BODY size_t ones_of(uint64_t word, int64_t place, int64_t *out) {
    size_t count = (size_t)__builtin_popcountll(word);
    for (size_t i = 0; i < OFTEN; i++, word &= word - 1)
        out[i] = place + __builtin_ctzll(word | (uint64_t)1 << (WORD - 1));
    for (size_t i = OFTEN; i < count; i++, word &= word - 1) out[i] = place + __builtin_ctzll(word);
    return count;
}

/* What is above the threshold, rising by place. Returns how many; the search ends where there are more than `most`. */
BODY size_t gather(const float *x, size_t n, int32_t threshold, const Search *s, size_t most, Above above) {
    size_t found = 0, start = 0;
    uint64_t bits[BLOCK];
    while (start + WORD <= n) {
        size_t words = smaller((n - start) / WORD, BLOCK), before = found;
        size_t total = above(x + start, words, threshold, bits);
        if (found + total > most) return found + total;
        for (size_t i = 0; i < words; i++) found += ones_of(bits[i], (int64_t)(start + i * WORD), s->places + found);
        for (size_t i = before; i < found; i++) s->magnitudes[i] = magnitude_of(x[s->places[i]]);
        start += words * WORD;
    }
    for (; start < n && found <= most; start++) {
        s->magnitudes[found] = magnitude_of(x[start]);
        s->places[found] = (int64_t)start;
        found += s->magnitudes[found] > threshold;
    }
    return found;
}

/* A number that exactly `count` of m are above; or, where ties allow none, the largest that `count` or more reach. All
 * are above `low`. Found by halving what it can be. */
BODY int32_t edge_of(const int32_t *m, size_t n, size_t count, int64_t low) {
    int32_t largest = -1;
    for (size_t j = 0; j < n; j++) largest = m[j] > largest ? m[j] : largest;
    if (n == count) return (int32_t)low;
    int64_t high = largest; /* more than `count` are above low, and fewer above high */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        size_t kept = count_kept(m, n, (int32_t)middle);
        if (kept == count) return (int32_t)middle;
        if (kept > count)
            low = middle;
        else
            high = middle;
    }
    return (int32_t)high;
}

/* A threshold that the largest `count` of a long row are most likely above, and few others: from a sample of it. */
BODY int32_t sampled_guess(const float *x, size_t n, size_t count, const Search *s) {
    size_t sample = 0;
    for (size_t start = 0; start + LANES <= n; start += LANES * STRIDE)
        for (size_t j = start; j < start + LANES; j++) s->magnitudes[sample++] = magnitude_of(x[j]);
    /* As dense in the sample as in the row, and a quarter and a few more: too low costs little, too high a pass. */
    size_t due = (size_t)((double)count / (double)n * (double)sample * 1.25) + 16;
    return due < sample ? edge_of(s->magnitudes, sample, due, -1) : -1;
}

/* From a guess that failed: a threshold that `count` to `most` are above; or, where ties allow none, the largest that
 * `count` are above. */
BODY int32_t narrowed(const float *x, size_t n, size_t count, size_t most, int32_t guess) {
    int64_t low = -1, high = INT32_MAX, threshold = guess, step = 1 << 19;
    while (high - low > 1) {
        size_t found = count_above(x, n, (int32_t)threshold);
        if (found >= count && found <= most) return (int32_t)threshold;
        int64_t near = found < count ? threshold - step : threshold + step; /* the edge is not far from the guess */
        if (found < count)
            high = threshold;
        else
            low = threshold;
        threshold = near > low && near < high ? near : low + (high - low) / 2;
        step *= 2;
    }
    return (int32_t)low;
}

/* All above the edge, and of those that equal it the first, until there are `count`. */
#define TAKE(n, magnitude, place) \
    for (size_t j = 0, taken = 0; taken < count && j < (n); j++) { \
        int32_t m = (magnitude); \
        size_t tie = (m == edge) & (ties > 0); \
        out[taken] = row->start + (place); /* written always, kept where it counts */ \
        ties -= tie; \
        taken += tie | (m > edge); \
    }

BODY void top_row_body(const float *all, const Row *row, Search *s, int64_t *places, Above above) {
    const float *x = all + row->start;
    size_t n = (size_t)row->length, count = (size_t)row->count;
    int64_t *out = places + row->place;
    if (count == n)
        for (size_t j = 0; j < n; j++) out[j] = row->start + (int64_t)j;
    if (count == n || !count) return;
    size_t most = count + count / 2 + (n > SAMPLED_FROM ? 64 * STRIDE : 32);
    if (n > SAMPLED_FROM) s->guess = sampled_guess(x, n, count, s);
    size_t found = gather(x, n, s->guess, s, most, above);
    if (found < count || found > most) {
        s->guess = narrowed(x, n, count, most, s->guess);
        found = gather(x, n, s->guess, s, most, above);
    }
    if (found > most) { /* more equal the edge than there is room for */
        int32_t edge = s->guess + 1;
        size_t ties = count - count_above(x, n, edge);
        TAKE(n, magnitude_of(x[j]), (int64_t)j)
        return;
    }
    int32_t edge = edge_of(s->magnitudes, found, count, s->guess);
    size_t ties = count - count_kept(s->magnitudes, found, edge);
    if (ties) {
        TAKE(found, s->magnitudes[j], s->places[j])
        return;
    }
    for (size_t j = 0, taken = 0; taken < count; j++) { /* the usual, in which no place waits for another's tie */
        out[taken] = row->start + s->places[j];
        taken += s->magnitudes[j] > edge;
    }
}

#define VARIANT(name, TARGET) \
    TARGET static void top_row_##name(const float *x, const Row *row, Search *s, int64_t *places) { \
        top_row_body(x, row, s, places, above_##name); \
    }

VARIANT(generic, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

TopRow top_row_of(const char *name) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (!strcmp(name, "avx512")) return top_row_avx512;
    if (!strcmp(name, "avx2")) return top_row_avx2;
#endif
    (void)name;
    return top_row_generic;
}

/* ------------------------------------------------------------------------------------------------ how written */

static size_t unary_bits(const Row *row) {
    return (size_t)(row->count + ((row->length - 1) >> row->width));
}

/* Where bit after bit is set, of packed ones: in planes, as packing.py has it. */
typedef struct {
    uint8_t *out;
    size_t height, first; /* bytes, and the place of the plane's first bit */
    int plane;
} Planes;

static Planes planes_of(uint8_t *out, size_t bits) { return (Planes){out, bytes_of(bits), 0, 0}; }

static void set_bit(Planes *to, size_t place) {
    if (place < to->first) to->first = 0, to->plane = 0; /* not the usual: they rise */
    while (place - to->first >= to->height) to->first += to->height, to->plane++;
    to->out[place - to->first] |= (uint8_t)(1u << to->plane);
}

/* Bit `plane` of each of 8 bytes, side by side: the product brings that of byte j to bit 56 + j, and no two together. */
static uint64_t plane_of_8(uint64_t bytes, int plane) {
    return ((bytes >> plane & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
}

/* The places of the first `count` ones, rising; 0 for those that are missing. */
static void ones(const uint8_t *in, size_t bits, size_t count, int64_t *out) {
    size_t height = bytes_of(bits), found = 0;
    for (int plane = 0; plane < 8; plane++)
        for (size_t start = 0; start < height; start += WORD) {
            size_t end = smaller(start + WORD, height), place = (size_t)plane * height + start;
            uint64_t word = 0;
            for (size_t j = start; j < end; j += 8) {
                uint64_t bytes = 0;
                memcpy(&bytes, in + j, smaller(8, end - j));
                word |= plane_of_8(bytes, plane) << (j - start);
            }
            for (; word && found < count; word &= word - 1) {
                size_t one = place + (size_t)__builtin_ctzll(word);
                if (one < bits) out[found++] = (int64_t)one;
            }
        }
    for (; found < count; found++) out[found] = 0;
}

/* The low `width` bits of each index, as parts of 8, 4, 2 and 1 bits in planes. `code` is room for a row's. Returns the
 * bytes. */
static size_t write_low(const int64_t *places, const Row *row, uint8_t *code, uint8_t *out) {
    size_t count = (size_t)row->count, at = 0;
    for (int shift = 0; shift < row->width; shift += 8) {
        int bits = row->width - shift < 8 ? (int)row->width - shift : 8;
        for (size_t i = 0; i < count; i++) code[i] = (uint8_t)((uint64_t)(places[i] - row->start) >> shift);
        at += pack(code, out + at, count, bits);
    }
    return at;
}

static size_t read_low(const uint8_t *in, const Row *row, uint8_t *code, int64_t *places) {
    size_t count = (size_t)row->count, at = 0;
    for (int shift = 0; shift < row->width; shift += 8) {
        int bits = row->width - shift < 8 ? (int)row->width - shift : 8;
        at += unpack(in + at, code, count, bits);
        for (size_t i = 0; i < count; i++) places[i] += (int64_t)code[i] << shift;
    }
    return at;
}

static size_t low_bytes(const Row *row) {
    size_t bytes = 0;
    for (int part = 8; part; part /= 2)
        if (row->width & part) bytes += bytes_of((size_t)row->count * (size_t)part);
    return bytes;
}

/* Returns 0, and writes nothing, where a place is not one of the row's. */
static int write_row(const int64_t *all, const Row *row, uint8_t *code, uint8_t *codes) {
    const int64_t *places = all + row->place;
    uint8_t *out = codes + row->code;
    size_t count = (size_t)row->count;
    for (size_t i = 0; i < count; i++)
        if (places[i] < row->start || places[i] >= row->start + row->length) return 0;
    if (row->width == NOTHING) return 1;
    if (row->width == BITMAP) {
        memset(out, 0, bytes_of((size_t)row->length));
        Planes all_bits = planes_of(out, (size_t)row->length);
        for (size_t i = 0; i < count; i++) set_bit(&all_bits, (size_t)(places[i] - row->start));
        return 1;
    }
    size_t bits = unary_bits(row), low = low_bytes(row);
    memset(out, 0, low + bytes_of(bits));
    write_low(places, row, code, out);
    Planes unary = planes_of(out + low, bits);
    for (size_t i = 0; i < count; i++) set_bit(&unary, (size_t)((places[i] - row->start) >> row->width) + i);
    return 1;
}

static void read_row(const uint8_t *codes, const Row *row, uint8_t *code, int64_t *all) {
    const uint8_t *in = codes + row->code;
    int64_t *places = all + row->place;
    size_t count = (size_t)row->count;
    if (row->width == NOTHING) {
        for (size_t i = 0; i < count; i++) places[i] = row->start + (int64_t)i;
        return;
    }
    if (row->width == BITMAP) {
        ones(in, (size_t)row->length, count, places);
    } else {
        ones(in + low_bytes(row), unary_bits(row), count, places);
        for (size_t i = 0; i < count; i++) places[i] = (places[i] - (int64_t)i) * ((int64_t)1 << row->width);
        read_low(in, row, code, places);
    }
    for (size_t i = 0; i < count; i++) { /* bytes that no encoder made give legal places, too */
        int64_t index = places[i] < 0 ? 0 : places[i] >= row->length ? row->length - 1 : places[i];
        places[i] = row->start + index;
    }
}

/* ---------------------------------------------------------------------------------------------- Python's side */

/* A table, and the buffers that it speaks of: values, places and codes, as far as they are given. */
typedef struct {
    unsigned long long x, places, codes, table;
    Py_ssize_t x_size, places_size, codes_size, rows;
} Rows;

#define TABLE(all) ((const Row *)(uintptr_t)(all).table)
#define PLACES(all) (int64_t *)(uintptr_t)(all).places
#define CODES(all) (uint8_t *)(uintptr_t)(all).codes

/* What all rows must be: some of a row's elements are sent, and their places lie in the buffer of places. */
static int row_is_possible(const Rows *all, const Row *row) {
    return row->start >= 0 && row->length >= 0 && row->start <= INT64_MAX - row->length && row->count <= row->length &&
           inside(row->place, row->count, all->places_size);
}

static int value_row_is_inside(const Rows *all, const Row *row) {
    return row_is_possible(all, row) && inside(row->start, row->length, all->x_size);
}

/* A bitmap of the row, or the low bits of count indices and count + length / 2^width bits. */
static int code_row_is_inside(const Rows *all, const Row *row) {
    if (!row_is_possible(all, row) || row->width < NOTHING || row->width > WIDEST) return 0;
    if (row->width == NOTHING) return inside(row->code, 0, all->codes_size);
    if (row->count > INT64_MAX >> (WIDEST + 1) || row->length > INT64_MAX / 2 || !row->length) return 0;
    size_t bytes = row->width == BITMAP ? bytes_of((size_t)row->length) : low_bytes(row) + bytes_of(unary_bits(row));
    return inside(row->code, (int64_t)bytes, all->codes_size);
}

static int are_inside(const Rows *all, int (*is_inside)(const Rows *, const Row *)) {
    for (Py_ssize_t i = 0; i < all->rows; i++)
        if (!is_inside(all, TABLE(*all) + i)) {
            outside("row", i);
            return 0;
        }
    return 1;
}

PyObject *py_top_rows(PyObject *self, PyObject *args) {
    (void)self;
    Rows all = {0};
    size_t room = 0;
    if (!PyArg_ParseTuple(args, "KK(nn)Kn", &all.x, &all.places, &all.x_size, &all.places_size, &all.table, &all.rows))
        return NULL;
    if (!are_inside(&all, value_row_is_inside)) return NULL;
    const Row *row = TABLE(all);
    for (Py_ssize_t i = 0; i < all.rows; i++) {
        size_t wanted = room_for((size_t)row[i].length, (size_t)row[i].count) + LANES;
        if (wanted > room) room = wanted;
    }
    Search search = {.places = calloc(room + 1, sizeof(int64_t) + sizeof(int32_t)), .guess = -1};
    if (!search.places) return PyErr_NoMemory();
    search.magnitudes = (int32_t *)(search.places + room + 1);
    TopRow top_row = top_row_of(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.rows; i++) top_row((const float *)(uintptr_t)all.x, &row[i], &search, PLACES(all));
    Py_END_ALLOW_THREADS
    free(search.places);
    Py_RETURN_NONE;
}

static int parsed(PyObject *args, Rows *all) {
    return PyArg_ParseTuple(args, "KK(nn)Kn", &all->places, &all->codes, &all->places_size, &all->codes_size,
                            &all->table, &all->rows) &&
           are_inside(all, code_row_is_inside);
}

/* Room for the indices' low bits of the longest row. NULL, with an error, where there is none. */
static uint8_t *room_for_codes(const Rows *all) {
    size_t most = 0;
    for (Py_ssize_t i = 0; i < all->rows; i++)
        if ((size_t)TABLE(*all)[i].count > most) most = (size_t)TABLE(*all)[i].count;
    uint8_t *code = malloc(most + 8);
    if (!code) PyErr_NoMemory();
    return code;
}

PyObject *py_write_rows(PyObject *self, PyObject *args) {
    (void)self;
    Rows all = {0};
    if (!parsed(args, &all)) return NULL;
    const Row *row = TABLE(all);
    Py_ssize_t written = 0;
    uint8_t *code = room_for_codes(&all);
    if (!code) return NULL;
    Py_BEGIN_ALLOW_THREADS
    while (written < all.rows && write_row(PLACES(all), &row[written], code, CODES(all))) written++;
    Py_END_ALLOW_THREADS
    free(code);
    if (written < all.rows) return outside("a place in row", written);
    Py_RETURN_NONE;
}

PyObject *py_read_rows(PyObject *self, PyObject *args) {
    (void)self;
    Rows all = {0};
    if (!parsed(args, &all)) return NULL;
    const Row *row = TABLE(all);
    uint8_t *code = room_for_codes(&all);
    if (!code) return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.rows; i++) read_row(CODES(all), &row[i], code, PLACES(all));
    Py_END_ALLOW_THREADS
    free(code);
    Py_RETURN_NONE;
}

/* Where a piece lies, where it goes, and how many float32 it has. */
typedef struct {
    int64_t from, to, numel;
} Move;

PyObject *py_move(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long from, to, table;
    Py_ssize_t pieces, from_size, to_size;
    if (!PyArg_ParseTuple(args, "KK(nn)Kn", &from, &to, &from_size, &to_size, &table, &pieces)) return NULL;
    const Move *piece = (const Move *)(uintptr_t)table;
    for (Py_ssize_t i = 0; i < pieces; i++)
        if (!inside(piece[i].from, piece[i].numel, from_size) || !inside(piece[i].to, piece[i].numel, to_size))
            return outside("move", i);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < pieces; i++, piece++)
        memmove((float *)(uintptr_t)to + piece->to, (const float *)(uintptr_t)from + piece->from,
                4 * (size_t)piece->numel);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
