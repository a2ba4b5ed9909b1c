/* Binary products for _cpu.c: Python's side of _binary.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *py_pack_signs(PyObject *self, PyObject *args);
PyObject *py_binary_conv(PyObject *self, PyObject *args);
