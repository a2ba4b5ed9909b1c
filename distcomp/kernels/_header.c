/* The header of a payload, 32 bytes before its body, little-endian: distcomp/payload.py says what each is, and does
 * the same in Python.
 */
#include "_header.h"

#include <string.h>

#include "_inside.h"

enum { HEADER = 32, FLAGS = 4 };

typedef struct {
    unsigned long long wire;
    Py_ssize_t body;
    unsigned int rank, fingerprint, exchange;
    int finite;
} Sealed;

static void put_number(uint8_t *at, uint64_t number, int bytes) {
    for (int i = 0; i < bytes; i++) at[i] = (uint8_t)(number >> 8 * i);
}

static void header_of(const Sealed *sealed, uint8_t header[HEADER]) {
    const uint8_t *body = (const uint8_t *)(uintptr_t)sealed->wire + HEADER;
    memcpy(header, "dcp1", FLAGS);
    header[FLAGS] = !sealed->finite;
    header[FLAGS + 1] = !!sealed->finite;
    put_number(header + 6, sealed->rank, 2);
    put_number(header + 8, sealed->fingerprint, 4);
    put_number(header + 12, sealed->exchange, 4);
    put_number(header + 16, (uint64_t)sealed->body, 8);
    put_number(header + 24, checksum_of(body, (size_t)sealed->body), 8);
}

PyObject *py_write_header(PyObject *self, PyObject *args) {
    (void)self;
    Sealed sealed;
    if (!PyArg_ParseTuple(args, "KnIIIp", &sealed.wire, &sealed.body, &sealed.rank, &sealed.fingerprint,
                          &sealed.exchange, &sealed.finite))
        return NULL;
    if (sealed.body < 0) return refused("a negative number of bytes");
    Py_BEGIN_ALLOW_THREADS
    header_of(&sealed, (uint8_t *)(uintptr_t)sealed.wire);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* The flag of a header that is as agreed; None where it is another. */
PyObject *py_read_header(PyObject *self, PyObject *args) {
    (void)self;
    Sealed sealed;
    uint8_t agreed[HEADER];
    int same;
    if (!PyArg_ParseTuple(args, "KnIII", &sealed.wire, &sealed.body, &sealed.rank, &sealed.fingerprint,
                          &sealed.exchange))
        return NULL;
    if (sealed.body < 0) return refused("a negative number of bytes");
    const uint8_t *there = (const uint8_t *)(uintptr_t)sealed.wire;
    sealed.finite = !there[FLAGS];
    Py_BEGIN_ALLOW_THREADS
    header_of(&sealed, agreed);
    same = memcmp(there, agreed, HEADER) == 0;
    Py_END_ALLOW_THREADS
    if (!same) Py_RETURN_NONE;
    return PyBool_FromLong(sealed.finite);
}
