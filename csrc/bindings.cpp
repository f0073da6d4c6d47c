// fastcompat._native: pointers in, the GIL released. Arguments are checked in fastcompat/nll.py, once.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "linear_nll.h"

namespace py = pybind11;
using namespace fastcompat;

namespace {

const Isa* const kLevels[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kPortable};

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Isa* isa : kLevels) {
    if (isa->offered()) names.push_back(isa->name);
  }
  return names;
}

const Isa& level_of(const std::string& name) {
  for (const Isa* isa : kLevels) {
    if (name == isa->name && isa->offered()) return *isa;
  }
  throw std::invalid_argument("this processor does not offer the level '" + name + "'");
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("no kernel for " + name);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void call_linear_nll(uintptr_t hidden, uintptr_t weight, uintptr_t target, uintptr_t bias, uintptr_t out,
                     int64_t tokens, int64_t width, int64_t vocabulary, const std::string& dtype, float softcap,
                     float logit_scale, bool all_statistics, const std::string& level, int threads) {
  const LinearNll call{pointer<const void>(hidden), pointer<const void>(weight), pointer<const int64_t>(target),
                       pointer<const float>(bias),  pointer<float>(out),         tokens,
                       width,                       vocabulary,                  dtype_of(dtype),
                       softcap,                     logit_scale,                 all_statistics};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  linear_nll(isa, call, threads);
}

void call_packed_nll(uintptr_t logits, uintptr_t target, uintptr_t out, int64_t tokens, int64_t vocabulary,
                     int64_t row_stride, const std::string& dtype, bool all_statistics, const std::string& level,
                     int threads) {
  const PackedNll call{pointer<const void>(logits), pointer<const int64_t>(target), pointer<float>(out), tokens,
                       vocabulary,                  row_stride,                     dtype_of(dtype),     all_statistics};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  packed_nll(isa, call, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of fastcompat; see csrc/linear_nll.h. Called through fastcompat.nll.";
  module.def("levels", &levels, "Instruction-set levels that this processor offers, fastest first.");
  module.def("linear_nll", &call_linear_nll);
  module.def("packed_nll", &call_packed_nll);
}
