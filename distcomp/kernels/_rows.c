/* Many short rows of a flat buffer in one call: which elements are the largest, how their places are written, and
 * moving pieces from one buffer to another. compressors/sparse.py says the same in torch, row by row.
 *
 * A table has one line for each row, made by Python (kernels/rows.py); none is followed outside its buffers.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_inside.h"
#include "_rows.h"

typedef struct {
    int64_t start, length, count; /* of the row in the flat buffer; how many of its elements are sent */
    int64_t place, code;          /* where its places and its bytes begin */
    int64_t width;                /* of an index within its chunk; BITMAP or NOTHING */
} Row;

#define BITMAP (-1)
#define NOTHING (-2)
#define WIDEST 15
#define SCANS 4 /* up to so many largest are found one after the other */

static size_t bytes_of(size_t bits) { return (bits + 7) / 8; }

/* ------------------------------------------------------------------------------------------------------ which */

static void magnitudes(const float *x, int32_t *out, size_t n) {
    memcpy(out, x, 4 * n);
    for (size_t j = 0; j < n; j++) out[j] &= 0x7fffffff;
}

/* The few largest, one scan after the other; of equal ones the first. Those that are taken become -1. */
static void take_largest(int32_t *m, size_t n, size_t count) {
    for (size_t taken = 0; taken < count; taken++) {
        int32_t largest = -1;
        for (size_t j = 0; j < n; j++) largest = m[j] > largest ? m[j] : largest;
        size_t at = 0;
        while (m[at] != largest) at++;
        m[at] = -1;
    }
}

/* The count-th largest, by its bytes from the top down; *above: how many are larger. */
static int32_t edge_of(const int32_t *m, size_t n, size_t count, size_t *above) {
    uint32_t prefix = 0, known = 0;
    *above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        size_t bins[256] = {0};
        for (size_t j = 0; j < n; j++)
            if (((uint32_t)m[j] & known) == prefix) bins[(uint32_t)m[j] >> shift & 255]++;
        uint32_t bin = 255;
        while (*above + bins[bin] < count) *above += bins[bin--];
        prefix |= bin << shift;
        known |= 255u << shift;
    }
    return (int32_t)prefix;
}

#define TABLES 4 /* of counts: an element need not wait for its neighbour's */

/* The elements whose exponents are those of the `count` largest, or larger: their magnitudes, and where they are.
 * Returns how many there are, few of a long row. */
static size_t candidates(const float *x, size_t n, size_t count, int32_t *m, int64_t *places) {
    uint32_t bins[TABLES][256] = {{0}}, bits;
    size_t reached = 0, found = 0;
    for (size_t j = 0; j < n; j++) {
        memcpy(&bits, x + j, 4);
        bins[j % TABLES][bits >> 23 & 255]++;
    }
    int32_t bin = 256;
    while (reached < count) {
        bin--;
        for (int t = 0; t < TABLES; t++) reached += bins[t][bin];
    }
    for (size_t j = 0; j < n; j++) {
        memcpy(&bits, x + j, 4);
        m[found] = (int32_t)(bits & 0x7fffffffu);
        places[found] = (int64_t)j;
        found += m[found] >= bin << 23;
    }
    return found;
}

/* `m` and `where` are scratch, of as many elements as the row has. */
static void top_row(const float *x, const Row *row, int32_t *m, int64_t *where, int64_t *places) {
    size_t n = (size_t)row->length, count = (size_t)row->count, above;
    int64_t *out = places + row->place;
    if (count == n) {
        for (size_t j = 0; j < n; j++) out[j] = row->start + (int64_t)j;
        return;
    }
    if (count <= SCANS) {
        magnitudes(x + row->start, m, n);
        take_largest(m, n, count);
        for (size_t j = 0, found = 0; found < count; j++)
            if (m[j] < 0) out[found++] = row->start + (int64_t)j;
        return;
    }
    size_t likely = candidates(x + row->start, n, count, m, where);
    int32_t edge = edge_of(m, likely, count, &above);
    size_t ties = count - above;
    for (size_t j = 0, found = 0; found < count; j++)
        if (m[j] > edge || (m[j] == edge && ties && ties--)) out[found++] = row->start + where[j];
}

/* ------------------------------------------------------------------------------------------------ how written */

static size_t unary_bits(const Row *row) {
    return (size_t)(row->count + ((row->length - 1) >> row->width));
}

/* Bit `place` of `bits` packed ones: in planes, as packing.py has it. */
static void set_bit(uint8_t *out, size_t bits, size_t place) {
    size_t height = bytes_of(bits);
    out[place % height] |= (uint8_t)(1u << place / height);
}

/* The places of the first `count` ones, rising; 0 for those that are missing. */
static void ones(const uint8_t *in, size_t bits, size_t count, int64_t *out) {
    size_t height = bytes_of(bits), found = 0;
    for (size_t place = 0; place < bits && found < count;) {
        size_t plane = place / height, end = (plane + 1) * height < bits ? (plane + 1) * height : bits;
        for (const uint8_t *byte = in; place < end && found < count; place++, byte++)
            if (*byte >> plane & 1) out[found++] = (int64_t)place;
    }
    for (; found < count; found++) out[found] = 0;
}

/* The low `width` bits of each index, as parts of 8, 4, 2 and 1 bits in planes. Returns the bytes. */
static size_t write_low(const int64_t *places, const Row *row, uint8_t *out) {
    size_t count = (size_t)row->count, at = 0;
    int shift = 0;
    for (int part = 8; part; part /= 2) {
        if (!(row->width & part)) continue;
        size_t height = bytes_of(count * (size_t)part), j = 0;
        int place = 0;
        for (size_t i = 0; i < count; i++) {
            uint64_t index = (uint64_t)(places[i] - row->start);
            out[at + j] |= (uint8_t)((index >> shift & ((1u << part) - 1)) << place);
            if (++j == height) j = 0, place += part;
        }
        at += height;
        shift += part;
    }
    return at;
}

static size_t read_low(const uint8_t *in, const Row *row, int64_t *places) {
    size_t count = (size_t)row->count, at = 0;
    int shift = 0;
    for (int part = 8; part; part /= 2) {
        if (!(row->width & part)) continue;
        size_t height = bytes_of(count * (size_t)part), j = 0;
        int place = 0;
        for (size_t i = 0; i < count; i++) {
            places[i] += (int64_t)(in[at + j] >> place & ((1 << part) - 1)) << shift;
            if (++j == height) j = 0, place += part;
        }
        at += height;
        shift += part;
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
static int write_row(const int64_t *all, const Row *row, uint8_t *codes) {
    const int64_t *places = all + row->place;
    uint8_t *out = codes + row->code;
    size_t count = (size_t)row->count;
    for (size_t i = 0; i < count; i++)
        if (places[i] < row->start || places[i] >= row->start + row->length) return 0;
    if (row->width == NOTHING) return 1;
    if (row->width == BITMAP) {
        memset(out, 0, bytes_of((size_t)row->length));
        for (size_t i = 0; i < count; i++) set_bit(out, (size_t)row->length, (size_t)(places[i] - row->start));
        return 1;
    }
    size_t bits = unary_bits(row), low = low_bytes(row);
    memset(out, 0, low + bytes_of(bits));
    write_low(places, row, out);
    for (size_t i = 0; i < count; i++)
        set_bit(out + low, bits, (size_t)((places[i] - row->start) >> row->width) + i);
    return 1;
}

static void read_row(const uint8_t *codes, const Row *row, int64_t *all) {
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
        read_low(in, row, places);
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

#define TABLE(all) (const Row *)(uintptr_t)(all).table
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
    size_t longest = 0;
    if (!PyArg_ParseTuple(args, "KK(nn)Kn", &all.x, &all.places, &all.x_size, &all.places_size, &all.table, &all.rows))
        return NULL;
    if (!are_inside(&all, value_row_is_inside)) return NULL;
    const Row *row = TABLE(all);
    for (Py_ssize_t i = 0; i < all.rows; i++)
        if ((size_t)row[i].length > longest) longest = (size_t)row[i].length;
    int64_t *where = calloc(longest + 1, sizeof *where + sizeof(int32_t));
    if (!where) return PyErr_NoMemory();
    int32_t *m = (int32_t *)(where + longest + 1);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.rows; i++) top_row((const float *)(uintptr_t)all.x, &row[i], m, where, PLACES(all));
    Py_END_ALLOW_THREADS
    free(where);
    Py_RETURN_NONE;
}

static int parsed(PyObject *args, Rows *all) {
    return PyArg_ParseTuple(args, "KK(nn)Kn", &all->places, &all->codes, &all->places_size, &all->codes_size,
                            &all->table, &all->rows) &&
           are_inside(all, code_row_is_inside);
}

PyObject *py_write_rows(PyObject *self, PyObject *args) {
    (void)self;
    Rows all = {0};
    if (!parsed(args, &all)) return NULL;
    const Row *row = TABLE(all);
    Py_ssize_t written = 0;
    Py_BEGIN_ALLOW_THREADS
    while (written < all.rows && write_row(PLACES(all), &row[written], CODES(all))) written++;
    Py_END_ALLOW_THREADS
    if (written < all.rows) return outside("a place in row", written);
    Py_RETURN_NONE;
}

PyObject *py_read_rows(PyObject *self, PyObject *args) {
    (void)self;
    Rows all = {0};
    if (!parsed(args, &all)) return NULL;
    const Row *row = TABLE(all);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.rows; i++) read_row(CODES(all), &row[i], PLACES(all));
    Py_END_ALLOW_THREADS
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
