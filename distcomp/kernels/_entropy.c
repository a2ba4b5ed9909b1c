/* A range coder for the bytes of a payload (rANS: Duda, 2013), block by block, each with tables of its own.
 *
 * The columns of a weight matrix have gradients of different sizes, which blocks of scales along its rows do not even
 * out. So each 16 KiB, a stretch, say how long a row is, the period, and by which of the block's tables each column is
 * coded. The stream: 4 bytes for each block (its length, and in the lowest bit whether it is coded), then the blocks. A
 * coded block:
 *
 *   1 byte    b: the block has 2^b tables, at most 8
 *   if b > 0  for each stretch its period (2 bytes) and as many numbers of tables, of b bits, filled up to a byte
 *   then      the tables, eight states of 32 bits, and words of 16 bits; byte i of a block belongs to state i mod 8
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
#define LONGEST_PERIOD 1024 /* LONGEST_PERIOD there */
#define TABLES 8
#define TABLES_LOG 3
#define STATES 8
#define SCALE 12 /* frequencies sum to 2^SCALE */
#define TOTAL (1u << SCALE)
#define LOWEST (1u << 16) /* of a state, between two symbols */
#define SYMBOLS 256
#define CLASSES (SYMBOLS / 2) /* bytes of a table's classes */
#define TABLE_MOST (CLASSES + SYMBOLS * SCALE / 8 + 8)
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    double inverse; /* of the frequency: a division is what would take longest */
    uint32_t frequency, start;
} Symbol;

/* How a block's bytes are divided between its tables. */
typedef struct {
    uint16_t periods[STRETCHES];
    uint8_t tables[STRETCHES][LONGEST_PERIOD]; /* of each column */
    uint8_t table_of[BLOCK];                   /* of each byte */
} Columns;

typedef struct {
    Columns columns;
    uint16_t words[BLOCK], prices[STRETCH];
    double means[STRETCHES][LONGEST_PERIOD];
    Symbol symbols[TABLES * SYMBOLS];
    uint8_t head[1 + STRETCHES * (2 + LONGEST_PERIOD * TABLES_LOG / 8) + TABLES * TABLE_MOST];
} Encoder;

typedef struct {
    Columns columns;
    uint32_t slots[TABLES * TOTAL];
} Decoder;

typedef struct {
    const int64_t *each;
    size_t count;
} Periods;

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
static void frequencies_of(const uint32_t *counts, uint32_t *frequencies) {
    int64_t sum = 0;
    uint64_t n = 0;
    for (int s = 0; s < SYMBOLS; s++) n += counts[s];
    n += !n;
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
    return (size_t)(sixteenths / (16 * 8));
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

/* ----------------------------------------------------------------------------------------------------- columns */

/* The mean price of each column, for the period whose columns differ by most beyond what chance makes of them. */
static uint16_t columns_of(const uint16_t *prices, size_t n, Periods periods, double *means) {
    uint64_t total = 0, squares = 0;
    for (size_t i = 0; i < n; i++) total += prices[i], squares += (uint64_t)prices[i] * prices[i];
    double mean = (double)total / (double)n, noise = (double)squares / (double)n - mean * mean, most = 0;
    uint16_t best = 1;
    means[0] = mean;
    for (size_t p = 0; p < periods.count; p++) {
        if (periods.each[p] < 2 || periods.each[p] > LONGEST_PERIOD || periods.each[p] > (int64_t)n / 4) continue;
        size_t period = (size_t)periods.each[p];
        uint32_t sums[LONGEST_PERIOD] = {0};
        for (size_t at = 0; at < n; at += period) {
            size_t width = smaller(period, n - at);
            for (size_t c = 0; c < width; c++) sums[c] += prices[at + c];
        }
        double between = -(double)total * mean - (double)(period - 1) * noise;
        for (size_t c = 0; c < period; c++)
            between += (double)sums[c] * sums[c] / (double)((n - c + period - 1) / period);
        if (between <= most) continue;
        most = between;
        best = (uint16_t)period;
        for (size_t c = 0; c < period; c++) means[c] = (double)sums[c] / (double)((n - c + period - 1) / period);
    }
    return best;
}

static void expand(Columns *columns, size_t n) {
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        size_t end = smaller(n, at + STRETCH), period = columns->periods[stretch];
        for (size_t row = at; row < end; row += period)
            memcpy(columns->table_of + row, columns->tables[stretch], smaller(period, end - row));
    }
}

/* Columns by their mean price, the same number of bytes to each of the tables. */
static void divide(const uint8_t *data, size_t n, const uint32_t *counts, Periods periods, Encoder *e) {
    uint32_t frequencies[SYMBOLS];
    uint16_t price[SYMBOLS];
    double weights[16 * (SCALE + 1)] = {0}, before = 0;
    uint8_t table_of_price[16 * (SCALE + 1)];
    frequencies_of(counts, frequencies);
    for (int s = 0; s < SYMBOLS; s++)
        price[s] = (uint16_t)(frequencies[s] ? 16 * SCALE - log2_sixteenths(frequencies[s]) : 0);
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        size_t m = smaller(STRETCH, n - at);
        for (size_t i = 0; i < m; i++) e->prices[i] = price[data[at + i]];
        uint16_t period = columns_of(e->prices, m, periods, e->means[stretch]);
        e->columns.periods[stretch] = period;
        for (size_t c = 0; c < period; c++) weights[(int)e->means[stretch][c]] += (double)m / period;
    }
    for (int p = 0; p < 16 * (SCALE + 1); p++) {
        int table = (int)(TABLES * (before + weights[p] / 2) / (double)n);
        table_of_price[p] = (uint8_t)(table < TABLES ? table : TABLES - 1);
        before += weights[p];
    }
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++)
        for (size_t c = 0; c < e->columns.periods[stretch]; c++)
            e->columns.tables[stretch][c] = table_of_price[(int)e->means[stretch][c]];
    expand(&e->columns, n);
}

static size_t numbers_bytes(size_t period, int bits) { return (period * (size_t)bits + 7) / 8; }

static uint8_t *write_columns(const Columns *columns, size_t n, int bits, uint8_t *out) {
    for (size_t at = 0, stretch = 0; bits && at < n; at += STRETCH, stretch++) {
        uint16_t period = columns->periods[stretch];
        memcpy(out, &period, 2);
        memset(out += 2, 0, numbers_bytes(period, bits));
        for (size_t bit = 0; bit < (size_t)bits * period; bit++)
            out[bit / 8] |= (uint8_t)((columns->tables[stretch][bit / (size_t)bits] >> bit % (size_t)bits & 1) << bit % 8);
        out += numbers_bytes(period, bits);
    }
    return out;
}

/* Where they end; NULL where they are none. */
static const uint8_t *read_columns(Columns *columns, size_t n, int bits, const uint8_t *in, const uint8_t *end) {
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        uint16_t period = 1;
        if (bits && end - in < 2) return NULL;
        if (bits) memcpy(&period, in, 2), in += 2;
        if (!period || period > LONGEST_PERIOD || (size_t)(end - in) < numbers_bytes(period, bits)) return NULL;
        columns->periods[stretch] = period;
        memset(columns->tables[stretch], 0, period);
        for (size_t bit = 0; bit < (size_t)bits * period; bit++)
            columns->tables[stretch][bit / (size_t)bits] |= (uint8_t)((in[bit / 8] >> bit % 8 & 1) << bit % (size_t)bits);
        in += numbers_bytes(period, bits);
    }
    expand(columns, n);
    return in;
}

static void count_divided(const uint8_t *data, const uint8_t *table_of, size_t n, uint32_t (*counts)[SYMBOLS]) {
    uint32_t odd[TABLES][SYMBOLS]; /* two, so that neighbours do not wait for each other */
    memset(counts, 0, sizeof odd);
    memset(odd, 0, sizeof odd);
    for (size_t i = 0; i + 2 <= n; i += 2) {
        counts[table_of[i]][data[i]]++;
        odd[table_of[i + 1]][data[i + 1]]++;
    }
    if (n % 2) counts[table_of[n - 1]][data[n - 1]]++;
    for (int t = 0; t < TABLES; t++)
        for (int s = 0; s < SYMBOLS; s++) counts[t][s] += odd[t][s];
}

/* The fewest bytes: of `counts` for each of the 8 tables, or of neighbours added. Returns how often they were added,
 * and leaves the frequencies. */
static int fewest_tables(uint32_t (*counts)[SYMBOLS], const Columns *columns, size_t n, int bits,
                         uint32_t (*frequencies)[SYMBOLS], size_t *bytes) {
    uint8_t table[TABLE_MOST];
    int best = -1;
    for (int merged = TABLES_LOG - bits; merged <= TABLES_LOG; merged++) {
        uint32_t tried[TABLES][SYMBOLS];
        int left = TABLES_LOG - merged;
        size_t total = 1 + 4 * STATES;
        for (size_t at = 0, stretch = 0; left && at < n; at += STRETCH, stretch++)
            total += 2 + numbers_bytes(columns->periods[stretch], left);
        for (int t = 0; t < 1 << left; t++) {
            frequencies_of(counts[t], tried[t]);
            total += estimated_bytes(counts[t], tried[t]) + write_table(tried[t], table);
        }
        if (best < 0 || total < *bytes) {
            best = merged;
            *bytes = total;
            memcpy(frequencies, tried, sizeof tried);
        }
        for (int t = 0; t < 1 << left >> 1; t++)
            for (int s = 0; s < SYMBOLS; s++) counts[t][s] = counts[2 * t][s] + counts[2 * t + 1][s];
    }
    return best;
}

/* ------------------------------------------------------------------------------------------------------ encode */

#define PUSH(k) \
    do { \
        const Symbol *symbol = &symbols[(size_t)table_of[i + (k)] * SYMBOLS + data[i + (k)]]; \
        uint32_t state = x[k]; \
        uint32_t full = state >= (uint64_t)symbol->frequency << (32 - SCALE); /* it gives a word away first */ \
        words[-1] = (uint16_t)state; /* stays if it is full: a branch would be guessed wrong half of the time */ \
        words -= full; \
        state >>= full << 4; \
        uint32_t quotient = (uint32_t)(((double)state + 0.5) * symbol->inverse); \
        x[k] = (quotient << SCALE) + (state - quotient * symbol->frequency) + symbol->start; \
    } while (0)

/* Words are written from `end` down; returns where the first lies. */
static uint16_t *push_all(const uint8_t *data, const uint8_t *table_of, size_t n, const Symbol *symbols,
                          uint32_t *states, uint16_t *end) {
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

static void symbols_of(const uint32_t *frequencies, Symbol *symbols) {
    for (uint32_t s = 0, start = 0; s < SYMBOLS; start += frequencies[s], s++) {
        uint32_t f = frequencies[s];
        symbols[s] = (Symbol){f ? 1.0 / f : 0.0, f, start};
    }
}

/* The coded block into `out`, which has room for n bytes. Returns its length; 0 where it is not shorter. */
static size_t coded_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) {
    uint32_t counts[TABLES][SYMBOLS], frequencies[TABLES][SYMBOLS], states[STATES];
    size_t bytes = 0;
    count_bytes(data, n, counts[0]);
    frequencies_of(counts[0], frequencies[0]);
    /* Of short blocks, and of those whose bytes are almost equally frequent, dividing costs more than it saves. */
    int bits = n < STRETCH || estimated_bytes(counts[0], frequencies[0]) > n - n / 128 ? 0 : TABLES_LOG;
    if (bits) {
        divide(data, n, counts[0], periods, e);
        count_divided(data, e->columns.table_of, n, counts);
    } else {
        memset(e->columns.table_of, 0, n);
    }
    int merged = fewest_tables(counts, &e->columns, n, bits, frequencies, &bytes);
    if (bytes >= n - n / 128) return 0;
    bits = TABLES_LOG - merged;
    for (size_t at = 0, stretch = 0; bits && at < n; at += STRETCH, stretch++)
        for (size_t c = 0; c < e->columns.periods[stretch]; c++) e->columns.tables[stretch][c] >>= merged;
    for (size_t i = 0; bits < TABLES_LOG && i < n; i++) e->columns.table_of[i] >>= merged;
    e->head[0] = (uint8_t)bits;
    uint8_t *head = write_columns(&e->columns, n, bits, e->head + 1);
    for (int t = 0; t < 1 << bits; t++) {
        head += write_table(frequencies[t], head);
        symbols_of(frequencies[t], e->symbols + t * SYMBOLS);
    }
    uint16_t *end = e->words + BLOCK, *words = push_all(data, e->columns.table_of, n, e->symbols, states, end);
    size_t head_bytes = (size_t)(head - e->head), word_bytes = 2 * (size_t)(end - words);
    size_t length = head_bytes + sizeof states + word_bytes;
    if (length >= n) return 0;
    memcpy(out, e->head, head_bytes);
    memcpy(out + head_bytes, states, sizeof states);
    memcpy(out + head_bytes + sizeof states, words, word_bytes);
    return length;
}

/* Returns the length, and in the lowest bit whether it is coded. */
static uint32_t encode_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) {
    size_t length = coded_block(data, n, out, periods, e);
    if (length) return (uint32_t)length << 1 | 1;
    memcpy(out, data, n);
    return (uint32_t)n << 1;
}

/* ------------------------------------------------------------------------------------------------------ decode */

#define PULL(k) \
    do { \
        uint32_t slot = slots[(size_t)table_of[i + (k)] << SCALE | (x[k] & (TOTAL - 1))]; \
        out[i + (k)] = (uint8_t)slot; \
        x[k] = ((slot >> 8 & (TOTAL - 1)) + 1) * (x[k] >> SCALE) + (slot >> 20); \
        uint32_t empty = x[k] < LOWEST; \
        uint16_t next; \
        memcpy(&next, in, 2); \
        x[k] = x[k] << (empty << 4) | (next & (0u - empty)); \
        in += 2 * empty; \
    } while (0)

/* Eight at a time while as many words are left; then the rest, carefully. Whether bytes and states come out even. */
INLINE int pull_all(const uint32_t *slots, const uint8_t *table_of, uint32_t *x, const uint8_t *in, const uint8_t *end,
                    uint8_t *out, size_t n) {
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
            uint32_t slot = slots[(size_t)table_of[i + k] << SCALE | (x[k] & (TOTAL - 1))];
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

static int decode_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) {
    const uint8_t *end = in + length;
    uint32_t frequencies[SYMBOLS], x[STATES], *slot = d->slots;
    if (!length || *in > TABLES_LOG) return 0;
    int bits = *in;
    if (!(in = read_columns(&d->columns, n, bits, in + 1, end))) return 0;
    for (int t = 0; t < 1 << bits; t++) {
        size_t table_bytes = read_table(in, (size_t)(end - in), frequencies);
        if (!table_bytes) return 0;
        in += table_bytes;
        for (uint32_t s = 0; s < SYMBOLS; s++)
            for (uint32_t i = 0; i < frequencies[s]; i++) *slot++ = s | (frequencies[s] - 1) << 8 | i << 20;
    }
    if ((size_t)(end - in) < sizeof x || (size_t)(end - in) % 2) return 0;
    memcpy(x, in, sizeof x);
    return pull_all(d->slots, d->columns.table_of, x, in + sizeof x, end, out, n);
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
