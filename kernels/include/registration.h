// How a binding makes its ops and its Python module known, against libtorch's stable ABI. kernel-builder supplies a
// header of this name; this one serves local builds. TORCH_EXTENSION_NAME is a macro, so every name is expanded first.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/library.h>

#define STABLE_TORCH_LIBRARY_EXPAND(NAME, LIBRARY) STABLE_TORCH_LIBRARY(NAME, LIBRARY)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, KEY, LIBRARY) STABLE_TORCH_LIBRARY_IMPL(NAME, KEY, LIBRARY)

// The module is empty: importing it loads the library, and loading registers the ops.
#define HFE_DEFINE_MODULE(NAME)                                                              \
  PyMODINIT_FUNC PyInit_##NAME(void) {                                                       \
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, #NAME, nullptr, 0, nullptr};     \
    return PyModule_Create(&definition);                                                     \
  }
#define REGISTER_EXTENSION(NAME) HFE_DEFINE_MODULE(NAME)
