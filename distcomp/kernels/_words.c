/* Which words of a model have changed, and a fingerprint of them: kernels/words.py says the same in torch.
 *
 * A word is what one number is stored as: 1, 2, 4 or 8 bytes, compared as they are. Nearly all of them are alike, so
 * whole stretches are compared first.
 */
#include <stdint.h>
#include <string.h>

#include "_inside.h"
#include "_words.h"

#define STRETCH_BYTES 64
#define GAMMA 0x9e3779b97f4a7c15u

static uint64_t difference(const uint8_t *a, const uint8_t *b) {
    uint64_t any = 0, x[STRETCH_BYTES / 8], y[STRETCH_BYTES / 8];
    memcpy(x, a, STRETCH_BYTES);
    memcpy(y, b, STRETCH_BYTES);
    for (int i = 0; i < STRETCH_BYTES / 8; i++) any |= x[i] ^ y[i];
    return any;
}

/* The indices of words that differ, rising; of at most `most`. Adds to `found` how many there are in all. */
#define CHANGED(type) \
    for (size_t start = 0, stretch = STRETCH_BYTES / sizeof(type); start < numel; start += stretch) { \
        const uint8_t *a = before + start * sizeof(type), *b = after + start * sizeof(type); \
        size_t count = numel - start < stretch ? numel - start : stretch; \
        if (count == stretch && !difference(a, b)) continue; \
        for (size_t j = 0; j < count; j++) { \
            type x, y; \
            memcpy(&x, a + j * sizeof x, sizeof x); \
            memcpy(&y, b + j * sizeof y, sizeof y); \
            if (found < most) places[found] = (int64_t)(start + j); \
            found += x != y; \
        } \
    }

static size_t changed_words(const uint8_t *before, const uint8_t *after, size_t numel, size_t itemsize, int64_t *places,
                            size_t most) {
    size_t found = 0;
    if (itemsize == 1) CHANGED(uint8_t)
    if (itemsize == 2) CHANGED(uint16_t)
    if (itemsize == 4) CHANGED(uint32_t)
    if (itemsize == 8) CHANGED(uint64_t)
    return found;
}

/* SplitMix64's output function of (seed + word + (index + 1) gamma), summed over the words. */
#define FINGERPRINT(type) \
    for (size_t j = 0; j < numel; j++) { \
        type word; \
        memcpy(&word, words + j * sizeof word, sizeof word); \
        uint64_t z = counter + word; \
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u; \
        z = (z ^ z >> 27) * 0x94d049bb133111ebu; \
        sum += z ^ z >> 31; \
        counter += GAMMA; \
    }

static uint64_t fingerprint(const uint8_t *words, size_t numel, size_t itemsize, uint64_t first, uint64_t seed) {
    uint64_t sum = 0, counter = seed + (first + 1) * GAMMA;
    if (itemsize == 1) FINGERPRINT(uint8_t)
    if (itemsize == 2) FINGERPRINT(uint16_t)
    if (itemsize == 4) FINGERPRINT(uint32_t)
    if (itemsize == 8) FINGERPRINT(uint64_t)
    return sum;
}

static int is_itemsize(Py_ssize_t itemsize) { return itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8; }

PyObject *py_changed_words(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long before, after, places;
    Py_ssize_t numel, itemsize, most;
    size_t found;
    if (!PyArg_ParseTuple(args, "KKKnnn", &before, &after, &places, &numel, &itemsize, &most)) return NULL;
    if (numel < 0 || most < 0 || !is_itemsize(itemsize)) return refused("these numbers of words or bytes");
    Py_BEGIN_ALLOW_THREADS
    found = changed_words((const uint8_t *)(uintptr_t)before, (const uint8_t *)(uintptr_t)after, (size_t)numel,
                          (size_t)itemsize, (int64_t *)(uintptr_t)places, (size_t)most);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(found);
}

PyObject *py_fingerprint(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long words, first, seed;
    Py_ssize_t numel, itemsize;
    uint64_t sum;
    if (!PyArg_ParseTuple(args, "KnnKK", &words, &numel, &itemsize, &first, &seed)) return NULL;
    if (numel < 0 || !is_itemsize(itemsize)) return refused("these numbers of words or bytes");
    Py_BEGIN_ALLOW_THREADS
    sum = fingerprint((const uint8_t *)(uintptr_t)words, (size_t)numel, (size_t)itemsize, first, seed);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(sum);
}
