/* The header of a payload: Python's side of _header.c, and what it needs of _cpu.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

uint64_t checksum_of(const uint8_t *data, size_t bytes);
PyObject *py_write_header(PyObject *self, PyObject *args);
PyObject *py_read_header(PyObject *self, PyObject *args);
