/* Whether a block is coded by one table or by four, and what its head says; a part of _entropy.c. */

/* Of so many tables, by how often bytes occur in each. */
INLINE void write_choice(const Division *d, size_t n, uint32_t (*counts)[SYMBOLS], size_t tables, Choice *choice) {
    uint8_t *head = choice->head;
    uint64_t parts = 0;
    *head++ = (uint8_t)tables;
    if (tables > 1) head = write_division(d, n, head);
    for (size_t t = 0; t < tables; t++) {
        share_slots(counts[t], choice->slots[t]);
        parts += entropy_of(counts[t], SYMBOLS);
    }
    head = write_slots((const uint16_t(*)[SYMBOLS])choice->slots, tables, head);
    choice->tables = tables;
    choice->length = (size_t)(head - choice->head);
    choice->bytes = (double)parts / (8 << 16) + (double)choice->length + STATE_BYTES;
}

/* Levels, thresholds, and how often bytes occur in each of four tables. */
INLINE void choose_division(const uint8_t *data, size_t n, const Prices *prices, Periods periods, Encoder *e,
                            uint32_t (*counts)[SYMBOLS], int avx2) {
    memset(e->counts, 0, sizeof e->counts);
    for (size_t at = 0, stretch = 0; at < n; at += STRETCH, stretch++)
        choose_levels(data + at, smaller(STRETCH, n - at), prices, periods, stretch, e, avx2);
    choose_thresholds(e->counts, e->division.thresholds);
    memset(counts, 0, TABLES * sizeof *counts);
    for (int level = 0, table = 0; level < LEVELS; level++) {
        while (table < TABLES - 1 && level >= e->division.thresholds[table]) table++;
        for (int s = 0; s < SYMBOLS; s++) counts[table][s] += e->counts[level * SYMBOLS + s];
    }
}

/* One table or four; NULL where it does not become shorter. */
INLINE Choice *chosen_tables(const uint8_t *data, size_t n, Periods periods, Encoder *e, int avx2) {
    uint32_t counts[TABLES][SYMBOLS], seen = 0;
    count_first(data, n, n < FEWEST_DIVIDED ? STRETCH : STRETCH / 16, counts[0]);
    for (int s = 0; s < SYMBOLS; s++) seen += counts[0][s];
    if ((double)entropy_of(counts[0], SYMBOLS) > (double)(8 << 16) * 127 / 128 * seen) return NULL;
    e->four.bytes = (double)n;
    if (n >= FEWEST_DIVIDED) {
        Prices prices = prices_of(counts[0]);
        choose_division(data, n, &prices, periods, e, counts, avx2);
        write_choice(&e->division, n, counts, TABLES, &e->four);
        for (int t = 1; t < TABLES; t++)
            for (int s = 0; s < SYMBOLS; s++) counts[0][s] += counts[t][s];
    }
    write_choice(NULL, n, counts, 1, &e->one);
    Choice *better = e->one.bytes <= e->four.bytes ? &e->one : &e->four;
    return better->bytes < (double)n ? better : NULL;
}
