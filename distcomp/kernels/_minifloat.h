/* Floats of 4 and 8 bits, for _cpu.c: Python's side of _minifloat.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_minifloat_encode(PyObject *self, PyObject *args);
PyObject *py_minifloat_decode(PyObject *self, PyObject *args);
