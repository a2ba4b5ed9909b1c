/* Asking for large pages: of 2 MB instead of 4 kB, where the system has them for those who ask. */
#define _DEFAULT_SOURCE
#include <stdint.h>
#include <sys/mman.h>

#include "_inside.h"
#include "_memory.h"

#define PAGE 4096u

/* A wish, whose refusal changes no result: what madvise returns is not looked at. */
PyObject *py_large_pages(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long at;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "Kn", &at, &bytes)) return NULL;
    if (bytes < 0 || at > UINT64_MAX - (uint64_t)bytes) return refused("a negative size, or one beyond all memory,");
#ifdef MADV_HUGEPAGE
    uint64_t first = at + (PAGE - at % PAGE) % PAGE, end = at + (uint64_t)bytes;
    end -= end % PAGE;
    if (first < end) (void)madvise((void *)(uintptr_t)first, (size_t)(end - first), MADV_HUGEPAGE);
#endif
    Py_RETURN_NONE;
}
