/* A range coder for the bytes of a payload (rANS: Duda, 2013), block by block, each with a table of its own.
 *
 * The stream: 4 bytes for each block (its length, and in the lowest bit whether it is coded), then the blocks. A coded
 * block is its table, eight states of 32 bits and words of 16 bits; byte i of a block belongs to state i mod 8. Bytes
 * that no encoder wrote decode to other bytes or are refused; they never lead outside a buffer.
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

#define BLOCK ((size_t)1 << 15) /* BLOCK in entropy.py */
#define STATES 8
#define SCALE 12 /* frequencies sum to 2^SCALE */
#define TOTAL (1u << SCALE)
#define LOWEST (1u << 16) /* of a state, between two symbols */
#define SYMBOLS 256
#define CLASSES (SYMBOLS / 2) /* bytes of a table's classes */
#define TABLE_MOST (CLASSES + SYMBOLS * SCALE / 8 + 8)
#define INLINE static inline __attribute__((always_inline))

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* ------------------------------------------------------------------------------------------------- frequencies */

static void count_bytes(const uint8_t *data, size_t n, uint32_t *counts) {
    uint32_t part[4][SYMBOLS]; /* four, so that a run of one byte does not wait for itself */
    memset(part, 0, sizeof part);
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int p = 0; p < 4; p++) part[p][data[i + (size_t)p]]++;
    for (; i < n; i++) part[0][data[i]]++;
    for (int s = 0; s < SYMBOLS; s++) counts[s] = part[0][s] + part[1][s] + part[2][s] + part[3][s];
}

/* Counts in proportion to a sum of TOTAL; what occurs has 1 at least. */
static void frequencies_of(const uint32_t *counts, size_t n, uint32_t *frequencies) {
    int64_t sum = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        uint64_t share = ((uint64_t)counts[s] * TOTAL + n / 2) / n;
        frequencies[s] = counts[s] && !share ? 1 : (uint32_t)share;
        sum += frequencies[s];
    }
    while (sum != TOTAL) { /* what is missing or too much falls to the largest, which feels it least */
        int largest = 0;
        for (int s = 1; s < SYMBOLS; s++)
            if (frequencies[s] > frequencies[largest]) largest = s;
        int64_t change = TOTAL - sum;
        if (change < 0) change = -1;
        frequencies[largest] = (uint32_t)((int64_t)frequencies[largest] + change);
        sum += change;
    }
}

/* Sixteenths of a bit: log2, rounded down. */
static uint32_t log2_sixteenths(uint32_t x) {
    int exponent = 31 - __builtin_clz(x);
    uint64_t mantissa = (uint64_t)x << (31 - exponent);
    uint32_t result = (uint32_t)exponent;
    for (int i = 0; i < 4; i++) {
        mantissa = mantissa * mantissa >> 31;
        int above = mantissa >> 32 != 0;
        mantissa >>= above;
        result = result << 1 | (uint32_t)above;
    }
    return result;
}

static size_t estimated_bytes(const uint32_t *counts, const uint32_t *frequencies) {
    uint64_t sixteenths = 0;
    for (int s = 0; s < SYMBOLS; s++)
        if (counts[s]) sixteenths += (uint64_t)counts[s] * (16 * SCALE - log2_sixteenths(frequencies[s]));
    return (size_t)(sixteenths / (16 * 8)) + CLASSES + 4 * STATES;
}

/* A class of 4 bits for each symbol, the bits that its frequency has, then those bits without the first. */
static size_t write_table(const uint32_t *frequencies, uint8_t *out) {
    memset(out, 0, TABLE_MOST);
    size_t bit = 8 * CLASSES;
    for (size_t s = 0; s < SYMBOLS; s++) {
        uint32_t f = frequencies[s];
        unsigned width = f ? 32 - (unsigned)__builtin_clz(f) : 0;
        out[s / 2] |= (uint8_t)(width << 4 * (s % 2));
        for (unsigned b = 0; b + 1 < width; b++, bit++) out[bit / 8] |= (uint8_t)((f >> b & 1) << bit % 8);
    }
    return (bit + 7) / 8;
}

/* Returns its bytes; 0 where it is none. */
static size_t read_table(const uint8_t *in, size_t size, uint32_t *frequencies) {
    uint32_t sum = 0;
    size_t bit = 8 * CLASSES;
    if (size < CLASSES) return 0;
    for (size_t s = 0; s < SYMBOLS; s++) {
        unsigned width = in[s / 2] >> 4 * (s % 2) & 15;
        if (width > SCALE + 1 || bit + width > 8 * size) return 0;
        uint32_t f = width ? 1u << (width - 1) : 0;
        for (unsigned b = 0; b + 1 < width; b++, bit++) f |= (uint32_t)(in[bit / 8] >> bit % 8 & 1) << b;
        frequencies[s] = f;
        sum += f;
    }
    return sum == TOTAL ? (bit + 7) / 8 : 0;
}

/* ------------------------------------------------------------------------------------------------------ encode */

typedef struct {
    double inverse; /* of the frequency: a division is what would take longest */
    uint64_t limit; /* a state from here on gives a word away first */
    uint32_t frequency, start;
} Symbol;

#define PUSH(k) \
    do { \
        const Symbol *symbol = &symbols[data[i + (k)]]; \
        uint32_t state = x[k]; \
        uint32_t full = state >= symbol->limit; \
        words[-1] = (uint16_t)state; /* stays if it is full: a branch would be guessed wrong half of the time */ \
        words -= full; \
        state >>= full << 4; \
        uint32_t quotient = (uint32_t)(((double)state + 0.5) * symbol->inverse); \
        x[k] = (quotient << SCALE) + (state - quotient * symbol->frequency) + symbol->start; \
    } while (0)

/* Words are written from `end` down; returns where the first lies. */
static uint16_t *push_all(const uint8_t *data, size_t n, const Symbol *symbols, uint32_t *states, uint16_t *end) {
    uint32_t x[STATES];
    uint16_t *words = end;
    for (int k = 0; k < STATES; k++) x[k] = LOWEST;
    size_t i = n - n % STATES;
    for (size_t k = n % STATES; k-- > 0;) PUSH(k);
    while (i > 0) {
        i -= STATES;
        PUSH(7);
        PUSH(6);
        PUSH(5);
        PUSH(4);
        PUSH(3);
        PUSH(2);
        PUSH(1);
        PUSH(0);
    }
    memcpy(states, x, sizeof x);
    return words;
}

/* Into `out`, which has room for n bytes. Returns the length, and in the lowest bit whether it is coded. */
static uint32_t encode_block(const uint8_t *data, size_t n, uint8_t *out, uint16_t *scratch) {
    uint32_t counts[SYMBOLS], frequencies[SYMBOLS], states[STATES], start = 0;
    uint8_t table[TABLE_MOST];
    Symbol symbols[SYMBOLS];
    count_bytes(data, n, counts);
    frequencies_of(counts, n, frequencies);
    size_t table_bytes = write_table(frequencies, table);
    if (estimated_bytes(counts, frequencies) + table_bytes - CLASSES < n - n / 128) {
        for (int s = 0; s < SYMBOLS; s++) {
            uint32_t f = frequencies[s];
            symbols[s] = (Symbol){f ? 1.0 / f : 0.0, (uint64_t)f << (32 - SCALE), f, start};
            start += f;
        }
        uint16_t *end = scratch + BLOCK, *words = push_all(data, n, symbols, states, end);
        size_t word_bytes = 2 * (size_t)(end - words), length = table_bytes + sizeof states + word_bytes;
        if (length < n) {
            memcpy(out, table, table_bytes);
            memcpy(out + table_bytes, states, sizeof states);
            memcpy(out + table_bytes + sizeof states, words, word_bytes);
            return (uint32_t)length << 1 | 1;
        }
    }
    memcpy(out, data, n);
    return (uint32_t)n << 1;
}

/* ------------------------------------------------------------------------------------------------------ decode */

#define PULL(k) \
    do { \
        uint32_t slot = slots[x[k] & (TOTAL - 1)]; \
        out[i + (k)] = (uint8_t)slot; \
        x[k] = ((slot >> 8 & (TOTAL - 1)) + 1) * (x[k] >> SCALE) + (slot >> 20); \
        uint32_t empty = x[k] < LOWEST; \
        uint16_t next; \
        memcpy(&next, in, 2); \
        x[k] = x[k] << (empty << 4) | (next & (0u - empty)); \
        in += 2 * empty; \
    } while (0)

/* Eight at a time while as many words are left; then the rest, carefully. Whether bytes and states come out even. */
INLINE int pull_all(const uint32_t *slots, uint32_t *x, const uint8_t *in, const uint8_t *end, uint8_t *out, size_t n) {
    size_t i = 0, whole = n - n % STATES;
    for (; i < whole && end - in >= 2 * STATES; i += STATES) {
        PULL(0);
        PULL(1);
        PULL(2);
        PULL(3);
        PULL(4);
        PULL(5);
        PULL(6);
        PULL(7);
    }
    for (; i < n; i += STATES)
        for (size_t k = 0; k < STATES && i + k < n; k++) {
            uint32_t slot = slots[x[k] & (TOTAL - 1)];
            out[i + k] = (uint8_t)slot;
            x[k] = ((slot >> 8 & (TOTAL - 1)) + 1) * (x[k] >> SCALE) + (slot >> 20);
            if (x[k] >= LOWEST) continue;
            uint16_t next;
            if (end - in < 2) return 0;
            memcpy(&next, in, 2);
            x[k] = x[k] << 16 | next;
            in += 2;
        }
    for (int k = 0; k < STATES; k++)
        if (x[k] != LOWEST) return 0;
    return in == end;
}

static int decode_block(const uint8_t *in, size_t length, uint8_t *out, size_t n) {
    uint32_t frequencies[SYMBOLS], slots[TOTAL], x[STATES], slot = 0;
    size_t table_bytes = read_table(in, length, frequencies);
    if (!table_bytes || length - table_bytes < sizeof x || (length - table_bytes) % 2) return 0;
    for (uint32_t s = 0; s < SYMBOLS; s++)
        for (uint32_t i = 0; i < frequencies[s]; i++) slots[slot++] = s | (frequencies[s] - 1) << 8 | i << 20;
    memcpy(x, in + table_bytes, sizeof x);
    return pull_all(slots, x, in + table_bytes + sizeof x, in + length, out, n);
}

/* ---------------------------------------------------------------------------------------------- Python's side */

/* Blocks `first` to `first + count` of the data, each into its own stretch of BLOCK bytes of `out`. */
PyObject *py_entropy_encode(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long data_at, out_at, lengths_at;
    Py_ssize_t size, out_size, lengths_size, first, count;
    if (!PyArg_ParseTuple(args, "KKK(nnn)nn", &data_at, &out_at, &lengths_at, &size, &out_size, &lengths_size, &first,
                          &count))
        return NULL;
    if (size < 0 || out_size < size || !inside(first, count, lengths_size) ||
        lengths_size != size / (Py_ssize_t)BLOCK + !!(size % (Py_ssize_t)BLOCK))
        return refused("these numbers of blocks and bytes");
    const uint8_t *data = (const uint8_t *)(uintptr_t)data_at;
    uint8_t *out = (uint8_t *)(uintptr_t)out_at;
    uint32_t *lengths = (uint32_t *)(uintptr_t)lengths_at;
    uint16_t *scratch = malloc(2 * BLOCK);
    if (!scratch) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t b = (size_t)first; b < (size_t)(first + count); b++)
        lengths[b] = encode_block(data + b * BLOCK, smaller(BLOCK, (size_t)size - b * BLOCK), out + b * BLOCK, scratch);
    Py_END_ALLOW_THREADS
    free(scratch);
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
    Py_BEGIN_ALLOW_THREADS
    size_t at = checked_start(coded, (size_t)coded_size, (size_t)blocks, (size_t)size, (size_t)first);
    good = at != 0;
    for (size_t b = (size_t)first; good && b < (size_t)(first + count); b++) {
        uint32_t length = length_at(coded, b);
        size_t n = smaller(BLOCK, (size_t)size - b * BLOCK);
        if (length & 1)
            good = decode_block(coded + at, length >> 1, out + b * BLOCK, n);
        else
            memcpy(out + b * BLOCK, coded + at, n);
        at += length >> 1;
    }
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(good);
}
