/* Which are the largest of a row, for _rows.c and _dct.c. */
typedef struct {
    int64_t start, length, count; /* of the row in the flat buffer; how many of its elements are sent */
    int64_t place, code;          /* where its places and its bytes begin */
    int64_t width;                /* of an index within its chunk; BITMAP or NOTHING */
} Row;

/* What a row's search needs: room for twice as many as are sent, and the threshold that served the row before. */
typedef struct {
    int32_t *magnitudes;
    int64_t *places;
    int32_t guess;
} Search;

typedef void (*TopRow)(const float *all, const Row *row, Search *s, int64_t *places);

TopRow top_row_of(const char *instruction_set); /* of _rows.c: top_row_body for that instruction set */

#define STRIDE 61 /* one stretch of LANES in 61 makes the sample: a prime, in step with no row length */

/* How many can be kept: enough that almost any guess between the count and twice that serves, and for a sample. */
static inline size_t room_for(size_t n, size_t count) {
    size_t due = 2 * count + 64 * STRIDE, sample = n / STRIDE + LANES;
    return due > sample ? due : sample;
}
