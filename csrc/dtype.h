// What tensors are made of.

#pragma once

namespace fastcompat {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

}  // namespace fastcompat
