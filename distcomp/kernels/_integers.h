/* Packed integers and absolute grids, for _cpu.c: Python's side of _integers.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_grid_encode(PyObject *self, PyObject *args);
PyObject *py_grid_decode(PyObject *self, PyObject *args);
PyObject *py_pack_integers(PyObject *self, PyObject *args);
