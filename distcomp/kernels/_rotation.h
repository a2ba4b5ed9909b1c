/* Rows turned by random signs and the Walsh-Hadamard transform, for _cpu.c: Python's side of _rotation.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_rotate(PyObject *self, PyObject *args);
