// The element-wise work of a decoder layer on a CPU, each in one pass over memory: RMSNorm (with the residual addition
// before it), rotary embedding, gated activation. Arithmetic is float32, results are rounded once.
//
// Dimension key: T packed tokens, D hidden size, H heads, C head width, R rotated channels, I intermediate size.
//
// A row is computed by itself, in an order that its width alone decides: a token's bits do not depend on its pack.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastcompat {

struct Isa;  // isa.h

// A [T, H, C] tensor: elements of a row next to each other, strides in elements. [T, D] is H = 1.
struct HeadRows {
  void* data;
  int64_t token_stride, head_stride;
};

// out = s * rsqrt(mean(s^2) + eps) * (offset + weight), s = x (+ residual, rounded to the dtype and written to sum).
struct RmsNorm {
  HeadRows x, out;       // out may be x
  const void* residual;  // [T, C] with rows as far apart as x's, or null
  void* sum;             // [T, C], contiguous, or null with residual; may be residual
  const void* weight;    // [C]
  int64_t tokens;
  int heads, width;
  Dtype dtype;
  float eps, offset;
};

// Rotates the first R channels of every row in place: halves (a, b) -> (a cos - b sin, b cos + a sin).
struct Rotate {
  HeadRows x;
  const void* cos;  // [T, R], contiguous
  const void* sin;
  int64_t tokens;
  int heads, rotated;
  Dtype dtype, angle_dtype;  // of x; of cos and sin
};

enum class Activation { kSilu, kGeluTanh };

// out = activation(gate) * up.
struct Gated {
  const void* gate;  // [T, I], rows `stride` elements apart
  const void* up;
  void* out;  // [T, I], contiguous
  int64_t tokens, stride;
  int width;
  Dtype dtype;
  Activation activation;
};

constexpr int kMaxRotated = 512;

void rms_norm(const Isa&, const RmsNorm&, int threads);
void rotate(const Isa&, const Rotate&, int threads);
void gated(const Isa&, const Gated&, int threads);

}  // namespace fastcompat
