// ppnet._C as a Python module: importing it registers the operators (static initialisers of csrc/bind/*.cpp); the
// module itself only holds the choice of the CPU instruction set.
#include <Python.h>

#include "isa.h"
#ifdef PPNET_WITH_CUDA
#include "cuda/rows.h"
#endif

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(ppnet::isa_name(ppnet::current_isa())); }

PyObject* set_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const std::string why = ppnet::set_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!why.empty()) {
    PyErr_SetString(PyExc_ValueError, ("set_isa: " + why).c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* supported_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (ppnet::Isa candidate :
       {ppnet::Isa::base, ppnet::Isa::avx2, ppnet::Isa::avx512, ppnet::Isa::avx512_bf16}) {
    if (!ppnet::isa_supported(candidate)) continue;
    PyObject* text = PyUnicode_FromString(ppnet::isa_name(candidate));
    if (text == nullptr || PyList_Append(names, text) != 0) {
      Py_XDECREF(text);
      Py_DECREF(names);
      return nullptr;
    }
    Py_DECREF(text);
  }
  return names;
}

PyObject* cuda_status(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred() != nullptr) return nullptr;
#ifdef PPNET_WITH_CUDA
  const int error = ppnet::cuda::kernels_run(static_cast<int>(index));
  return PyUnicode_FromString(error == 0 ? "ok" : ppnet::cuda::error_string(error));
#else
  return PyUnicode_FromString("not built");
#endif
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Instruction set of the CPU kernels in use, as supported_isas names them."},
    {"set_isa", set_isa, METH_O, "Use the kernels of one of supported_isas; auto is the best."},
    {"supported_isas", supported_isas, METH_NOARGS, "Instruction sets that were compiled and that this processor has."},
    {"cuda_status", cuda_status, METH_O,
     "\"ok\", \"not built\", or why the CUDA kernels cannot run on the GPU of this index, whose context it makes."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Tensor operators of ppnet.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
