// fastcompat._native: pointers in, the GIL released. Arguments are checked by the Python functions that call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.h"
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
                           const std::array<int64_t, 6>& strides, int64_t tokens, int64_t queries,
                           uintptr_t query_index, int heads, int key_heads, int width, int value_width,
                           uintptr_t position, uintptr_t subtree_end, uintptr_t sinks, const std::string& dtype,
                           float scaling, float softcap, int window, const std::string& level, int threads) {
  ForestAttention call{};
  call.query = pointer<const void>(query);
  call.key = pointer<const void>(key);
  call.value = pointer<const void>(value);
  call.out = pointer<void>(out);
  call.query_head = strides[0], call.query_token = strides[1];
  call.key_head = strides[2], call.key_token = strides[3];
  call.value_head = strides[4], call.value_token = strides[5];
  call.tokens = tokens, call.queries = queries;
  call.query_index = pointer<const int32_t>(query_index);
  call.heads = heads, call.key_heads = key_heads;
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

// strides: of tokens and heads, in elements, for x and out.
void call_rms_norm(uintptr_t x, uintptr_t out, uintptr_t residual, uintptr_t sum, uintptr_t weight,
                   const std::array<int64_t, 4>& strides, int64_t tokens, int heads, int width,
                   const std::string& dtype, float eps, float offset, const std::string& level, int threads) {
  const RmsNorm call{{pointer<void>(x), strides[0], strides[1]},
                     {pointer<void>(out), strides[2], strides[3]},
                     pointer<const void>(residual),
                     pointer<void>(sum),
                     pointer<const void>(weight),
                     tokens,
                     heads,
                     width,
                     dtype_of(dtype),
                     eps,
                     offset};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  rms_norm(isa, call, threads);
}

void call_rotate(uintptr_t x, uintptr_t cos, uintptr_t sin, const std::array<int64_t, 2>& strides, int64_t tokens,
                 int heads, int rotated, const std::string& dtype, const std::string& angle_dtype,
                 const std::string& level, int threads) {
  const Rotate call{{pointer<void>(x), strides[0], strides[1]},
                    pointer<const void>(cos),
                    pointer<const void>(sin),
                    tokens,
                    heads,
                    rotated,
                    dtype_of(dtype),
                    dtype_of(angle_dtype)};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  rotate(isa, call, threads);
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw std::invalid_argument("no kernel for " + name);
}

void call_gated(uintptr_t gate, uintptr_t up, uintptr_t out, int64_t tokens, int64_t stride, int width,
                const std::string& dtype, const std::string& activation, const std::string& level, int threads) {
  const Gated call{pointer<const void>(gate), pointer<const void>(up),  pointer<void>(out), tokens, stride, width,
                   dtype_of(dtype),           activation_of(activation)};
  const Isa& isa = level_of(level);
  const py::gil_scoped_release released;
  gated(isa, call, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "CPU kernels of fastcompat; see linear_nll.h, forest_attention.h and elementwise.h in csrc. Called through "
      "fastcompat.";
  module.attr("max_rotated") = kMaxRotated;
  module.def("levels", &levels, "Instruction-set levels that this processor offers, fastest first.");
  module.def("linear_nll", &call_linear_nll);
  module.def("packed_nll", &call_packed_nll);
  module.def("forest_attention", &call_forest_attention);
  module.def("rms_norm", &call_rms_norm);
  module.def("rotate", &call_rotate);
  module.def("gated", &call_gated);
}
