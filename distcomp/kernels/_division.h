/* How the bytes of a block are divided between its codes; a part of _entropy.c. */

/* The mean price of each column, for the period whose columns differ by most beyond what chance makes of them. */
INLINE uint16_t columns_of(const uint8_t *prices, size_t n, Periods periods, float *means, double *mean) {
    uint32_t total = 0, squares = 0; /* of at most STRETCH prices, each below 2^8 */
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
INLINE void expand_columns(Division *d, size_t stretch, uint8_t *out, size_t n) {
    size_t period = d->periods[stretch];
    for (size_t at = 0; at < n; at += period) memcpy(out + at, d->columns[stretch], smaller(period, n - at));
}

/* The levels of a stretch's columns, then of its rows: what is dearer than usual beyond what its columns are. */
INLINE void levels_of(const uint8_t *data, size_t n, const Prices *usual, LookUp *look_up, Periods periods,
                      size_t stretch, Encoder *e) {
    Division *d = &e->division;
    uint8_t *columns = d->table_of + stretch * STRETCH;
    const uint8_t *prices = e->prices;
    double mean;
    look_up(data, n, usual, e->prices);
    uint16_t period = d->periods[stretch] = columns_of(prices, n, periods, e->means, &mean);
    for (size_t c = 0; c < period; c++) d->columns[stretch][c] = level_of(e->means[c] - mean, COLUMN_BITS);
    expand_columns(d, stretch, columns, n);
    for (size_t at = 0; at < n; at += ROW) {
        uint16_t paid = 0, levels = 0; /* of 128 numbers below 2^8 */
        size_t width = smaller(n - at, ROW);
        for (size_t i = at; i < at + width; i++) paid = (uint16_t)(paid + prices[i]), levels = (uint16_t)(levels + columns[i]);
        double due = usual->usual + LEVEL * ((double)levels / (double)width - (1 << (COLUMN_BITS - 1)));
        d->rows[stretch][at / ROW] = level_of((double)paid / (double)width - due, ROW_BITS);
    }
}

/* From levels to tables, in place. */
INLINE void divide(Division *d, size_t n) {
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

/* About as many bytes to each of the tables; of every eighth row. */
static void choose_thresholds(Division *d, size_t n) {
    size_t bytes[LEVELS] = {0}, seen = 0, before = 0;
    for (size_t at = 0; at < n; at += 8 * ROW) {
        size_t level = d->rows[at / STRETCH][at % STRETCH / ROW], end = smaller(n, at + ROW);
        for (size_t i = at; i < end; i++) bytes[d->table_of[i] + level]++;
        seen += end - at;
    }
    for (size_t level = 0, t = 0; t < TABLES - 1; level++) {
        if (level < LEVELS) before += bytes[level];
        while (t < TABLES - 1 && (level + 1 >= LEVELS || TABLES * before >= (t + 1) * seen))
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
