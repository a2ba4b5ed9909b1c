/* A coder for the bytes of a payload (asymmetric numeral systems: Duda, 2013), block by block: no divisions, fractions of
 * a bit for a frequent byte, and 32 states at once.
 *
 * The columns of a weight matrix have gradients of different sizes, which blocks of scales along its rows do not even
 * out; nor are the blocks alike. So each 16 KiB, a stretch, say how long a row is, the period, and how much dearer than
 * usual each column is, in 3 bits; every 128 bytes of it say the same in 3. Of how many of three thresholds the
 * sum of both is not below is the number of the table that a byte is coded by. The stream: 4 bytes for each block (its
 * length, and in the lowest bit whether it is coded), then the blocks. A coded block:
 *
 *   1 byte    tables: 1 or 4
 *   if 4      3 bytes, the thresholds; for each stretch its period (2 bytes), levels of columns and levels of rows of 128
 *             bytes (8 levels in 3 bytes, the first lowest, and filled up with zeros)
 *   then      of each table how many of its 2048 slots each of the 256 bytes has, one more, in Elias's gamma code: zeros,
 *             as many as bits follow the first, which is 1, and these, the lowest first; filled up to a byte
 *   then      words of 2 bytes
 *   then      32 states, 4 bytes each: byte i of the block is pulled from state i % 32 (_ans.h), which takes the next word
 *             if it needs one. After the last word all are 2^15
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

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#endif

#define BLOCK ((size_t)1 << 19)   /* BLOCK in entropy.py */
#define STRETCH ((size_t)1 << 14) /* STRETCH there */
#define STRETCHES (BLOCK / STRETCH)
#define ROW ((size_t)128)
#define ROWS (STRETCH / ROW)
#define LONGEST_PERIOD 1024 /* LONGEST_PERIOD there */
#define LEVELS_OF_ONE 8     /* of a column, and of a row */
#define LEVELS (2 * LEVELS_OF_ONE - 1)
#define LEVEL 5 /* sixteenths of a bit from one to the next */
#define TABLES 4
#define LOG_SLOTS 11
#define SLOTS (1u << LOG_SLOTS)
#define LEAST (1u << 15) /* of a state, which is below 2^16 times as much */
#define STATES 32
#define STATE_BYTES (4 * STATES)
#define ROOM (2 * STATES + 16) /* what STATES bytes may take, and what is stored at once beyond */
#define SYMBOLS 256
#define HEAD_MOST (TABLES + STRETCHES * (2 + 3 * (LONGEST_PERIOD + ROWS) / 8) + \
                   TABLES * SYMBOLS * (2 * LOG_SLOTS + 1) / 8 + 1)
#define FEWEST_DIVIDED ((size_t)1 << 11) /* of fewer bytes, four tables take what they save */
#define INLINE static inline __attribute__((always_inline))

/* How a block's bytes are divided between its tables. */
typedef struct {
    uint16_t periods[STRETCHES];
    uint8_t columns[STRETCHES][LONGEST_PERIOD], rows[STRETCHES][ROWS]; /* their levels */
    uint8_t thresholds[TABLES - 1];
} Division;

/* How a block may be coded. */
typedef struct {
    size_t tables, length;
    uint8_t head[HEAD_MOST]; /* `length` bytes of it */
    uint16_t slots[TABLES][SYMBOLS];
    double bytes; /* which the block then takes, about */
} Choice;

/* What a byte is pushed by: see _ans.h. */
typedef struct {
    uint32_t inverse, share; /* SLOTS - f, 2^12 times u - 1, 2^16 times c */
} Step;

/* Of eight states, by a mask of some: how many of these come before each, and these, last in line. */
typedef struct {
    uint8_t ranks[256][8], last[256][8];
} Lanes;

typedef struct {
    Division division;
    uint8_t prices[STRETCH], of[STRETCH]; /* of a stretch's bytes, levels or tables */
    uint16_t places[STRETCH];             /* 2^8 times these, and the bytes */
    uint32_t counts[LEVELS * SYMBOLS];    /* by place, of all stretches' levels */
    Choice one, four;
    Step steps[TABLES * SYMBOLS];
    Lanes lanes;
} Encoder;

typedef struct {
    Division division;
    uint8_t of[STRETCH]; /* the table of each of a stretch's bytes */
    uint16_t slots[TABLES][SYMBOLS];
    uint32_t slots_of[TABLES * SLOTS];
    Lanes lanes;
} Decoder;

/* The last byte is pushed first, and words are written from the end on: so they are read from the first to the last. */
typedef struct {
    uint8_t *out;         /* where the last word that was written begins */
    const uint8_t *least; /* where it may begin */
    uint32_t states[STATES];
} Writer;

typedef struct {
    const uint8_t *in, *end; /* STATE_BYTES follow the last word, so that eight can be loaded */
    uint32_t states[STATES];
} Reader;

typedef struct {
    const int64_t *each;
    size_t count;
} Periods;

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static uint64_t load_8(const void *from) {
    uint64_t word;
    memcpy(&word, from, 8);
    return word;
}

static size_t stretches_in(size_t n) { return (n + STRETCH - 1) / STRETCH; }

#include "_prices.h"
#include "_ans.h"
#include "_division.h"
#include "_choice.h"
#ifdef HAVE_AVX2
#include "_ans_avx2.h"
#endif

/* ------------------------------------------------------------------------------------------------------ encode */

/* The bytes of a stretch, which are placed; whether there was room. */
INLINE int push_stretch(size_t n, const Encoder *e, Writer *w, int avx2) {
    const uint16_t *places = e->places;
    size_t i = n;
    if (w->out - w->least < ROOM) return 0;
    for (; i % STATES; i--) { /* of the last stretch only */
        uint32_t *state = &w->states[(i - 1) % STATES];
        *state = push(*state, e->steps[places[i - 1]], &w->out);
    }
#ifdef HAVE_AVX2
    if (avx2) return push_avx2(places, i, e->steps, &e->lanes, w) == 0;
#endif
    (void)avx2;
    uint8_t *out = w->out;
    for (; i && out - w->least >= ROOM; i -= STATES)
        for (size_t k = STATES; k--;) w->states[k] = push(w->states[k], e->steps[places[i - STATES + k]], &out);
    w->out = out;
    return i == 0;
}

/* The coded block to the end of `out`, which has room for n bytes. Returns its length; 0 where it is not shorter. */
INLINE size_t coded_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e, int avx2) {
    const Choice *choice = chosen_tables(data, n, periods, e, avx2);
    if (!choice || n < choice->length + STATE_BYTES) return 0;
    for (size_t t = 0; t < choice->tables; t++) write_steps(choice->slots[t], e->steps + t * SYMBOLS);
    if (choice->tables == 1) memset(e->of, 0, STRETCH);
    Writer w = {.out = out + n - STATE_BYTES, .least = out + choice->length};
    for (int k = 0; k < STATES; k++) w.states[k] = LEAST;
    for (size_t stretch = stretches_in(n); stretch--;) {
        size_t at = stretch * STRETCH, m = smaller(STRETCH, n - at);
        if (choice->tables > 1) divide(&e->division, stretch, m, e->of);
        place(data + at, e->of, m, 0, e->places);
        if (!push_stretch(m, e, &w, avx2)) return 0;
    }
    memcpy(out + n - STATE_BYTES, w.states, STATE_BYTES);
    memcpy(w.out - choice->length, choice->head, choice->length);
    return (size_t)(out + n - w.out) + choice->length;
}

/* ------------------------------------------------------------------------------------------------------ decode */

/* The bytes of a stretch; whether all their words were there. */
INLINE int pull_stretch(const Decoder *d, size_t n, Reader *r, uint8_t *out, int avx2) {
    size_t i = 0;
#ifdef HAVE_AVX2
    if (avx2) i = pull_avx2(d->of, n, d->slots_of, &d->lanes, r, out);
#endif
    (void)avx2;
    const uint8_t *in = r->in;
    for (; i < n && in <= r->end; i++) {
        uint32_t *state = &r->states[i % STATES], slot = d->slots_of[d->of[i] * SLOTS + *state % SLOTS];
        out[i] = (uint8_t)slot;
        *state = pull(*state, slot, &in);
    }
    r->in = in;
    return in <= r->end;
}

/* Where the words begin, and in how many tables the bytes are; NULL where it is none. */
static const uint8_t *read_head(const uint8_t *in, const uint8_t *end, size_t n, Decoder *d, size_t *tables) {
    *tables = *in++;
    if (*tables != 1 && *tables != TABLES) return NULL;
    if (*tables > 1 && !(in = read_division(&d->division, n, in, end))) return NULL;
    if (!(in = read_slots(in, end, *tables, d->slots))) return NULL;
    for (size_t t = 0; t < *tables; t++) write_slots_of(d->slots[t], d->slots_of + t * SLOTS);
    return in;
}

INLINE int decoded_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d, int avx2) {
    if (length < 1 + STATE_BYTES) return 0;
    size_t tables;
    Reader r = {.end = in + length - STATE_BYTES};
    if (!(r.in = read_head(in, r.end, n, d, &tables))) return 0;
    memcpy(r.states, r.end, STATE_BYTES);
    if (tables == 1) memset(d->of, 0, STRETCH);
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        size_t m = smaller(STRETCH, n - at);
        if (tables > 1) divide(&d->division, stretch, m, d->of);
        if (!pull_stretch(d, m, &r, out + at, avx2)) return 0;
    }
    uint32_t other = 0;
    for (int k = 0; k < STATES; k++) other |= r.states[k] ^ LEAST;
    return r.in == r.end && !other;
}

/* ------------------------------------------------------------------------------------------- instruction sets */

typedef struct {
    size_t (*encode)(const uint8_t *, size_t, uint8_t *, Periods, Encoder *);
    int (*decode)(const uint8_t *, size_t, uint8_t *, size_t, Decoder *);
} Variant;

#define VARIANT(name, TARGET, avx2) \
    TARGET static size_t encode_##name(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) { \
        return coded_block(data, n, out, periods, e, avx2); \
    } \
    TARGET static int decode_##name(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) { \
        return decoded_block(in, length, out, n, d, avx2); \
    } \
    static const Variant name##_variant = {encode_##name, decode_##name};

VARIANT(generic, , 0)
#ifdef HAVE_AVX2
VARIANT(avx2, AVX2, 1)
#endif

static const Variant *serving(void) {
#ifdef HAVE_AVX2
    __builtin_cpu_init();
    if (strcmp(instruction_set(), "generic") && __builtin_cpu_supports("bmi2")) return &avx2_variant;
#endif
    return &generic_variant;
}

/* Returns the length, and in the lowest bit whether it is coded. */
static uint32_t encode_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) {
    size_t length = serving()->encode(data, n, out, periods, e);
    if (length) return (uint32_t)length << 1 | 1;
    memcpy(out, data, n);
    return (uint32_t)n << 1;
}

static int decode_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) {
    return serving()->decode(in, length, out, n, d);
}

/* ---------------------------------------------------------------------------------------------- Python's side */

/* Blocks `first` to `first + count` of the data, each to the end of its own BLOCK bytes of `out`. */
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
    choose_lanes(&encoder->lanes);
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
    choose_lanes(&decoder->lanes);
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
