/* One variant of a file's loops for each instruction set, and which of them serves.
 *
 * Included where the file has defined `Variant` (its functions, in a struct) and VARIANT(name, TARGET), which defines
 * name##_variant from functions that carry TARGET. AVX2 and AVX512 may name other extensions before. */
#ifndef AVX2
#define AVX2 "avx2"
#endif
#ifndef AVX512
#define AVX512 "avx2,avx512f,avx512bw,avx512dq,avx512vl"
#endif

VARIANT(generic, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
VARIANT(avx2, __attribute__((target(AVX2))))
VARIANT(avx512, __attribute__((target(AVX512))))
#endif

static const Variant *serving(const char *name) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (!strcmp(name, "avx512")) return &avx512_variant;
    if (!strcmp(name, "avx2")) return &avx2_variant;
#endif
    (void)name;
    return &generic_variant;
}
