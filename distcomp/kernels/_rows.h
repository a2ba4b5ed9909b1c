/* Many pieces in one call, for _cpu.c: Python's side of _rows.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

const char *instruction_set(void); /* of _cpu.c: the one in use */
PyObject *py_top_rows(PyObject *self, PyObject *args);
PyObject *py_write_rows(PyObject *self, PyObject *args);
PyObject *py_read_rows(PyObject *self, PyObject *args);
PyObject *py_move(PyObject *self, PyObject *args);
