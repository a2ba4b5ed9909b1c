/* Models mixed with their neighbours', in one pass: kernels/mixing.py says the same in torch.
 *
 * Piece by piece: a sum stays in the first cache until all models are added to it. A product and its sum are rounded
 * once where torch rounds once, which is what fmaf does on every machine.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "_inside.h"
#include "_mixing.h"

#define PIECE 1024 /* elements */

const char *instruction_set(void);

typedef struct {
    const float *const *models;
    const float *weights; /* of all models but the first */
    size_t count, start, end;
    const float *x, *public; /* where there is an x, it is pulled by gamma times what the sum is beyond public */
    float *out, *beyond;     /* and what comes out is beyond public by this */
    float gamma;
} Mix;

#define BODY static inline __attribute__((always_inline))

BODY void add_weighted(const float *restrict model, const float *restrict first, float *restrict total, size_t n,
                       float weight) {
    for (size_t j = 0; j < n; j++) total[j] = fmaf(weight, model[j] - first[j], total[j]);
}

BODY void pull(const float *restrict x, const float *restrict public, float *restrict total, float *restrict beyond,
               size_t n, float gamma) {
    for (size_t j = 0; j < n; j++) {
        total[j] = x[j] + gamma * (total[j] - public[j]);
        beyond[j] = total[j] - public[j];
    }
}

BODY void mix_body(const Mix *mix) {
    for (size_t at = mix->start; at < mix->end; at += PIECE) {
        size_t n = mix->end - at < PIECE ? mix->end - at : PIECE;
        float *total = mix->out + at;
        memcpy(total, mix->models[0] + at, n * sizeof *total);
        for (size_t i = 1; i < mix->count; i++)
            add_weighted(mix->models[i] + at, mix->models[0] + at, total, n, mix->weights[i - 1]);
        if (mix->x) pull(mix->x + at, mix->public + at, total, mix->beyond + at, n, mix->gamma);
    }
}

typedef struct {
    void (*mix)(const Mix *);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void mix_##name(const Mix *mix) { mix_body(mix); } \
    static const Variant name##_variant = {mix_##name};
#define AVX2 "avx2,fma"
#define AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#include "_variants.h"

PyObject *py_mix(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long out, models, weights, x, public, beyond;
    Py_ssize_t count, start, end, size;
    Mix mix = {0};
    if (!PyArg_ParseTuple(args, "KKKn(nnn)(KKKf)", &out, &models, &weights, &count, &start, &end, &size, &x, &public,
                          &beyond, &mix.gamma))
        return NULL;
    if (count < 1 || start < 0 || end < start || end > size) return refused("this number of models, or these elements,");
    mix.out = (float *)(uintptr_t)out;
    mix.models = (const float *const *)(uintptr_t)models;
    mix.weights = (const float *)(uintptr_t)weights;
    mix.x = (const float *)(uintptr_t)x;
    mix.public = (const float *)(uintptr_t)public;
    mix.beyond = (float *)(uintptr_t)beyond;
    mix.count = (size_t)count;
    mix.start = (size_t)start;
    mix.end = (size_t)end;
    Py_BEGIN_ALLOW_THREADS
    serving(instruction_set())->mix(&mix);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
