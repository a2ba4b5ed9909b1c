/* Coefficients of slices, for _cpu.c: Python's side of _subspace.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_subspace_project(PyObject *self, PyObject *args);
PyObject *py_subspace_restore(PyObject *self, PyObject *args);
PyObject *py_squares(PyObject *self, PyObject *args);
