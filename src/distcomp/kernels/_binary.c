/* Products of signs: 64 to a word, xor for times, population count for plus.
 *
 * A sign is a bit, 1 for -1. Of n products of signs, p differ: their sum is n - 2 p. Words of eight outputs lie
 * side by side (lane l of group g is output 8 g + l), so that one vector instruction serves eight of them.
 * A linear layer is a convolution of one place with a kernel of one place.
 */
#include <stdint.h>
#include <string.h>

#include "_binary.h"

#define LANES 8
#define BODY static inline __attribute__((always_inline))
#define TILE 4 /* places whose sums stay in registers while a group's words are read once */

typedef struct {
    const uint64_t *x;      /* [height][width][words] of one sample */
    const uint64_t *weight; /* [groups][kh * kw][words][LANES] */
    const float *scale;     /* [outputs] */
    const float *bias;      /* [outputs] */
    float *out;             /* [outputs][out_height][out_width] */
    int height, width, channels, outputs, kh, kw, stride, padding, out_height, out_width;
} Conv;

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

/* How many signs differ, for TILE places (or fewer) and one group of outputs, at one place of the kernel. */
BODY void add_differing(const uint64_t *const *x, int places, const uint64_t *weight, size_t words,
                        uint64_t count[TILE][LANES]) {
    for (size_t w = 0; w < words; w++)
        for (int t = 0; t < places; t++)
            for (int l = 0; l < LANES; l++)
                count[t][l] += (uint64_t)__builtin_popcountll(x[t][w] ^ weight[w * LANES + (size_t)l]);
}

/* TILE places of a row, all outputs. Places of the kernel that lie outside count nothing: zero padding. */
BODY void conv_tile(const Conv *c, int oy, int ox, int places) {
    size_t words = ((size_t)c->channels + 63) / 64, taps = (size_t)(c->kh * c->kw);
    size_t area = (size_t)c->out_height * (size_t)c->out_width;
    for (int group = 0; group * LANES < c->outputs; group++) {
        const uint64_t *weight = c->weight + (size_t)group * taps * words * LANES;
        uint64_t count[TILE][LANES] = {{0}};
        int inside[TILE] = {0};
        for (int ky = 0; ky < c->kh; ky++) {
            int y = oy * c->stride + ky - c->padding;
            if (y < 0 || y >= c->height) continue;
            for (int kx = 0; kx < c->kw; kx++) {
                const uint64_t *from = weight + (size_t)(ky * c->kw + kx) * words * LANES, *x[TILE];
                int all = 1, left[TILE];
                for (int t = 0; t < places; t++) {
                    left[t] = (ox + t) * c->stride + kx - c->padding;
                    all &= left[t] >= 0 && left[t] < c->width;
                    x[t] = c->x + ((size_t)y * (size_t)c->width + (size_t)(left[t] < 0 ? 0 : left[t])) * words;
                }
                if (all && places == TILE) {
                    add_differing(x, TILE, from, words, count);
                    for (int t = 0; t < TILE; t++) inside[t]++;
                    continue;
                }
                for (int t = 0; t < places; t++) {
                    if (left[t] < 0 || left[t] >= c->width) continue;
                    add_differing(x + t, 1, from, words, count + t);
                    inside[t]++;
                }
            }
        }
        for (int l = 0; l < LANES && group * LANES + l < c->outputs; l++) {
            int o = group * LANES + l;
            float *out = c->out + (size_t)o * area + (size_t)oy * (size_t)c->out_width + (size_t)ox;
            for (int t = 0; t < places; t++) {
                int sum = inside[t] * c->channels - 2 * (int)count[t][l];
                out[t] = (float)sum * c->scale[o] + c->bias[o];
            }
        }
    }
}

BODY void conv_body(const Conv *c) {
    for (int oy = 0; oy < c->out_height; oy++)
        for (int ox = 0; ox < c->out_width; ox += TILE)
            conv_tile(c, oy, ox, c->out_width - ox < TILE ? c->out_width - ox : TILE);
}

typedef struct {
    void (*pack)(const float *, uint64_t *, size_t, size_t);
    void (*conv)(const Conv *);
} Binary;

#define VARIANT(name, TARGET) \
    TARGET static void pack_##name(const float *x, uint64_t *out, size_t channels, size_t places) { \
        pack_body(x, out, channels, places); \
    } \
    TARGET static void conv_##name(const Conv *c) { conv_body(c); } \
    static const Binary name##_binary = {pack_##name, conv_##name};

VARIANT(generic, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
VARIANT(popcnt, __attribute__((target("avx2,popcnt"))))
VARIANT(vpopcnt, __attribute__((target("avx2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,"
                                       "prefer-vector-width=512"))))
#define HAVE_X86_VARIANTS
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

PyObject *py_pack_signs(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, out;
    Py_ssize_t samples, channels, places;
    int plain;
    if (!PyArg_ParseTuple(args, "KKnnnp", &x, &out, &samples, &channels, &places, &plain)) return NULL;
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

PyObject *py_binary_conv(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, weight, scale, bias, out;
    Py_ssize_t samples;
    int plain;
    Conv c;
    if (!PyArg_ParseTuple(args, "KKKKKn(iii)(iiiii)(ii)p", &x, &weight, &scale, &bias, &out, &samples,
                          &c.channels, &c.height, &c.width, &c.outputs, &c.kh, &c.kw, &c.stride, &c.padding,
                          &c.out_height, &c.out_width, &plain))
        return NULL;
    c.weight = (const uint64_t *)(uintptr_t)weight;
    c.scale = (const float *)(uintptr_t)scale;
    c.bias = (const float *)(uintptr_t)bias;
    size_t words = ((size_t)c.channels + 63) / 64;
    size_t x_step = (size_t)c.height * (size_t)c.width * words;
    size_t out_step = (size_t)c.outputs * (size_t)c.out_height * (size_t)c.out_width;
    const Binary *binary = serving(plain);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t n = 0; n < samples; n++) {
        c.x = (const uint64_t *)(uintptr_t)x + (size_t)n * x_step;
        c.out = (float *)(uintptr_t)out + (size_t)n * out_step;
        binary->conv(&c);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
