/* A coder for bytes, for _cpu.c: Python's side of _entropy.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_entropy_encode(PyObject *self, PyObject *args);
PyObject *py_entropy_decode(PyObject *self, PyObject *args);
