/* Fresh memory for _cpu.c: Python's side of _memory.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *py_large_pages(PyObject *self, PyObject *args);
