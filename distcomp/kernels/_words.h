/* Words of a model, whatever they mean, for _cpu.c: Python's side of _words.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *py_changed_words(PyObject *self, PyObject *args);
PyObject *py_fingerprint(PyObject *self, PyObject *args);
