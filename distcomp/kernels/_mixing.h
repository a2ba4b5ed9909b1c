/* Models mixed with their neighbours', for _cpu.c: Python's side of _mixing.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *py_mix(PyObject *self, PyObject *args);
