/* A coder for the bytes of a payload (asymmetric numeral systems: Duda, 2013), block by block: no divisions, fractions of
 * a bit for a frequent byte, and eight states at once.
 *
 * The columns of a weight matrix have gradients of different sizes, which blocks of scales along its rows do not even
 * out; nor are the blocks alike. So each 16 KiB, a stretch, say how long a row is, the period, and how much dearer than
 * usual each column is, in 3 bits; every 128 bytes of it say the same in 3. Of how many of three thresholds the
 * sum of both is not below is the number of the table that a byte is coded by. The stream: 4 bytes for each block (its
 * length, and in the lowest bit whether it is coded), then the blocks. A coded block:
 *
 *   1 byte    tables, 1 or 4, and 8 times how many of the lowest bits to skip of the first byte of bits
 *   if 4      3 bytes, the thresholds; for each stretch its period (2 bytes), levels of columns and levels of rows of 128
 *             bytes (8 levels in 3 bytes, the first lowest, and filled up with zeros)
 *   then      of each table how many of its 2048 states each of the 256 bytes has, one more, in Elias's gamma code: zeros,
 *             as many as bits follow the first, which is 1, and these; filled up to a byte
 *   then      bits, the first lowest
 *   then      eight states, 2 bytes each: byte i of the block is what state i % 8 stands for in the table of that byte, and
 *             the state becomes what _ans.h says, by as many bits as are missing. With the last bit all become 0
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
#define LEVELS_OF_ONE 8     /* of a column, and of a row */
#define LEVELS (2 * LEVELS_OF_ONE - 1)
#define LEVEL 5 /* sixteenths of a bit from one to the next */
#define TABLES 4
#define LOG_SLOTS 11
#define SLOTS (1u << LOG_SLOTS)
#define SPREAD (SLOTS / 8 * 5 + 3) /* from one slot of a byte to its next; odd, so that none is passed twice */
#define STATES 8
#define STATE_BYTES (2 * STATES)
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

typedef struct {
    Division division;
    uint8_t prices[STRETCH], of[STRETCH]; /* of a stretch's bytes, levels or tables */
    uint16_t places[STRETCH];             /* 2^8 times these, and the bytes */
    uint32_t counts[LEVELS * SYMBOLS]; /* by place, of all stretches' levels */
    Choice one, four;
    /* Its states have SLOTS added. A state and `missing` have the number of bits to write above 2^16, and what is left of
     * the state is, with `first`, the place of the next. */
    uint32_t missing[TABLES * SYMBOLS], first[TABLES * SYMBOLS];
    uint16_t states[TABLES * SLOTS];
} Encoder;

typedef struct {
    Division division;
    uint8_t of[STRETCH]; /* the table of each of a stretch's bytes */
    uint16_t slots[TABLES][SYMBOLS];
    uint32_t states[SLOTS][TABLES]; /* a byte, 2^8 times the bits that are missing, 2^16 times what they are added to */
} Decoder;

typedef struct {
    const int64_t *each;
    size_t count;
} Periods;

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,bmi,bmi2")))
#endif

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static uint64_t load_8(const uint8_t *from) {
    uint64_t word;
    memcpy(&word, from, 8);
    return word;
}

/* So many of the lowest bits, as the lowest byte of `bits` says, which is below 64. */
INLINE uint64_t lowest(uint64_t x, uint64_t bits, int avx2) {
#ifdef HAVE_AVX2
    uint64_t low;
    if (avx2) {
        __asm__("bzhi %2, %1, %0" : "=r"(low) : "r"(x), "r"(bits));
        return low;
    }
#endif
    (void)avx2;
    return x & ~(~(uint64_t)0 << (bits & 63));
}

static size_t stretches_in(size_t n) { return (n + STRETCH - 1) / STRETCH; }

#include "_prices.h"
#include "_ans.h"
#include "_division.h"
#include "_choice.h"

/* ------------------------------------------------------------------------------------------------------ encode */

/* The last byte is coded first, and bits are written from the end on: so they are read from the first to the last. */
typedef struct {
    uint8_t *out;           /* where the last bits that were written begin */
    const uint8_t *least;   /* where they may begin */
    uint64_t buffer, filled; /* bits that are not yet written, the next to be read lowest */
    uint64_t states[STATES];
} Writer;

#define PUSH(k) \
    do { \
        uint64_t place = e->places[i + (k)], bits = (uint32_t)(state##k + e->missing[place]) >> 16; \
        buffer = buffer << bits | lowest(state##k, bits, avx2); \
        filled += bits; \
        state##k = e->states[(uint32_t)((state##k >> bits) + e->first[place])]; \
    } while (0)

#define PUSH_OUT \
    do { \
        uint64_t word = buffer << (-filled & 63); \
        memcpy(out - 8, &word, 8); \
        out -= filled >> 3; \
        filled &= 7; \
    } while (0)

/* The bytes of a stretch; whether there was room. */
INLINE int push_stretch(size_t n, const Encoder *e, Writer *w, int avx2) {
    uint64_t buffer = w->buffer, filled = w->filled;
    uint8_t *out = w->out;
    size_t i = n;
    while (i % STATES) { /* those beyond the last eight, of the last stretch only */
        uint64_t state0 = w->states[--i % STATES];
        if (out - w->least < 8) return 0;
        PUSH(0);
        PUSH_OUT;
        w->states[i % STATES] = state0;
    }
    uint64_t state0 = w->states[0], state1 = w->states[1], state2 = w->states[2], state3 = w->states[3];
    uint64_t state4 = w->states[4], state5 = w->states[5], state6 = w->states[6], state7 = w->states[7];
    while (i) {
        i -= STATES;
        if (out - w->least < 16) return 0;
        PUSH(7); PUSH(6); PUSH(5); PUSH(4);
        PUSH_OUT; /* 7 bits that were left, and four times LOG_SLOTS */
        PUSH(3); PUSH(2); PUSH(1); PUSH(0);
        PUSH_OUT;
    }
    *w = (Writer){out, w->least, buffer, filled, {state0, state1, state2, state3, state4, state5, state6, state7}};
    return 1;
}

/* The coded block to the end of `out`, which has room for n bytes. Returns its length; 0 where it is not shorter. */
INLINE size_t coded_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e, int avx2) {
    Choice *choice = chosen_tables(data, n, periods, e, avx2);
    if (!choice || n < choice->length + STATE_BYTES) return 0;
    for (size_t t = 0; t < choice->tables; t++) write_states(choice->slots[t], t, e);
    if (choice->tables == 1) memset(e->of, 0, STRETCH);
    Writer w = {.out = out + n - STATE_BYTES, .least = out + choice->length};
    for (int k = 0; k < STATES; k++) w.states[k] = SLOTS;
    for (size_t stretch = stretches_in(n); stretch--;) {
        size_t at = stretch * STRETCH, m = smaller(STRETCH, n - at);
        if (choice->tables > 1) divide(&e->division, stretch, m, e->of);
        place(data + at, e->of, m, 0, e->places);
        if (!push_stretch(m, e, &w, avx2)) return 0;
    }
    if (w.filled) *--w.out = (uint8_t)(w.buffer << (8 - w.filled));
    choice->head[0] |= (uint8_t)((8 - w.filled) % 8 << 3);
    for (int k = 0; k < STATES; k++) {
        uint16_t state = (uint16_t)(w.states[k] - SLOTS);
        memcpy(out + n - STATE_BYTES + 2 * k, &state, 2);
    }
    memcpy(w.out - choice->length, choice->head, choice->length);
    return (size_t)(out + n - w.out) + choice->length;
}

/* ------------------------------------------------------------------------------------------------------ decode */

typedef struct {
    const uint8_t *in;
    uint64_t at, end; /* in bits; STATE_BYTES follow the last, so that whole words can be loaded */
    uint64_t states[STATES];
} Reader;

/* 57 bits and more, of which four bytes take up to four times LOG_SLOTS. */
#define PULL_IN (buffer = load_8(in + (at >> 3)) >> (at & 7), passed = 0)

#define PULL(k) \
    do { \
        uint32_t state = states[state##k * TABLES + of[k]]; \
        uint64_t bits = state >> 8 & 255; \
        to[k] = (uint8_t)state; \
        state##k = (state >> 16) + lowest(buffer >> passed, bits, avx2); \
        passed += bits; \
    } while (0)

/* The bytes of a stretch; whether all their bits were there. */
INLINE int pull_stretch(const uint32_t *states, const uint8_t *of, size_t n, Reader *r, uint8_t *to, int avx2) {
    const uint8_t *in = r->in, *last = of + n / STATES * STATES;
    uint64_t at = r->at, end = r->end, buffer, passed;
    uint64_t state0 = r->states[0], state1 = r->states[1], state2 = r->states[2], state3 = r->states[3];
    uint64_t state4 = r->states[4], state5 = r->states[5], state6 = r->states[6], state7 = r->states[7];
    for (; of < last && at <= end; of += STATES, to += STATES) {
        PULL_IN;
        PULL(0);
        PULL(1);
        PULL(2);
        PULL(3);
        at += passed;
        PULL_IN;
        PULL(4);
        PULL(5);
        PULL(6);
        PULL(7);
        at += passed;
    }
    *r = (Reader){in, at, end, {state0, state1, state2, state3, state4, state5, state6, state7}};
    for (size_t k = 0; k < n % STATES && at <= end; k++, of++, to++) {
        state0 = r->states[k];
        PULL_IN;
        PULL(0);
        r->at = at += passed;
        r->states[k] = state0;
    }
    return at <= end;
}

/* Of the head: where the bits begin, and in how many tables; NULL where it is none. */
static const uint8_t *read_head(const uint8_t *in, const uint8_t *end, size_t n, Decoder *d, size_t *tables) {
    *tables = *in++ & 7;
    if (*tables != 1 && *tables != TABLES) return NULL;
    if (*tables > 1 && !(in = read_division(&d->division, n, in, end))) return NULL;
    if (!(in = read_slots(in, end, *tables, d->slots))) return NULL;
    for (size_t t = 0; t < *tables; t++) read_states(d->slots[t], t, d->states);
    return in;
}

INLINE int decoded_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d, int avx2) {
    if (length < 1 + STATE_BYTES) return 0;
    const uint8_t *end = in + length - STATE_BYTES;
    size_t tables;
    Reader r = {.at = *in >> 3};
    if (!(r.in = read_head(in, end, n, d, &tables))) return 0;
    r.end = 8 * (uint64_t)(end - r.in);
    for (int k = 0; k < STATES; k++) {
        uint16_t state;
        memcpy(&state, end + 2 * k, 2);
        if (state >= SLOTS) return 0;
        r.states[k] = state;
    }
    if (tables == 1) memset(d->of, 0, STRETCH);
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        size_t m = smaller(STRETCH, n - at);
        if (tables > 1) divide(&d->division, stretch, m, d->of);
        if (!pull_stretch(d->states[0], d->of, m, &r, out + at, avx2)) return 0;
    }
    uint64_t left = 0;
    for (int k = 0; k < STATES; k++) left |= r.states[k];
    return r.at == r.end && !left;
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
