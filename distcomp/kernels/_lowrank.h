/* Products with thin matrices for _cpu.c: Python's side of _lowrank.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_lowrank(PyObject *self, PyObject *args);
PyObject *py_lowrank_pieces(PyObject *self, PyObject *args);
