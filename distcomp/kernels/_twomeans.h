/* One bit per value and two means per unit, for _cpu.c: Python's side of _twomeans.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_encode_two_means(PyObject *self, PyObject *args);
PyObject *py_put_two_means(PyObject *self, PyObject *args);
