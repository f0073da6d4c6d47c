// fastcompat._native: pointers in, the GIL released. Arguments are checked by the Python functions that call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "forest_attention.h"
#include "isa.h"
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
  const LinearNll call{pointer<const void>(hidden),
                       pointer<const void>(weight),
                       pointer<const int64_t>(target),
                       pointer<const float>(bias),
                       pointer<float>(out),
                       tokens,
                       width,
                       vocabulary,
                       dtype_of(dtype),
                       softcap,
                       logit_scale,
                       all_statistics};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  linear_nll(isa, call, threads);
}

void call_packed_nll(uintptr_t logits, uintptr_t target, uintptr_t out, int64_t tokens, int64_t vocabulary,
                     int64_t row_stride, const std::string& dtype, bool all_statistics, const std::string& level,
                     int threads) {
  const PackedNll call{pointer<const void>(logits),
                       pointer<const int64_t>(target),
                       pointer<float>(out),
                       tokens,
                       vocabulary,
                       row_stride,
                       dtype_of(dtype),
                       all_statistics};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  packed_nll(isa, call, threads);
}

// strides: of heads and tokens, in elements, for query, key and value.
void call_forest_attention(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out,
                           const std::array<int64_t, 6>& strides, int64_t tokens, int heads, int key_heads, int width,
                           int value_width, uintptr_t position, uintptr_t subtree_end, uintptr_t sinks,
                           const std::string& dtype, float scaling, float softcap, int window, const std::string& level,
                           int threads) {
  ForestAttention call{};
  call.query = pointer<const void>(query);
  call.key = pointer<const void>(key);
  call.value = pointer<const void>(value);
  call.out = pointer<void>(out);
  call.query_head = strides[0], call.query_token = strides[1];
  call.key_head = strides[2], call.key_token = strides[3];
  call.value_head = strides[4], call.value_token = strides[5];
  call.tokens = tokens, call.heads = heads, call.key_heads = key_heads;
  call.width = width, call.value_width = value_width;
  call.position = pointer<const int32_t>(position);
  call.subtree_end = pointer<const int32_t>(subtree_end);
  call.sinks = pointer<const float>(sinks);
  call.dtype = dtype_of(dtype);
  call.scaling = scaling, call.softcap = softcap, call.window = window;
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  forest_attention(isa, call, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "CPU kernels of fastcompat; see csrc/linear_nll.h and csrc/forest_attention.h. Called through fastcompat.";
  module.def("levels", &levels, "Instruction-set levels that this processor offers, fastest first.");
  module.def("linear_nll", &call_linear_nll);
  module.def("packed_nll", &call_packed_nll);
  module.def("forest_attention", &call_forest_attention);
}
