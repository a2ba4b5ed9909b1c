/* Cosine coefficients of chunks, for _cpu.c: Python's side of _dct.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_dct(PyObject *self, PyObject *args);
