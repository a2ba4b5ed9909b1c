/* Scales of two levels, for _cpu.c: Python's side of _twolevel.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_two_level_scales(PyObject *self, PyObject *args);
PyObject *py_two_level_units(PyObject *self, PyObject *args);
