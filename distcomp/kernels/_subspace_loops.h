/* The loops of _subspace.c for one instruction set: included once for each, inside of its target pragma. NAME(x) names
 * a function of this set, WIDTH is how many floats its registers hold, MOST_SLICES and MOST_ROWS say how many sums
 * stay in them. None of these changes a bit: a sum of LANES lanes is taken in parts of WIDTH. */

typedef float NAME(Lanes) __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t NAME(Words) __attribute__((vector_size(4 * WIDTH)));
typedef float NAME(Anywhere) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t NAME(WordsAnywhere) __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));

#define V NAME(Lanes)
#define load(from) ((V) * (const NAME(Anywhere) *)(from))
#define store(to, lanes) (*(NAME(Anywhere) *)(to) = (lanes))
#define load_pairs(from) ((NAME(Words)) * (const NAME(WordsAnywhere) *)(from))
#define first_of(pairs) ((V)((pairs) << 16)) /* a bfloat16 is the upper half of a float32 */
#define second_of(pairs) ((V)((pairs) & 0xFFFF0000u))

/* sums[t][s] += the products of `rows` rows of the basis with `slices` slices, over `blocks` blocks, in WIDTH of the
 * LANES lanes. */
static inline __attribute__((always_inline)) void NAME(dots)(const uint16_t *basis, size_t stride, const float *tile,
                                                             size_t blocks, const size_t rows, const size_t slices,
                                                             size_t sums_stride, float *sums) {
    V sum[MOST_ROWS][MOST_SLICES];
    for (size_t t = 0; t < rows; t++)
        for (size_t s = 0; s < slices; s++) sum[t][s] = load(sums + t * sums_stride + s * LANES);
    for (size_t i = 0; i < blocks * BLOCK; i += BLOCK) {
        V low[MOST_ROWS], high[MOST_ROWS];
        for (size_t t = 0; t < rows; t++) {
            NAME(Words) pairs = load_pairs(basis + t * stride + i);
            low[t] = first_of(pairs), high[t] = second_of(pairs);
        }
        for (size_t s = 0; s < slices; s++) {
            V even = load(tile + s * SPAN + i), odd = load(tile + s * SPAN + i + LANES);
            for (size_t t = 0; t < rows; t++) sum[t][s] = sum[t][s] + even * low[t] + odd * high[t];
        }
    }
    for (size_t t = 0; t < rows; t++)
        for (size_t s = 0; s < slices; s++) store(sums + t * sums_stride + s * LANES, sum[t][s]);
}

/* As many slices and rows at a time as there are registers for. */
static void NAME(dots_of_tile)(const uint16_t *basis, size_t stride, size_t dims, const float *tile, size_t slices,
                               size_t blocks, float *sums) {
    size_t sums_stride = TOGETHER * LANES;
#define SOME(slices_, rows_) \
    for (size_t part = 0; part < LANES; part += WIDTH) \
    NAME(dots)(basis + k * stride + 2 * part, stride, tile + s * SPAN + part, blocks, rows_, slices_, sums_stride, \
               sums + k * sums_stride + s * LANES + part)
    for (size_t s = 0, many; s < slices; s += many) {
        size_t left = slices - s, k = 0;
        many = left >= MOST_SLICES ? MOST_SLICES : left >= 3 ? 3 : 1;
        for (; k + MOST_ROWS <= dims; k += MOST_ROWS) {
            if (many == MOST_SLICES) { SOME(MOST_SLICES, MOST_ROWS); }
            else if (many == 3) { SOME(3, MOST_ROWS); }
            else { SOME(1, MOST_ROWS); }
        }
        for (; k < dims; k++) {
            if (many == MOST_SLICES) { SOME(MOST_SLICES, 1); }
            else if (many == 3) { SOME(3, 1); }
            else { SOME(1, 1); }
        }
    }
#undef SOME
}

/* values[s] = sum over k of c[s][k] times one block of row k, in the order of k: 2 * WIDTH elements of it. */
static inline __attribute__((always_inline)) void NAME(block_of)(const uint16_t *basis, size_t stride, size_t dims,
                                                                 const float *c, const size_t slices, float *values) {
    V low[MOST_SLICES] = {0}, high[MOST_SLICES] = {0};
    for (size_t k = 0; k < dims; k++, basis += stride) {
        NAME(Words) pairs = load_pairs(basis);
        __builtin_prefetch(basis + 2 * BLOCK); /* a row's next piece is in no line near this one's */
        V even = first_of(pairs), odd = second_of(pairs);
        for (size_t s = 0; s < slices; s++) {
            low[s] = low[s] + c[s * dims + k] * even;
            high[s] = high[s] + c[s * dims + k] * odd;
        }
    }
    for (size_t s = 0; s < slices; s++) {
        store(values + s * BLOCK, low[s]);
        store(values + s * BLOCK + LANES, high[s]);
    }
}

static void NAME(blocks_of)(const uint16_t *basis, size_t stride, size_t dims, const float *c, size_t slices,
                            float *values) {
    for (size_t s = 0, many; s < slices; s += many) {
        size_t left = slices - s;
        many = left >= MOST_SLICES ? MOST_SLICES : left >= 3 ? 3 : 1;
        for (size_t part = 0; part < LANES; part += WIDTH) {
            const uint16_t *at = basis + 2 * part;
            float *to = values + s * BLOCK + part;
            if (many == MOST_SLICES) NAME(block_of)(at, stride, dims, c + s * dims, MOST_SLICES, to);
            else if (many == 3) NAME(block_of)(at, stride, dims, c + s * dims, 3, to);
            else NAME(block_of)(at, stride, dims, c + s * dims, 1, to);
        }
    }
}

/* The squares of up to SPAN values, and those of their distances from `mean`, added up. */
static void NAME(squares)(const float *x, const float *mean, size_t n, double *whole, double *centred) {
    size_t rest = n - n % LANES;
    for (size_t part = 0; part < LANES; part += WIDTH) {
        V sum = {0}, apart = {0};
        for (size_t i = part; i < rest; i += LANES) {
            V value = load(x + i), away = value - load(mean + i);
            sum += value * value;
            apart += away * away;
        }
        for (size_t lane = 0; lane < WIDTH; lane++) *whole += sum[lane], *centred += apart[lane];
    }
    for (; rest < n; rest++) {
        double value = x[rest], away = value - mean[rest];
        *whole += value * value, *centred += away * away;
    }
}

static const Variant NAME(variant) = {NAME(dots_of_tile), NAME(blocks_of), NAME(squares)};

#undef V
#undef load
#undef store
#undef load_pairs
#undef first_of
#undef second_of
#undef NAME
#undef WIDTH
#undef MOST_SLICES
#undef MOST_ROWS
