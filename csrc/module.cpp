// The Python module object behind `import rvlm._C` / `rvlm._C_cuda`. Importing it runs the static registrations.
#include <Python.h>

#define RVLM_CAT_(a, b) a##b
#define RVLM_CAT(a, b) RVLM_CAT_(a, b)
#define RVLM_STR_(a) #a
#define RVLM_STR(a) RVLM_STR_(a)

extern "C" __attribute__((visibility("default"))) PyObject* RVLM_CAT(PyInit_, RVLM_MODULE)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, RVLM_STR(RVLM_MODULE), nullptr, -1, nullptr,
                               nullptr,               nullptr,               nullptr, nullptr};
  return PyModule_Create(&module);
}
