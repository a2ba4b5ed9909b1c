/* Products of signs: 64 to a word, xor for times, population count for plus.
 *
 * A sign is a bit, 1 for -1. Of n products of signs, p differ: their sum is n - 2 p. Words of eight outputs lie
 * side by side (lane l of group g is output 8 g + l), so that one vector instruction serves eight of them.
 * A linear layer is a convolution of one place with a kernel of one place.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_binary.h"
#include "_inside.h"

#define LANES 8
#define BODY static inline __attribute__((always_inline))
#define TILE 8 /* places whose sums stay in registers while a group's words are read once */

typedef struct {
    const uint64_t *x;      /* [height][width][words] of one sample */
    const uint64_t *weight; /* [groups][kh * kw][words][LANES] */
    const float *scale;     /* [outputs] */
    const float *bias;      /* [outputs] */
    float *out;             /* [outputs][places], or [places][outputs] where rows */
    const uint64_t *zeros;  /* [words], what the padding holds */
    const uint64_t **seen;  /* [kh * kw][TILE], the words that a tile's places see */
    uint64_t *ones;         /* [groups][kh * kw][LANES], signs that differ from zeros */
    int height, width, channels, outputs, kh, kw, stride, padding, out_height, out_width, rows;
} Conv;

BODY size_t words_of(const Conv *c) { return ((size_t)c->channels + 63) / 64; }

/* One word of signs: bit i is 1 where x[i * step] < 0. */
BODY uint64_t sign_word(const float *x, size_t count, size_t step) {
    uint64_t word = 0;
    for (size_t i = 0; i < count; i++) word |= (uint64_t)(x[i * step] < 0.0f) << i;
    return word;
}

/* [channels][places] -> [places][words]; a channel's places lie side by side, so they are walked innermost. */
BODY void pack_body(const float *restrict x, uint64_t *restrict out, size_t channels, size_t places) {
    size_t words = (channels + 63) / 64;
    if (places == 1) {
        for (size_t w = 0; w < words; w++)
            out[w] = sign_word(x + 64 * w, channels - 64 * w < 64 ? channels - 64 * w : 64, 1);
        return;
    }
    for (size_t w = 0; w < words; w++) {
        size_t count = channels - 64 * w < 64 ? channels - 64 * w : 64;
        for (size_t start = 0; start < places; start += 64) {
            size_t span = places - start < 64 ? places - start : 64;
            uint64_t word[64] = {0};
            for (size_t i = 0; i < count; i++) {
                const float *row = x + (64 * w + i) * places + start;
                for (size_t p = 0; p < span; p++) word[p] |= (uint64_t)(row[p] < 0.0f) << i;
            }
            for (size_t p = 0; p < span; p++) out[(start + p) * words + w] = word[p];
        }
    }
}

/* count[t][l]: how many signs differ between what place t sees and the filter in lane l. */
BODY void differing_body(const uint64_t *const *seen, const uint64_t *weight, size_t taps, size_t words, int places,
                         uint64_t count[TILE][LANES]) {
    memset(count, 0, TILE * sizeof *count);
    for (size_t k = 0; k < taps; k++)
        for (size_t w = 0; w < words; w++, weight += LANES)
            for (int t = 0; t < places; t++)
                for (int l = 0; l < LANES; l++)
                    count[t][l] += (uint64_t)__builtin_popcountll(seen[k * TILE + (size_t)t][w] ^ weight[l]);
}

typedef struct {
    void (*pack)(const float *, uint64_t *, size_t, size_t);
    void (*differing)(const uint64_t *const *, const uint64_t *, size_t, size_t, int, uint64_t (*)[LANES]);
} Binary;

#define PACK(name, TARGET) \
    TARGET static void pack_##name(const float *x, uint64_t *out, size_t channels, size_t places) { \
        pack_body(x, out, channels, places); \
    }
#define VARIANT(name, TARGET) \
    PACK(name, TARGET) \
    TARGET static void differing_##name(const uint64_t *const *seen, const uint64_t *weight, size_t taps, \
                                        size_t words, int places, uint64_t (*count)[LANES]) { \
        differing_body(seen, weight, taps, words, places, count); \
    } \
    static const Binary name##_binary = {pack_##name, differing_##name};

VARIANT(generic, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86_VARIANTS
#include <immintrin.h>
#define WIDE __attribute__((target("avx2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq," \
                                   "prefer-vector-width=512")))
VARIANT(popcnt, __attribute__((target("avx2,popcnt"))))
PACK(vpopcnt, WIDE)

/* Compilers leave the loop above scalar, so it is spelled out: one register of sums for each place. */
WIDE BODY void wide_body(const uint64_t *const *seen, const uint64_t *weight, size_t taps, size_t words, int places,
                         uint64_t count[TILE][LANES]) {
    __m512i sum[TILE];
    for (int t = 0; t < places; t++) sum[t] = _mm512_setzero_si512();
    for (size_t k = 0; k < taps; k++, seen += TILE)
        for (size_t w = 0; w < words; w++, weight += LANES) {
            __m512i filters = _mm512_loadu_si512(weight);
            for (int t = 0; t < places; t++) {
                __m512i differ = _mm512_xor_si512(filters, _mm512_set1_epi64((long long)seen[t][w]));
                sum[t] = _mm512_add_epi64(sum[t], _mm512_popcnt_epi64(differ));
            }
        }
    for (int t = 0; t < places; t++) _mm512_storeu_si512(count[t], sum[t]);
}

WIDE static void differing_vpopcnt(const uint64_t *const *seen, const uint64_t *weight, size_t taps, size_t words,
                                   int places, uint64_t (*count)[LANES]) {
    if (places == TILE) {
        wide_body(seen, weight, taps, words, TILE, count);
        return;
    }
    for (int t = 0; t < places; t++) wide_body(seen + t, weight, taps, words, 1, count + t);
}

static const Binary vpopcnt_binary = {pack_vpopcnt, differing_vpopcnt};
#endif

/* Integers add to the same bits whichever serves. */
static const Binary *best(void) {
#ifdef HAVE_X86_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &vpopcnt_binary;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return &popcnt_binary;
#endif
    return &generic_binary;
}

static const Binary *serving(int plain) { return plain ? &generic_binary : best(); }

/* What the padding would add to the count of signs that differ: taken off again, for zeros count nothing. */
static void count_ones(const Conv *c) {
    size_t words = words_of(c), rows = (size_t)((c->outputs + LANES - 1) / LANES * c->kh * c->kw);
    memset(c->ones, 0, rows * LANES * sizeof *c->ones);
    for (size_t row = 0; row < rows; row++)
        for (size_t i = 0; i < words * LANES; i++)
            c->ones[row * LANES + i % LANES] += (uint64_t)__builtin_popcountll(c->weight[row * words * LANES + i]);
}

/* Points c->seen at what the places from `first` on see; how many values of x each of them sees. */
static void look(const Conv *c, int first, int places, int inside[TILE]) {
    size_t words = words_of(c);
    for (int t = 0; t < places; t++) {
        int top = (first + t) / c->out_width * c->stride - c->padding;
        int left = (first + t) % c->out_width * c->stride - c->padding;
        inside[t] = 0;
        for (int k = 0; k < c->kh * c->kw; k++) {
            int y = top + k / c->kw, x = left + k % c->kw;
            int is_inside = y >= 0 && y < c->height && x >= 0 && x < c->width;
            c->seen[k * TILE + t] = is_inside ? c->x + ((size_t)y * (size_t)c->width + (size_t)x) * words : c->zeros;
            inside[t] += is_inside;
        }
    }
}

/* TILE places (or fewer), all outputs. */
static void conv_tile(const Conv *c, const Binary *binary, int first, int places) {
    int taps = c->kh * c->kw, inside[TILE];
    size_t area = (size_t)c->out_height * (size_t)c->out_width, words = words_of(c);
    look(c, first, places, inside);
    for (int start = 0; start < c->outputs; start += LANES) {
        size_t row = (size_t)(start / LANES * taps);
        uint64_t count[TILE][LANES];
        binary->differing(c->seen, c->weight + row * words * LANES, (size_t)taps, words, places, count);
        for (int t = 0; t < places; t++) {
            for (int k = 0; inside[t] < taps && k < taps; k++)
                for (int l = 0; c->seen[k * TILE + t] == c->zeros && l < LANES; l++)
                    count[t][l] -= c->ones[(row + (size_t)k) * LANES + (size_t)l];
            for (int l = 0; l < LANES && start + l < c->outputs; l++) {
                size_t o = (size_t)(start + l), place = (size_t)(first + t);
                int sum = inside[t] * c->channels - 2 * (int)count[t][l];
                c->out[c->rows ? place * (size_t)c->outputs + o : o * area + place] =
                    (float)sum * c->scale[o] + c->bias[o];
            }
        }
    }
}

static void conv(const Conv *c, const Binary *binary) {
    int area = c->out_height * c->out_width;
    for (int first = 0; first < area; first += TILE)
        conv_tile(c, binary, first, area - first < TILE ? area - first : TILE);
}

PyObject *py_pack_signs(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, out;
    Py_ssize_t samples, channels, places, x_size, out_size;
    int plain;
    if (!PyArg_ParseTuple(args, "KK(nn)nnnp", &x, &out, &x_size, &out_size, &samples, &channels, &places, &plain))
        return NULL;
    const int64_t read[] = {channels, places, samples};
    const int64_t written[] = {channels / 64 + !!(channels % 64), places, samples};
    if (!product_inside(read, 3, x_size) || !product_inside(written, 3, out_size))
        return refused("so many samples, channels or places");
    if (!channels || !places) Py_RETURN_NONE; /* nothing, however many samples of it */
    const float *from = (const float *)(uintptr_t)x;
    uint64_t *to = (uint64_t *)(uintptr_t)out;
    size_t words = ((size_t)channels + 63) / 64;
    const Binary *binary = serving(plain);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t n = 0; n < samples; n++)
        binary->pack(from + n * channels * places, to + (size_t)(n * places) * words, (size_t)channels,
                     (size_t)places);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* One allocation for zeros, ones and seen: they hold words and addresses. */
static int allocate(Conv *c) {
    size_t words = words_of(c), taps = (size_t)(c->kh * c->kw);
    size_t ones = (size_t)((c->outputs + LANES - 1) / LANES) * taps * LANES;
    uint64_t *zeros = calloc(words + ones + taps * TILE, sizeof *zeros);
    if (!zeros) return 0;
    c->zeros = zeros;
    c->ones = zeros + words;
    c->seen = (const uint64_t **)(c->ones + ones);
    return 1;
}

/* Every number in its range, no product of them above 2^31, and the output not larger than the input gives. */
static int is_possible(const Conv *c, Py_ssize_t samples) {
    const long long most = 1ll << 31;
    if (samples < 0 || c->channels < 1 || c->height < 1 || c->width < 1 || c->outputs < 0 || c->kh < 1 ||
        c->kw < 1 || c->stride < 1 || c->padding < 0 || c->out_height < 1 || c->out_width < 1)
        return 0;
    long long height = (long long)c->height + 2ll * c->padding, width = (long long)c->width + 2ll * c->padding;
    if (height > most || width > most || (long long)c->height * c->width > most ||
        (long long)c->kh * c->kw > (most - 1) / TILE || (long long)c->out_height * c->out_width > most - TILE ||
        (long long)c->kh * c->kw * c->channels >= most || c->outputs > most - LANES)
        return 0;
    return c->kh <= height && c->kw <= width && c->out_height <= (height - c->kh) / c->stride + 1 &&
           c->out_width <= (width - c->kw) / c->stride + 1;
}

/* Whether x, weight, scale, bias and out have as many elements as such a convolution reads and writes. */
static int buffers_suffice(const Conv *c, Py_ssize_t samples, const Py_ssize_t sizes[5]) {
    const int64_t words = (int64_t)words_of(c), groups = (c->outputs + LANES - 1) / LANES;
    const int64_t image[] = {c->height, c->width, words, samples};
    const int64_t weight[] = {groups, c->kh, c->kw, words, LANES};
    const int64_t out[] = {c->outputs, c->out_height, c->out_width, samples};
    return product_inside(image, 4, sizes[0]) && product_inside(weight, 5, sizes[1]) && c->outputs <= sizes[2] &&
           c->outputs <= sizes[3] && product_inside(out, 4, sizes[4]);
}

PyObject *py_binary_conv(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, weight, scale, bias, out;
    Py_ssize_t samples, sizes[5];
    int plain;
    Conv c;
    if (!PyArg_ParseTuple(args, "KKKKK(nnnnn)n(iii)(iiiii)(ii)pp", &x, &weight, &scale, &bias, &out, &sizes[0],
                          &sizes[1], &sizes[2], &sizes[3], &sizes[4], &samples, &c.channels, &c.height, &c.width,
                          &c.outputs, &c.kh, &c.kw, &c.stride, &c.padding, &c.out_height, &c.out_width, &c.rows,
                          &plain))
        return NULL;
    if (!is_possible(&c, samples) || !buffers_suffice(&c, samples, sizes)) return refused("such a convolution");
    c.weight = (const uint64_t *)(uintptr_t)weight;
    c.scale = (const float *)(uintptr_t)scale;
    c.bias = (const float *)(uintptr_t)bias;
    if (!allocate(&c)) return PyErr_NoMemory();
    size_t x_step = (size_t)c.height * (size_t)c.width * words_of(&c);
    size_t out_step = (size_t)c.outputs * (size_t)c.out_height * (size_t)c.out_width;
    const Binary *binary = serving(plain);
    Py_BEGIN_ALLOW_THREADS
    if (c.padding) count_ones(&c);
    for (Py_ssize_t n = 0; n < samples; n++) {
        c.x = (const uint64_t *)(uintptr_t)x + (size_t)n * x_step;
        c.out = (float *)(uintptr_t)out + (size_t)n * out_step;
        conv(&c, binary);
    }
    Py_END_ALLOW_THREADS
    free((void *)c.zeros);
    Py_RETURN_NONE;
}
