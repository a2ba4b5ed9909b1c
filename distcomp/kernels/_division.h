/* How the bytes of a block are divided between its tables; a part of _entropy.c. */

/* ------------------------------------------------------------------------------------------------------ levels */

static uint8_t level_of(float above_mean, float step) {
    float level = above_mean / step + (LEVELS_OF_ONE / 2 + 0.5f);
    level = level < 0 ? 0 : level;
    return (uint8_t)(int)(level < LEVELS_OF_ONE - 1 ? level : LEVELS_OF_ONE - 1);
}

/* The sums of each column's prices, of as many rows as are returned. As many rows as fit are first summed as if they
 * were one: vectors go along them, however short a row is. */
INLINE size_t sum_columns(const uint8_t *prices, size_t n, size_t period, uint32_t *sums) {
    uint16_t wide[LONGEST_PERIOD] = {0}; /* of at most 2 STRETCH / LONGEST_PERIOD prices, each below 2^8 */
    size_t width = smaller(n, LONGEST_PERIOD) / period * period, rows = n / width;
    for (size_t row = 0; row < rows; row++)
        for (size_t c = 0; c < width; c++) wide[c] = (uint16_t)(wide[c] + prices[row * width + c]);
    memset(sums, 0, period * sizeof *sums);
    for (size_t at = 0; at < width; at += period)
        for (size_t c = 0; c < period; c++) sums[c] += wide[at + c];
    return rows * (width / period);
}

/* The period whose columns' mean prices differ by most beyond what chance makes of them, and the columns' levels. */
INLINE void choose_columns(const uint8_t *prices, size_t n, double variance, Periods periods, Division *d,
                           size_t stretch) {
    uint32_t sums[2][LONGEST_PERIOD];
    double most = 0, mean = 0, rows_of_best = 1;
    size_t best = 1, free = 0;
    for (size_t p = 0; p < periods.count; p++) {
        if (periods.each[p] < 2 || periods.each[p] > LONGEST_PERIOD || periods.each[p] > (int64_t)n / 4) continue;
        size_t period = (size_t)periods.each[p];
        double rows = (double)sum_columns(prices, n, period, sums[free]);
        uint64_t sum = 0, squares = 0;
        for (size_t c = 0; c < period; c++)
            sum += sums[free][c], squares += (uint64_t)sums[free][c] * sums[free][c];
        double all = (double)sum, between = ((double)squares - all * all / (double)period) / rows;
        if (between - (double)(period - 1) * variance <= most) continue;
        most = between - (double)(period - 1) * variance;
        mean = all / (double)period;
        rows_of_best = rows;
        best = period;
        free = 1 - free;
    }
    d->periods[stretch] = (uint16_t)best;
    if (best == 1) sums[1 - free][0] = 0;
    for (size_t c = 0; c < best; c++)
        d->columns[stretch][c] = level_of((float)(int32_t)sums[1 - free][c] - (float)mean, (float)(LEVEL * rows_of_best));
}

/* The level of each byte's column. */
INLINE void expand_columns(const uint8_t *columns, size_t period, size_t n, uint8_t *out) {
    size_t filled = smaller(period, n);
    memcpy(out, columns, filled);
    for (size_t more; filled < n; filled += more) memcpy(out + filled, out, more = smaller(filled, n - filled));
}

#ifdef HAVE_AVX2
AVX2 static inline uint32_t sum_row_avx2(const uint8_t *row) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i sums = zero;
    for (size_t i = 0; i < ROW; i += 32)
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_loadu_si256((const __m256i *)(row + i)), zero));
    __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return (uint32_t)(_mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2));
}
#endif

INLINE uint32_t sum_row(const uint8_t *row, size_t width, int avx2) {
#ifdef HAVE_AVX2
    if (avx2 && width == ROW) return sum_row_avx2(row);
#endif
    (void)avx2;
    uint32_t sum = 0;
    for (size_t i = 0; i < width; i++) sum += row[i];
    return sum;
}

/* Of rows what is dearer than usual beyond what their columns are. */
INLINE void choose_rows(const uint8_t *prices, const uint8_t *columns, size_t n, double usual, uint8_t *rows, int avx2) {
    for (size_t at = 0; at < n; at += ROW) {
        size_t width = smaller(n - at, ROW);
        int64_t paid = sum_row(prices + at, width, avx2), levels = sum_row(columns + at, width, avx2);
        float above = (float)(paid - LEVEL * (levels - LEVELS_OF_ONE / 2 * (int64_t)width));
        rows[at / ROW] = level_of(above / (float)(int64_t)width - (float)usual, LEVEL);
    }
}

/* 2^8 times one number of each byte, and `more`, and the byte itself. */
INLINE void place(const uint8_t *data, const uint8_t *of, size_t n, uint8_t more, uint16_t *places) {
    for (size_t i = 0; i < n; i++) places[i] = (uint16_t)((uint8_t)(of[i] + more) << 8 | data[i]);
}

/* All that is to be known of a stretch before thresholds are chosen: also how often bytes occur at each level. */
INLINE void choose_levels(const uint8_t *data, size_t n, const Prices *prices, Periods periods, size_t stretch,
                          Encoder *e, int avx2) {
    Division *d = &e->division;
    look_up(data, n, prices, e->prices, avx2);
    choose_columns(e->prices, n, prices->variance, periods, d, stretch);
    expand_columns(d->columns[stretch], d->periods[stretch], n, e->of);
    choose_rows(e->prices, e->of, n, prices->mean, d->rows[stretch], avx2);
    for (size_t at = 0; at < n; at += ROW)
        place(data + at, e->of + at, smaller(ROW, n - at), d->rows[stretch][at / ROW], e->places + at);
    for (size_t i = 0; i < n; i++) e->counts[e->places[i]]++;
}

/* -------------------------------------------------------------------------------------------------- thresholds */

/* Those by which the halves of bytes take fewest bits: the fewest of the first levels in t tables are, of all
 * levels at which the last of these may begin, the fewest of those before in t - 1 tables and its own. */
INLINE void choose_thresholds(const uint32_t *counts, uint8_t *thresholds) {
    uint32_t below[LEVELS + 1][2 * 16] = {{0}};
    uint64_t fewest[TABLES][LEVELS + 1];
    uint8_t begins[TABLES][LEVELS + 1];
    for (int end = 1; end <= LEVELS; end++) {
        memcpy(below[end], below[end - 1], sizeof *below);
        for (int s = 0; s < SYMBOLS; s++) {
            below[end][s & 15] += counts[(end - 1) * SYMBOLS + s];
            below[end][16 + (s >> 4)] += counts[(end - 1) * SYMBOLS + s];
        }
    }
    for (int end = 0; end <= LEVELS; end++)
        for (int begin = 0; begin <= end; begin++) {
            uint32_t within[2 * 16];
            for (int s = 0; s < 2 * 16; s++) within[s] = below[end][s] - below[begin][s];
            uint64_t bits = entropy_of(within, 16) + entropy_of(within + 16, 16);
            for (int t = 0; t < TABLES; t++) {
                uint64_t all = bits + (t ? fewest[t - 1][begin] : 0);
                if (begin && (!t || all >= fewest[t][end])) continue;
                fewest[t][end] = all;
                begins[t][end] = (uint8_t)begin;
            }
        }
    for (int t = TABLES - 1, end = LEVELS; t; t--) thresholds[t - 1] = (uint8_t)(end = begins[t][end]);
}

/* The table of each byte of a stretch. */
INLINE void divide(const Division *d, size_t stretch, size_t n, uint8_t *table_of) {
    uint8_t first = d->thresholds[0], second = d->thresholds[1], third = d->thresholds[2];
    expand_columns(d->columns[stretch], d->periods[stretch], n, table_of);
    for (size_t at = 0; at < n; at += ROW) {
        uint8_t level = d->rows[stretch][at / ROW], *of = table_of + at;
        size_t width = smaller(ROW, n - at);
        for (size_t i = 0; i < width; i++) {
            uint8_t x = (uint8_t)(of[i] + level);
            of[i] = (uint8_t)((x >= first) + (x >= second) + (x >= third));
        }
    }
}

/* --------------------------------------------------------------------------------------------------- the stream */

/* Eight levels in three bytes; the last are filled up with levels of 0. */
static uint8_t *write_levels(const uint8_t *levels, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count; i += 8, out += 3) {
        uint32_t eight = 0;
        for (size_t k = 0; k < smaller(8, count - i); k++) eight |= (uint32_t)levels[i + k] << 3 * k;
        out[0] = (uint8_t)eight, out[1] = (uint8_t)(eight >> 8), out[2] = (uint8_t)(eight >> 16);
    }
    return out;
}

/* `levels` has room for a multiple of eight. */
static const uint8_t *read_levels(uint8_t *levels, size_t count, const uint8_t *in, const uint8_t *end) {
    if ((size_t)(end - in) < (count + 7) / 8 * 3) return NULL;
    for (size_t i = 0; i < count; i += 8, in += 3) {
        uint32_t eight = in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16;
        for (size_t k = 0; k < 8; k++) levels[i + k] = eight >> 3 * k & 7;
    }
    return in;
}

static size_t rows_in(size_t n) { return (n + ROW - 1) / ROW; }

static uint8_t *write_division(const Division *d, size_t n, uint8_t *out) {
    memcpy(out, d->thresholds, TABLES - 1);
    out += TABLES - 1;
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        memcpy(out, &d->periods[stretch], 2);
        out = write_levels(d->columns[stretch], d->periods[stretch], out + 2);
        out = write_levels(d->rows[stretch], rows_in(smaller(STRETCH, n - at)), out);
    }
    return out;
}

/* Where it ends; NULL where it is none. */
static const uint8_t *read_division(Division *d, size_t n, const uint8_t *in, const uint8_t *end) {
    if (end - in < TABLES - 1) return NULL;
    memcpy(d->thresholds, in, TABLES - 1);
    in += TABLES - 1;
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++) {
        if (end - in < 2) return NULL;
        memcpy(&d->periods[stretch], in, 2);
        if (!d->periods[stretch] || d->periods[stretch] > LONGEST_PERIOD) return NULL;
        if (!(in = read_levels(d->columns[stretch], d->periods[stretch], in + 2, end))) return NULL;
        if (!(in = read_levels(d->rows[stretch], rows_in(smaller(STRETCH, n - at)), in, end))) return NULL;
    }
    return in;
}
