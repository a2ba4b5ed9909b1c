/* A coder for the bytes of a payload (Huffman, 1952), block by block: no divisions, and four streams at once.
 *
 * The columns of a weight matrix have gradients of different sizes, which blocks of scales along its rows do not even
 * out; nor are the blocks alike. So each 16 KiB, a stretch, say how long a row is, the period, and how much dearer than
 * usual each column is, in 3 bits; every 128 bytes of it say the same in 3. Of how many of three thresholds the
 * sum of both is not below is the number of the table that a byte is coded by. The stream: 4 bytes for each block (its length, and in
 * the lowest bit whether it is coded), then the blocks. A coded block:
 *
 *   1 byte    tables: 1 or 4
 *   if 4      3 bytes, the thresholds; for each stretch its period (2 bytes), levels of columns (3 bits each, filled up
 *             to a byte) and levels of rows of 128 bytes (3 bits each, filled up to a byte)
 *   then      of each table the lengths of 256 codes, 4 bits each: 0 where a byte has none, 15 where no other has one and
 *             it takes no bits; codes are numbered by length, then by byte, and lie in the stream with the first bit
 *             lowest
 *   then      the lengths of the first three of four streams (4 bytes each), and the streams, each of a quarter of the
 *             block's bytes, the first three of as many whole ones as a quarter has
 *
 * Bytes that no encoder wrote decode to other bytes or are refused; they never lead outside a buffer.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_entropy.h"
#include "_inside.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the stream is little-endian; on this machine distcomp uses its plain-torch reference"
#endif

#define BLOCK ((size_t)1 << 19)   /* BLOCK in entropy.py */
#define STRETCH ((size_t)1 << 14) /* STRETCH there */
#define STRETCHES (BLOCK / STRETCH)
#define ROW ((size_t)128)
#define ROWS (STRETCH / ROW)
#define LONGEST_PERIOD 1024 /* LONGEST_PERIOD there */
#define COLUMN_BITS 3
#define ROW_BITS 3
#define LEVELS ((1 << COLUMN_BITS) + (1 << ROW_BITS) - 1) /* of a column and a row together */
#define LEVEL 5 /* sixteenths of a bit from one to the next */
#define TABLES 4
#define STREAMS 4
#define LONGEST 12 /* bits of a code */
#define SLOTS (1u << LONGEST)
#define ALONE 15 /* the only byte of its table */
#define SYMBOLS 256
#define TABLE_BYTES (SYMBOLS / 2)
#define HEAD_MOST (1 + TABLES + STRETCHES * (4 + LONGEST_PERIOD * COLUMN_BITS / 8 + ROWS * ROW_BITS / 8) + \
                   TABLES * TABLE_BYTES + 4 * STREAMS)
#define FEWEST_DIVIDED ((size_t)1 << 11) /* of fewer bytes, four tables take what they save */
#define SLACK 8 /* bytes that are read or written a word at a time */
#define INLINE static inline __attribute__((always_inline))

/* How a block's bytes are divided between its tables. */
typedef struct {
    uint16_t periods[STRETCHES];
    uint8_t columns[STRETCHES][LONGEST_PERIOD], rows[STRETCHES][ROWS]; /* their levels */
    uint8_t thresholds[TABLES - 1];
    uint8_t table_of[BLOCK]; /* of each byte */
} Division;

typedef struct {
    Division division;
    uint8_t prices[STRETCH], head[HEAD_MOST];
    float means[LONGEST_PERIOD];
    uint64_t codes[SYMBOLS][TABLES]; /* the code in the highest bits, and its length in the lowest byte */
} Encoder;

typedef struct {
    Division division;
    uint16_t slots[SLOTS][TABLES]; /* the length of a code in the lower byte, and what it stands for in the upper */
} Decoder;

typedef struct {
    const int64_t *each;
    size_t count;
} Periods;

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static uint64_t load_8(const uint8_t *from) {
    uint64_t word;
    memcpy(&word, from, 8);
    return word;
}

#include "_huffman.h"
#include "_division.h"

/* ------------------------------------------------------------------------------------------------------ encode */

/* The buffer is filled from its upper end, so that the length in a code's lowest byte is at once what it is moved by:
 * of those bytes, what remains lies below all bits that count. */
#define PUSH(k) \
    do { \
        uint64_t code = codes[data[i + (k)]][table_of[i + (k)]]; \
        buffer = buffer >> (code & 63) | code; \
        filled += code; \
    } while (0)

#define PUSH_OUT \
    do { \
        uint64_t bits = filled & 63, word = buffer >> 1 >> (63 - bits); \
        memcpy(out, &word, 8); \
        out += bits >> 3; \
        filled = bits & 7; \
    } while (0)

/* Returns where the stream ends; writes up to SLACK bytes more. */
INLINE uint8_t *push_together(const uint8_t *data, const uint8_t *table_of, size_t n, const uint64_t (*codes)[TABLES],
                              uint8_t *out) {
    uint64_t buffer = 0, filled = 0;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) { /* 7 bits that were left, and four times LONGEST: 56 are above the lowest byte */
        PUSH(0);
        PUSH(1);
        PUSH(2);
        PUSH(3);
        PUSH_OUT;
    }
    for (; i < n; i++) {
        PUSH(0);
        PUSH_OUT;
    }
    uint64_t rest = buffer >> 1 >> (63 - filled);
    memcpy(out, &rest, 8);
    return out + (filled + 7) / 8;
}

/* What the bytes take by codes of their own for each table. */
static size_t bytes_by(uint32_t (*counts)[SYMBOLS], int tables, uint8_t (*lengths)[SYMBOLS]) {
    uint64_t bits = 0;
    for (int t = 0; t < tables; t++) {
        lengths_of(counts[t], lengths[t]);
        for (int s = 0; s < SYMBOLS; s++) bits += (uint64_t)counts[t][s] * (lengths[t][s] == ALONE ? 0 : lengths[t][s]);
    }
    return (size_t)(bits / 8);
}

/* How many tables there are to be (0: none pays), the lengths of their codes, and what bytes take by them. */
INLINE int tables_of(const uint8_t *data, size_t n, Periods periods, LookUp *look_up, Encoder *e,
                     uint8_t (*lengths)[SYMBOLS], size_t *bytes) {
    uint32_t counts[TABLES][SYMBOLS];
    count_bytes(data, n, STRETCH / 4, counts[0]);
    double whole = price_of_all(counts[0]) * (double)n + TABLE_BYTES;
    if (whole > (double)n * 127 / 128) return 0;
    if (n >= FEWEST_DIVIDED) {
        Prices prices = prices_of(counts[0]);
        for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++)
            levels_of(data + at, smaller(STRETCH, n - at), &prices, look_up, periods, stretch, e);
        choose_thresholds(&e->division, n);
        divide(&e->division, n);
        count_divided(data, e->division.table_of, n, counts);
        size_t told = (size_t)(write_division(&e->division, n, e->head) - e->head);
        *bytes = bytes_by(counts, TABLES, lengths);
        if ((double)(*bytes + told + TABLES * TABLE_BYTES) < whole) return TABLES;
    }
    memset(e->division.table_of, 0, n);
    count_bytes(data, n, STRETCH, counts[0]);
    *bytes = bytes_by(counts, 1, lengths);
    return 1;
}

/* The coded block into `out`, which has room for n bytes. Returns its length; 0 where it is not shorter. */
INLINE size_t coded_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, LookUp *look_up, Encoder *e) {
    uint8_t lengths[TABLES][SYMBOLS], *head = e->head;
    size_t bytes = 0, quarter = n / STREAMS;
    int tables = tables_of(data, n, periods, look_up, e, lengths, &bytes);
    if (!tables) return 0;
    *head++ = (uint8_t)tables;
    if (tables > 1) head = write_division(&e->division, n, head);
    for (int t = 0; t < tables; t++, head += TABLE_BYTES) {
        write_lengths(lengths[t], head);
        write_codes(lengths[t], (size_t)t, e->codes);
    }
    uint8_t *ends = head, *end = out + (head - e->head) + 4 * (STREAMS - 1);
    if ((size_t)(end - out) + bytes + STREAMS + SLACK > n) return 0;
    for (size_t k = 0; k < STREAMS; k++) {
        uint8_t *begin = end;
        end = push_together(data + k * quarter, e->division.table_of + k * quarter,
                            k + 1 < STREAMS ? quarter : n - k * quarter, (const uint64_t (*)[TABLES])e->codes, begin);
        uint32_t length = (uint32_t)(end - begin);
        if (k + 1 < STREAMS) memcpy(ends + 4 * k, &length, 4);
    }
    memcpy(out, e->head, (size_t)(ends - e->head) + 4 * (STREAMS - 1));
    return (size_t)(end - out);
}

/* ------------------------------------------------------------------------------------------------------ decode */

/* Where four streams stand: bits from `in` on, and how many bytes have come of each. */
typedef struct {
    const uint8_t *in;
    uint64_t at[STREAMS], end[STREAMS];
    size_t done;
} Streams;

#define LOAD(k) uint64_t buffer##k = load_8(in + (at##k >> 3)) >> (at##k & 7)

#define PULL(k, place) \
    do { \
        uint32_t slot = slots[buffer##k & (SLOTS - 1)][of[place]]; \
        to[place] = (uint8_t)(slot >> 8); \
        buffer##k >>= slot & 63; \
        at##k += (uint8_t)slot; \
    } while (0)

#define PULL_FROM_EACH(j) PULL(0, j); PULL(1, quarter + (j)); PULL(2, twice + (j)); PULL(3, thrice + (j))

/* Of each stream four bytes at a time, while a word can be loaded from it and a quarter has as many. */
INLINE void pull_together(const uint16_t (*slots)[TABLES], Streams *s, const uint8_t *table_of, uint8_t *out,
                          size_t quarter) {
    const uint8_t *in = s->in, *of = table_of, *last = table_of + (quarter & ~(size_t)3);
    const size_t twice = 2 * quarter, thrice = 3 * quarter;
    const uint64_t most[STREAMS] = {s->end[0] - 64, s->end[1] - 64, s->end[2] - 64, s->end[3] - 64};
    uint64_t at0 = s->at[0], at1 = s->at[1], at2 = s->at[2], at3 = s->at[3];
    uint8_t *to = out;
    for (int k = 0; k < STREAMS; k++)
        if (s->end[k] < 64) return;
    for (; of < last && at0 <= most[0] && at1 <= most[1] && at2 <= most[2] && at3 <= most[3]; of += 4, to += 4) {
        LOAD(0);
        LOAD(1);
        LOAD(2);
        LOAD(3);
        PULL_FROM_EACH(0);
        PULL_FROM_EACH(1);
        PULL_FROM_EACH(2);
        PULL_FROM_EACH(3);
    }
    s->at[0] = at0, s->at[1] = at1, s->at[2] = at2, s->at[3] = at3;
    s->done = (size_t)(to - out);
}

/* The rest of one, carefully. Whether it ends with its last bit. */
static int pull_rest(const uint16_t (*slots)[TABLES], const Streams *s, size_t k, const uint8_t *table_of, uint8_t *out,
                     size_t n) {
    uint64_t at = s->at[k];
    for (size_t i = s->done; i < n; i++) {
        uint32_t bits = 0;
        for (unsigned b = 0; b < 3 && (at >> 3) + b < s->end[k] >> 3; b++) bits |= (uint32_t)s->in[(at >> 3) + b] << 8 * b;
        uint32_t slot = slots[bits >> (at & 7) & (SLOTS - 1)][table_of[i]];
        out[i] = (uint8_t)(slot >> 8);
        at += (uint8_t)slot;
        if (at > s->end[k]) return 0;
    }
    return s->end[k] - at < 8;
}

INLINE int decoded_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) {
    const uint8_t *end = in + length, *table_of = d->division.table_of;
    const uint16_t(*slots)[TABLES] = (const uint16_t(*)[TABLES])d->slots;
    size_t quarter = n / STREAMS, tables;
    if (!length || (*in != 1 && *in != TABLES)) return 0;
    tables = *in++;
    if (tables == 1) memset(d->division.table_of, 0, n);
    if (tables > 1 && !(in = read_division(&d->division, n, in, end))) return 0;
    if ((size_t)(end - in) < tables * TABLE_BYTES + 4 * (STREAMS - 1)) return 0;
    for (size_t t = 0; t < tables; t++, in += TABLE_BYTES)
        if (!slots_of(in, t, d->slots)) return 0;
    Streams s = {.in = in + 4 * (STREAMS - 1)};
    uint64_t begin = 0, whole = (uint64_t)(end - s.in);
    for (size_t k = 0; k < STREAMS; k++, in += 4) {
        uint32_t bytes = (uint32_t)(whole - begin);
        if (k + 1 < STREAMS) memcpy(&bytes, in, 4);
        if (bytes > whole - begin) return 0;
        s.at[k] = 8 * begin;
        s.end[k] = 8 * (begin += bytes);
    }
    pull_together(slots, &s, table_of, out, quarter);
    for (size_t k = 0; k < STREAMS; k++)
        if (!pull_rest(slots, &s, k, table_of + k * quarter, out + k * quarter, k + 1 < STREAMS ? quarter : n - k * quarter))
            return 0;
    return 1;
}

/* ------------------------------------------------------------------------------------------- instruction sets */

typedef struct {
    size_t (*encode)(const uint8_t *, size_t, uint8_t *, Periods, Encoder *);
    int (*decode)(const uint8_t *, size_t, uint8_t *, size_t, Decoder *);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static size_t encode_##name(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) { \
        return coded_block(data, n, out, periods, look_up_##name, e); \
    } \
    TARGET static int decode_##name(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) { \
        return decoded_block(in, length, out, n, d); \
    } \
    static const Variant name##_variant = {encode_##name, decode_##name};

VARIANT(generic, )
#ifdef HAVE_AVX2
VARIANT(avx2, AVX2)
#endif

static const Variant *chosen(void) {
#ifdef HAVE_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return &avx2_variant;
#endif
    return &generic_variant;
}

/* Returns the length, and in the lowest bit whether it is coded. */
static uint32_t encode_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) {
    size_t length = chosen()->encode(data, n, out, periods, e);
    if (length) return (uint32_t)length << 1 | 1;
    memcpy(out, data, n);
    return (uint32_t)n << 1;
}

static int decode_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) {
    return chosen()->decode(in, length, out, n, d);
}

/* ---------------------------------------------------------------------------------------------- Python's side */

/* Blocks `first` to `first + count` of the data, each into its own stretch of BLOCK bytes of `out`. */
PyObject *py_entropy_encode(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long data_at, out_at, lengths_at, periods_at;
    Py_ssize_t size, out_size, lengths_size, periods_size, first, count;
    if (!PyArg_ParseTuple(args, "KKKK(nnnn)nn", &data_at, &out_at, &lengths_at, &periods_at, &size, &out_size,
                          &lengths_size, &periods_size, &first, &count))
        return NULL;
    if (size < 0 || out_size < size || periods_size < 0 || !inside(first, count, lengths_size) ||
        lengths_size != size / (Py_ssize_t)BLOCK + !!(size % (Py_ssize_t)BLOCK))
        return refused("these numbers of blocks and bytes");
    const uint8_t *data = (const uint8_t *)(uintptr_t)data_at;
    uint8_t *out = (uint8_t *)(uintptr_t)out_at;
    uint32_t *lengths = (uint32_t *)(uintptr_t)lengths_at;
    Periods periods = {(const int64_t *)(uintptr_t)periods_at, (size_t)periods_size};
    Encoder *encoder = malloc(sizeof *encoder);
    if (!encoder) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t b = (size_t)first; b < (size_t)(first + count); b++)
        lengths[b] = encode_block(data + b * BLOCK, smaller(BLOCK, (size_t)size - b * BLOCK), out + b * BLOCK, periods,
                                  encoder);
    Py_END_ALLOW_THREADS
    free(encoder);
    Py_RETURN_NONE;
}

static uint32_t length_at(const uint8_t *coded, size_t block) {
    uint32_t length;
    memcpy(&length, coded + 4 * block, 4);
    return length;
}

/* Where block `first` begins, if all blocks together are exactly the stream; 0 if not. */
static size_t checked_start(const uint8_t *coded, size_t coded_size, size_t blocks, size_t size, size_t first) {
    size_t at = 4 * blocks, begin = 0;
    if (coded_size < at) return 0;
    for (size_t b = 0; b < blocks; b++) {
        uint32_t length = length_at(coded, b);
        size_t n = smaller(BLOCK, size - b * BLOCK);
        if (b == first) begin = at;
        if (length >> 1 > coded_size - at || length >> 1 > n || (!(length & 1) && length >> 1 != n)) return 0;
        at += length >> 1;
    }
    return at == coded_size ? begin : 0;
}

PyObject *py_entropy_decode(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long coded_at, out_at;
    Py_ssize_t coded_size, size, first, count;
    if (!PyArg_ParseTuple(args, "KK(nn)nn", &coded_at, &out_at, &coded_size, &size, &first, &count)) return NULL;
    Py_ssize_t blocks = size < 0 ? -1 : size / (Py_ssize_t)BLOCK + !!(size % (Py_ssize_t)BLOCK);
    if (blocks < 0 || coded_size < 0 || !inside(first, count, blocks)) return refused("these numbers of blocks");
    if (!count) Py_RETURN_TRUE;
    const uint8_t *coded = (const uint8_t *)(uintptr_t)coded_at;
    uint8_t *out = (uint8_t *)(uintptr_t)out_at;
    int good;
    Decoder *decoder = malloc(sizeof *decoder);
    if (!decoder) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    size_t at = checked_start(coded, (size_t)coded_size, (size_t)blocks, (size_t)size, (size_t)first);
    good = at != 0;
    for (size_t b = (size_t)first; good && b < (size_t)(first + count); b++) {
        uint32_t length = length_at(coded, b);
        size_t n = smaller(BLOCK, (size_t)size - b * BLOCK);
        if (length & 1)
            good = decode_block(coded + at, length >> 1, out + b * BLOCK, n, decoder);
        else
            memcpy(out + b * BLOCK, coded + at, n);
        at += length >> 1;
    }
    Py_END_ALLOW_THREADS
    free(decoder);
    return PyBool_FromLong(good);
}
