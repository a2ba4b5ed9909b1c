/* A coder for the bytes of a payload (Huffman, 1952), block by block: no divisions, and four streams at once.
 *
 * The columns of a weight matrix have gradients of different sizes, which blocks of scales along its rows do not even
 * out; nor are the blocks alike. So each 16 KiB, a stretch, say how long a row is, the period, and how much dearer than
 * usual each column is, in 3 bits; every 128 bytes of it say the same in 2. The sum of both, compared to three
 * thresholds, is the number of the table that a byte is coded by. The stream: 4 bytes for each block (its length, and in
 * the lowest bit whether it is coded), then the blocks. A coded block:
 *
 *   1 byte    tables: 1 or 4
 *   if 4      3 bytes, the thresholds; for each stretch its period (2 bytes), levels of columns (3 bits each, filled up
 *             to a byte) and levels of rows of 128 bytes (2 bits each, filled up to a byte)
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
#define ROW_BITS 2
#define LEVELS ((1 << COLUMN_BITS) + (1 << ROW_BITS) - 1) /* of a column and a row together */
#define LEVEL 6                                           /* sixteenths of a bit from one to the next */
#define TABLES 4
#define STREAMS 4
#define LONGEST 12 /* bits of a code */
#define SLOTS (1u << LONGEST)
#define ALONE 15 /* the only byte of its table */
#define SYMBOLS 256
#define TABLE_BYTES (SYMBOLS / 2)
#define HEAD_MOST (1 + TABLES + STRETCHES * (4 + LONGEST_PERIOD * COLUMN_BITS / 8 + ROWS * ROW_BITS / 8) + \
                   TABLES * TABLE_BYTES + 4 * STREAMS)
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
    uint16_t codes[TABLES][SYMBOLS]; /* the code, and its length in the lowest 4 bits */
    uint8_t streams[BLOCK + BLOCK / 2 + STREAMS * SLACK]; /* LONGEST bits for each byte */
} Encoder;

typedef struct {
    Division division;
    uint16_t slots[TABLES][SLOTS]; /* a byte, and in the lowest 4 bits of what its code has */
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

/* ---------------------------------------------------------------------------------------------------- counting */

static void count_bytes(const uint8_t *data, size_t n, uint32_t *counts) {
    uint32_t part[4][SYMBOLS]; /* four, so that a run of one byte does not wait for itself */
    memset(part, 0, sizeof part);
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int p = 0; p < 4; p++) part[p][data[i + (size_t)p]]++;
    for (; i < n; i++) part[0][data[i]]++;
    for (int s = 0; s < SYMBOLS; s++) counts[s] = part[0][s] + part[1][s] + part[2][s] + part[3][s];
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

/* Sixteenths of a bit that each byte would take. Returns how many bytes all of them would. */
static size_t prices_of(const uint32_t *counts, uint8_t *prices) {
    uint64_t n = 0, sixteenths = 0;
    for (int s = 0; s < SYMBOLS; s++) n += counts[s];
    uint32_t whole = n ? log2_sixteenths((uint32_t)n) : 0;
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t price = counts[s] ? whole - log2_sixteenths(counts[s]) : 16 * LONGEST;
        prices[s] = (uint8_t)(price < 16 * LONGEST ? price : 16 * LONGEST);
        sixteenths += (uint64_t)counts[s] * prices[s];
    }
    return (size_t)(sixteenths / (16 * 8));
}

/* ------------------------------------------------------------------------------------------------------- codes */

/* The lengths of a code of the fewest bits: the two that occur least become one, until one is left. */
static void unlimited_lengths(const uint32_t *order, const uint32_t *counts, int n, uint8_t *lengths) {
    uint32_t weight[2 * SYMBOLS];
    int parent[2 * SYMBOLS];
    for (int i = 0; i < n; i++) weight[i] = counts[order[i]];
    int leaf = 0, joined = n, next = n;
    for (; next < 2 * n - 1; next++) {
        weight[next] = 0;
        for (int two = 0; two < 2; two++) {
            int least = leaf < n && (joined == next || weight[leaf] <= weight[joined]) ? leaf++ : joined++;
            weight[next] += weight[least];
            parent[least] = next;
        }
    }
    uint8_t depth[2 * SYMBOLS];
    depth[2 * n - 2] = 0;
    for (int i = 2 * n - 3; i >= 0; i--) depth[i] = (uint8_t)(depth[parent[i]] + 1);
    for (int i = 0; i < n; i++) lengths[order[i]] = depth[i];
}

/* None longer than LONGEST: what that takes of the room for codes, others give back, who occur least first. */
static void limit(const uint32_t *order, int n, uint8_t *lengths) {
    uint32_t room = 0;
    for (int i = 0; i < n; i++) {
        if (lengths[order[i]] > LONGEST) lengths[order[i]] = LONGEST;
        room += SLOTS >> lengths[order[i]];
    }
    for (int i = 0; room > SLOTS; i = (i + 1) % n)
        if (lengths[order[i]] < LONGEST) room -= SLOTS >> ++lengths[order[i]];
    for (int i = n - 1; i >= 0; i--)
        while (lengths[order[i]] > 1 && room + (SLOTS >> lengths[order[i]]) <= SLOTS)
            room += SLOTS >> lengths[order[i]]--;
}

static void lengths_of(const uint32_t *counts, uint8_t *lengths) {
    uint32_t keys[SYMBOLS], order[SYMBOLS];
    int n = 0;
    memset(lengths, 0, SYMBOLS);
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        if (!counts[s]) continue;
        uint32_t key = counts[s] << 8 | s; /* a block has 2^19 bytes */
        int at = n++;
        for (; at && keys[at - 1] > key; at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
    for (int i = 0; i < n; i++) order[i] = keys[i] & 255;
    if (n < 2) {
        lengths[n ? order[0] : 0] = ALONE;
        return;
    }
    unlimited_lengths(order, counts, n, lengths);
    limit(order, n, lengths);
}

/* Each code, its first bit lowest, and its length in the lowest 4 bits. Whether the lengths are of a code. */
static int codes_of(const uint8_t *lengths, uint16_t *codes) {
    uint32_t next = 0, alone = 0, others = 0;
    memset(codes, 0, SYMBOLS * sizeof *codes);
    for (int s = 0; s < SYMBOLS; s++) {
        alone += lengths[s] == ALONE;
        others += lengths[s] && lengths[s] != ALONE;
        if (lengths[s] > LONGEST && lengths[s] != ALONE) return 0;
    }
    if (alone) return alone == 1 && !others;
    for (uint32_t length = 1, step = SLOTS / 2; length <= LONGEST; length++, step /= 2)
        for (int s = 0; s < SYMBOLS; s++) {
            if (lengths[s] != length) continue;
            uint32_t reversed = 0;
            for (int b = 0; b < LONGEST; b++) reversed |= (next >> b & 1) << (LONGEST - 1 - b);
            codes[s] = (uint16_t)(reversed << 4 | length);
            next += step;
            if (next > SLOTS) return 0;
        }
    return next > 0;
}

static void write_lengths(const uint8_t *lengths, uint8_t *out) {
    for (int s = 0; s < SYMBOLS; s += 2) out[s / 2] = (uint8_t)(lengths[s] | lengths[s + 1] << 4);
}

/* By the next LONGEST bits: which byte, and how many bits are its. What no code begins with is as good as anything. */
static int slots_of(const uint8_t *in, uint16_t *slots) {
    uint8_t lengths[SYMBOLS];
    uint16_t codes[SYMBOLS];
    for (int s = 0; s < SYMBOLS; s++) lengths[s] = in[s / 2] >> 4 * (s % 2) & 15;
    if (!codes_of(lengths, codes)) return 0;
    memset(slots, 0, SLOTS * sizeof *slots);
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t length = lengths[s] == ALONE ? 0 : lengths[s];
        if (lengths[s])
            for (uint32_t i = codes[s] >> 4; i < SLOTS; i += 1u << length) slots[i] = (uint16_t)(s << 4 | length);
    }
    return 1;
}

/* ---------------------------------------------------------------------------------------------------- division */

/* The mean price of each column, for the period whose columns differ by most beyond what chance makes of them. */
static uint16_t columns_of(const uint8_t *prices, size_t n, Periods periods, float *means, double *mean) {
    uint64_t total = 0, squares = 0;
    for (size_t i = 0; i < n; i++) total += prices[i], squares += (uint32_t)prices[i] * prices[i];
    *mean = (double)total / (double)n;
    double noise = (double)squares / (double)n - *mean * *mean, most = 0;
    uint16_t best = 1;
    means[0] = (float)*mean;
    for (size_t p = 0; p < periods.count; p++) {
        if (periods.each[p] < 2 || periods.each[p] > LONGEST_PERIOD || periods.each[p] > (int64_t)n / 4) continue;
        size_t period = (size_t)periods.each[p], rows = n / period;
        uint32_t sums[LONGEST_PERIOD] = {0};
        for (size_t row = 0; row < rows; row++)
            for (size_t c = 0; c < period; c++) sums[c] += prices[row * period + c];
        double between = -(double)(period - 1) * noise;
        for (size_t c = 0; c < period; c++) {
            double beyond = (double)sums[c] - (double)rows * *mean;
            between += beyond * beyond / (double)rows;
        }
        if (between <= most) continue;
        most = between;
        best = (uint16_t)period;
        for (size_t c = 0; c < period; c++) means[c] = (float)sums[c] / (float)rows;
    }
    return best;
}

static uint8_t level_of(double dearer, int bits) {
    int level = (int)(dearer / LEVEL + (1 << (bits - 1)) + 0.5);
    return (uint8_t)(level < 0 ? 0 : level < 1 << bits ? level : (1 << bits) - 1);
}

/* Each byte's column's level, as `expand` begins. */
static void expand_columns(Division *d, size_t stretch, uint8_t *out, size_t n) {
    size_t period = d->periods[stretch];
    for (size_t at = 0; at < n; at += period) memcpy(out + at, d->columns[stretch], smaller(period, n - at));
}

/* The levels of a stretch's columns, then of its rows: what is dearer beyond what its columns are. */
static void levels_of(const uint8_t *data, size_t n, const uint8_t *price, double usual, Periods periods, size_t stretch,
                      Encoder *e) {
    Division *d = &e->division;
    uint8_t *columns = d->table_of + stretch * STRETCH;
    double mean;
    for (size_t i = 0; i < n; i++) e->prices[i] = price[data[i]];
    uint16_t period = d->periods[stretch] = columns_of(e->prices, n, periods, e->means, &mean);
    for (size_t c = 0; c < period; c++) d->columns[stretch][c] = level_of(e->means[c] - mean, COLUMN_BITS);
    expand_columns(d, stretch, columns, n);
    for (size_t at = 0; at < n; at += ROW) {
        uint32_t paid = 0, levels = 0;
        size_t end = smaller(n, at + ROW);
        for (size_t i = at; i < end; i++) paid += e->prices[i], levels += columns[i];
        double due = usual + LEVEL * ((double)levels / (double)(end - at) - (1 << (COLUMN_BITS - 1)));
        d->rows[stretch][at / ROW] = level_of((double)paid / (double)(end - at) - due, ROW_BITS);
    }
}

/* From levels to tables, in place. */
static void divide(Division *d, size_t n) {
    uint8_t first = d->thresholds[0], second = d->thresholds[1], third = d->thresholds[2];
    for (size_t at = 0; at < n; at += ROW) {
        uint8_t level = d->rows[at / STRETCH][at % STRETCH / ROW], *of = d->table_of + at;
        size_t width = smaller(ROW, n - at);
        for (size_t i = 0; i < width; i++) {
            uint8_t x = (uint8_t)(of[i] + level);
            of[i] = (uint8_t)((x >= first) + (x >= second) + (x >= third));
        }
    }
}

/* About as many bytes to each of the tables. */
static void choose_thresholds(Division *d, size_t n) {
    size_t bytes[LEVELS] = {0}, seen = 0, before = 0;
    for (size_t i = 0; i < n; i += i % 16 == 15 ? 16 * 7 + 1 : 1, seen++) /* 16 of every 128 */
        bytes[d->table_of[i] + d->rows[i / STRETCH][i % STRETCH / ROW]]++;
    for (int level = 0, t = 0; t < TABLES - 1; level++) {
        if (level < LEVELS) before += bytes[level];
        while (t < TABLES - 1 && (level + 1 >= LEVELS || 2 * TABLES * before >= (2 * (size_t)t + 1) * seen + seen))
            d->thresholds[t++] = (uint8_t)(level + 1);
    }
}

static uint8_t *write_bits(const uint8_t *values, size_t count, unsigned bits, uint8_t *out) {
    uint32_t buffer = 0;
    unsigned filled = 0;
    for (size_t i = 0; i < count; i++) {
        buffer |= (uint32_t)values[i] << filled;
        for (filled += bits; filled >= 8; filled -= 8, buffer >>= 8) *out++ = (uint8_t)buffer;
    }
    if (filled) *out++ = (uint8_t)buffer;
    return out;
}

static const uint8_t *read_bits(uint8_t *values, size_t count, unsigned bits, const uint8_t *in, const uint8_t *end) {
    if ((size_t)(end - in) < (count * bits + 7) / 8) return NULL;
    uint32_t buffer = 0;
    unsigned filled = 0;
    for (size_t i = 0; i < count; i++, buffer >>= bits, filled -= bits) {
        if (filled < bits) buffer |= (uint32_t)*in++ << filled, filled += 8;
        values[i] = (uint8_t)(buffer & ((1u << bits) - 1));
    }
    return in;
}

static size_t rows_in(size_t n) { return (n + ROW - 1) / ROW; }

static uint8_t *write_division(const Division *d, size_t n, uint8_t *out) {
    memcpy(out, d->thresholds, TABLES - 1);
    out += TABLES - 1;
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        memcpy(out, &d->periods[stretch], 2);
        out = write_bits(d->columns[stretch], d->periods[stretch], COLUMN_BITS, out + 2);
        out = write_bits(d->rows[stretch], rows_in(smaller(STRETCH, n - at)), ROW_BITS, out);
    }
    return out;
}

/* Where it ends; NULL where it is none. */
static const uint8_t *read_division(Division *d, size_t n, const uint8_t *in, const uint8_t *end) {
    if (end - in < TABLES - 1) return NULL;
    memcpy(d->thresholds, in, TABLES - 1);
    in += TABLES - 1;
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        size_t m = smaller(STRETCH, n - at);
        if (end - in < 2) return NULL;
        memcpy(&d->periods[stretch], in, 2);
        if (!d->periods[stretch] || d->periods[stretch] > LONGEST_PERIOD) return NULL;
        if (!(in = read_bits(d->columns[stretch], d->periods[stretch], COLUMN_BITS, in + 2, end))) return NULL;
        if (!(in = read_bits(d->rows[stretch], rows_in(m), ROW_BITS, in, end))) return NULL;
        expand_columns(d, stretch, d->table_of + at, m);
    }
    divide(d, n);
    return in;
}

/* ------------------------------------------------------------------------------------------------------ encode */

#define PUSH(k) \
    do { \
        uint32_t code = codes[table_of[i + (k)]][data[i + (k)]]; \
        buffer |= (uint64_t)(code >> 4) << filled; \
        filled += code & 15; \
    } while (0)

#define PUSH_OUT \
    do { \
        memcpy(out, &buffer, 8); \
        out += filled >> 3; \
        buffer >>= filled & 56; \
        filled &= 7; \
    } while (0)

/* Returns where the stream ends; writes up to SLACK bytes more. */
static uint8_t *push_all(const uint8_t *data, const uint8_t *table_of, size_t n, const uint16_t (*codes)[SYMBOLS],
                         uint8_t *out) {
    uint64_t buffer = 0;
    uint32_t filled = 0;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) { /* 7 bits that were left, and four times LONGEST */
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
    memcpy(out, &buffer, 8);
    return out + (filled + 7) / 8;
}

/* What the tables and the bytes by them take. */
static size_t bytes_by(uint32_t (*counts)[SYMBOLS], int tables, uint8_t (*lengths)[SYMBOLS]) {
    uint64_t bits = 0;
    for (int t = 0; t < tables; t++) {
        lengths_of(counts[t], lengths[t]);
        for (int s = 0; s < SYMBOLS; s++) bits += (uint64_t)counts[t][s] * (lengths[t][s] == ALONE ? 0 : lengths[t][s]);
    }
    return (size_t)(bits / 8) + (size_t)tables * TABLE_BYTES;
}

/* How many tables there are to be, by the counts of all bytes: their counts and their codes' lengths. */
static int tables_of(const uint8_t *data, size_t n, Periods periods, Encoder *e, uint8_t (*lengths)[SYMBOLS]) {
    uint32_t counts[TABLES][SYMBOLS], all[1][SYMBOLS];
    uint8_t price[SYMBOLS], one[1][SYMBOLS];
    count_bytes(data, n, all[0]);
    size_t estimated = prices_of(all[0], price);
    if (estimated > n - n / 128) return 0;
    size_t whole = bytes_by(all, 1, one);
    if (n >= TABLES * TABLE_BYTES * 4) { /* of fewer bytes, the tables take what dividing saves */
        for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++)
            levels_of(data + at, smaller(STRETCH, n - at), price, 128.0 * (double)estimated / (double)n, periods,
                      stretch, e);
        choose_thresholds(&e->division, n);
        divide(&e->division, n);
        count_divided(data, e->division.table_of, n, counts);
        size_t told = (size_t)(write_division(&e->division, n, e->head) - e->head);
        if (bytes_by(counts, TABLES, lengths) + told < whole) return TABLES;
    }
    memset(e->division.table_of, 0, n);
    memcpy(lengths, one, sizeof one);
    return whole < n - n / 128 ? 1 : 0;
}

/* The coded block into `out`, which has room for n bytes. Returns its length; 0 where it is not shorter. */
static size_t coded_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) {
    uint8_t lengths[TABLES][SYMBOLS], *head = e->head, *end = e->streams;
    int tables = tables_of(data, n, periods, e, lengths);
    if (!tables) return 0;
    *head++ = (uint8_t)tables;
    if (tables > 1) head = write_division(&e->division, n, head);
    for (int t = 0; t < tables; t++, head += TABLE_BYTES) {
        write_lengths(lengths[t], head);
        codes_of(lengths[t], e->codes[t]);
    }
    for (size_t k = 0, quarter = n / STREAMS; k < STREAMS; k++) {
        uint8_t *begin = end;
        size_t count = k + 1 < STREAMS ? quarter : n - k * quarter;
        end = push_all(data + k * quarter, e->division.table_of + k * quarter, count,
                       (const uint16_t (*)[SYMBOLS])e->codes, begin);
        uint32_t length = (uint32_t)(end - begin);
        if (k + 1 < STREAMS) memcpy(head, &length, 4), head += 4;
    }
    size_t head_bytes = (size_t)(head - e->head), stream_bytes = (size_t)(end - e->streams);
    if (head_bytes + stream_bytes >= n) return 0;
    memcpy(out, e->head, head_bytes);
    memcpy(out + head_bytes, e->streams, stream_bytes);
    return head_bytes + stream_bytes;
}

/* Returns the length, and in the lowest bit whether it is coded. */
static uint32_t encode_block(const uint8_t *data, size_t n, uint8_t *out, Periods periods, Encoder *e) {
    size_t length = coded_block(data, n, out, periods, e);
    if (length) return (uint32_t)length << 1 | 1;
    memcpy(out, data, n);
    return (uint32_t)n << 1;
}

/* ------------------------------------------------------------------------------------------------------ decode */

typedef struct {
    const uint8_t *at, *end, *table_of;
    uint8_t *out;
    uint32_t used; /* bits of the byte at `at` */
} Stream;

#define LOAD(k) uint64_t buffer##k = load_8(s[k].at) >> s[k].used

#define PULL(k, j) \
    do { \
        uint32_t slot = slots[s[k].table_of[i + (j)]][buffer##k & (SLOTS - 1)]; \
        s[k].out[i + (j)] = (uint8_t)(slot >> 4); \
        buffer##k >>= slot & 15; \
        s[k].used += slot & 15; \
    } while (0)

#define FROM_EACH(j) PULL(0, j); PULL(1, j); PULL(2, j); PULL(3, j)

#define MOVE_ON(k) s[k].at += s[k].used >> 3, s[k].used &= 7

#define LEFT(k) (s[k].end - s[k].at >= SLACK)

/* Of each stream as many bytes as a quarter has while a word can be loaded; returns how many. */
INLINE size_t pull_together(const uint16_t (*slots)[SLOTS], Stream *given, size_t n) {
    Stream s[STREAMS];
    size_t i = 0;
    memcpy(s, given, sizeof s);
    for (; i + 4 <= n && LEFT(0) && LEFT(1) && LEFT(2) && LEFT(3); i += 4) {
        LOAD(0);
        LOAD(1);
        LOAD(2);
        LOAD(3);
        FROM_EACH(0);
        FROM_EACH(1);
        FROM_EACH(2);
        FROM_EACH(3);
        MOVE_ON(0);
        MOVE_ON(1);
        MOVE_ON(2);
        MOVE_ON(3);
    }
    memcpy(given, s, sizeof s);
    return i;
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_BMI2
__attribute__((target("bmi2"))) static size_t pull_bmi2(const uint16_t (*slots)[SLOTS], Stream *s, size_t n) {
    return pull_together(slots, s, n);
}
#endif
static size_t pull_plain(const uint16_t (*slots)[SLOTS], Stream *s, size_t n) { return pull_together(slots, s, n); }

/* The rest of a stream, carefully. Whether it ends with its last bit. */
static int pull_rest(const uint16_t (*slots)[SLOTS], Stream *s, size_t i, size_t n) {
    for (; i < n; i++) {
        uint32_t bits = 0;
        for (int b = 0; b < 3 && s->at + b < s->end; b++) bits |= (uint32_t)s->at[b] << 8 * b;
        uint32_t slot = slots[s->table_of[i]][bits >> s->used & (SLOTS - 1)];
        s->out[i] = (uint8_t)(slot >> 4);
        s->used += slot & 15;
        s->at += s->used >> 3;
        s->used &= 7;
        if (s->at > s->end || (s->at == s->end && s->used)) return 0;
    }
    return s->at + !!s->used == s->end;
}

static int decode_block(const uint8_t *in, size_t length, uint8_t *out, size_t n, Decoder *d) {
    const uint8_t *end = in + length;
    Stream streams[STREAMS];
    if (!length || (*in != 1 && *in != TABLES)) return 0;
    size_t tables = *in++, quarter = n / STREAMS, together;
    if (tables == 1) memset(d->division.table_of, 0, n);
    if (tables > 1 && !(in = read_division(&d->division, n, in, end))) return 0;
    if ((size_t)(end - in) < tables * TABLE_BYTES + 4 * (STREAMS - 1)) return 0;
    for (size_t t = 0; t < tables; t++, in += TABLE_BYTES)
        if (!slots_of(in, d->slots[t])) return 0;
    const uint8_t *begin = in + 4 * (STREAMS - 1);
    for (size_t k = 0; k < STREAMS; k++, in += 4) {
        uint32_t bytes = (uint32_t)(end - begin);
        if (k + 1 < STREAMS) memcpy(&bytes, in, 4);
        if (bytes > (size_t)(end - begin)) return 0;
        streams[k] = (Stream){begin, begin + bytes, d->division.table_of + k * quarter, out + k * quarter, 0};
        begin += bytes;
    }
    const uint16_t (*slots)[SLOTS] = (const uint16_t (*)[SLOTS])d->slots;
#ifdef HAVE_BMI2
    together = __builtin_cpu_supports("bmi2") ? pull_bmi2(slots, streams, quarter) : pull_plain(slots, streams, quarter);
#else
    together = pull_plain(slots, streams, quarter);
#endif
    for (size_t k = 0; k < STREAMS; k++)
        if (!pull_rest(slots, &streams[k], together, k + 1 < STREAMS ? quarter : n - k * quarter)) return 0;
    return 1;
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
