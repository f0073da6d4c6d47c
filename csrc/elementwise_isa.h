// The kernels of elementwise.h in terms of simd.h. Included once by each isa_*.cpp.

#pragma once

#include "elementwise.h"
#include "product.h"

namespace fastcompat::ISA_NAMESPACE {

template <Dtype kDtype>
struct Elements {
  static constexpr int64_t kBytes = kDtype == Dtype::kFloat32 ? 4 : 2;

  static inline Vec load(const void* data, int64_t i) {
    const char* p = (const char*)data + kBytes * i;
    if (kDtype == Dtype::kFloat32) return ISA_NAMESPACE::load((const float*)p);
    return kDtype == Dtype::kBfloat16 ? load_bf16((const uint16_t*)p) : load_f16((const uint16_t*)p);
  }
  static inline void store(void* data, int64_t i, Vec v) { store_as(data, i, v, kDtype); }

  // The last elements of a row, which fill no vector; the other lanes are zero, and not written.
  static inline Vec load_some(const void* data, int64_t i, int count) {
    unsigned char buffer[kLanes * kBytes] = {};
    std::memcpy(buffer, (const char*)data + kBytes * i, size_t(count * kBytes));
    return load(buffer, 0);
  }
  static inline void store_some(void* data, int64_t i, Vec v, int count) {
    unsigned char buffer[kLanes * kBytes];
    store(buffer, 0, v);
    std::memcpy((char*)data + kBytes * i, buffer, size_t(count * kBytes));
  }
  // What is left of a value when it is stored.
  static inline Vec rounded(Vec v) {
    unsigned char buffer[kLanes * kBytes];
    store(buffer, 0, v);
    return load(buffer, 0);
  }
};

static inline float sum_of_lanes(Vec v) {
  float lanes[kLanes], sum = 0.0f;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// ---- RMSNorm --------------------------------------------------------------------------------------------------------

template <Dtype kDtype>
static void rms_norm_row(const RmsNorm& call, int64_t x, int64_t out, int64_t sum_at) {
  using E = Elements<kDtype>;
  constexpr int kSums = 4;  // additions in flight
  const int whole = call.width / kLanes * kLanes, left = call.width - whole;
  const void* source = call.residual != nullptr ? call.sum : call.x.data;
  const int64_t from = call.residual != nullptr ? sum_at : x;
  Vec squares[kSums];
  for (Vec& s : squares) s = splat(0.0f);
  if (call.residual != nullptr) {
    for (int c = 0; c < whole; c += kLanes) {
      const Vec s = E::rounded(E::load(call.x.data, x + c) + E::load(call.residual, x + c));
      E::store(call.sum, sum_at + c, s);
      Vec& part = squares[c / kLanes % kSums];
      part = fma(s, s, part);
    }
    if (left > 0) {
      const Vec s = E::load_some(call.x.data, x + whole, left) + E::load_some(call.residual, x + whole, left);
      E::store_some(call.sum, sum_at + whole, s, left);
    }
  } else {
    for (int c = 0; c < whole; c += kLanes) {
      const Vec s = E::load(source, from + c);
      Vec& part = squares[c / kLanes % kSums];
      part = fma(s, s, part);
    }
  }
  if (left > 0) {
    const Vec s = E::load_some(source, from + whole, left);
    squares[0] = fma(s, s, squares[0]);
  }
  const float mean = sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(call.width);
  const Vec scale = splat(1.0f / __builtin_sqrtf(mean + call.eps)), offset = splat(call.offset);
  for (int c = 0; c < whole; c += kLanes) {
    E::store(call.out.data, out + c, E::load(source, from + c) * scale * (offset + E::load(call.weight, c)));
  }
  if (left > 0) {
    const Vec weight = offset + E::load_some(call.weight, whole, left);
    E::store_some(call.out.data, out + whole, E::load_some(source, from + whole, left) * scale * weight, left);
  }
}

template <Dtype kDtype>
static void rms_norm_as(const RmsNorm& call, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int h = 0; h < call.heads; ++h) {
      rms_norm_row<kDtype>(call, t * call.x.token_stride + h * call.x.head_stride,
                           t * call.out.token_stride + h * call.out.head_stride, t * call.width);
    }
  }
}

// ---- rotary embedding -----------------------------------------------------------------------------------------------

template <Dtype kDtype>
static void rotate_as(const Rotate& call, int64_t begin, int64_t end) {
  using E = Elements<kDtype>;
  const int half = call.rotated / 2, whole = half / kLanes * kLanes, left = half - whole;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t angle = t * call.rotated;
    float cosine[kMaxRotated], sine[kMaxRotated];
    for (int c = 0; c < call.rotated; ++c) {
      cosine[c] = element(call.cos, angle + c, call.angle_dtype);
      sine[c] = element(call.sin, angle + c, call.angle_dtype);
    }
    for (int h = 0; h < call.heads; ++h) {
      const int64_t a_at = t * call.x.token_stride + h * call.x.head_stride, b_at = a_at + half;
      for (int c = 0; c < whole; c += kLanes) {
        const Vec a = E::load(call.x.data, a_at + c), b = E::load(call.x.data, b_at + c);
        E::store(call.x.data, a_at + c, a * load(cosine + c) - b * load(sine + c));
        E::store(call.x.data, b_at + c, b * load(cosine + half + c) + a * load(sine + half + c));
      }
      for (int c = whole; left > 0 && c < half; ++c) {
        const float a = element(call.x.data, a_at + c, kDtype), b = element(call.x.data, b_at + c, kDtype);
        E::store_some(call.x.data, a_at + c, splat(a * cosine[c] - b * sine[c]), 1);
        E::store_some(call.x.data, b_at + c, splat(b * cosine[half + c] + a * sine[half + c]), 1);
      }
    }
  }
}

// ---- gated activation -----------------------------------------------------------------------------------------------

// x * sigmoid(s), without cancellation on either side of zero; below s = -87 the sigmoid stays at 1.6e-38.
static inline Vec times_sigmoid(Vec x, Vec s) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  const Vec negative = where_less(s, zero, s, zero - s);
  const Vec e = exp_clamped(clamp_exponent(negative));
  return x * where_less(s, zero, e, one) / (one + e);
}

template <Activation kActivation>
static inline Vec activated(Vec x) {
  if (kActivation == Activation::kSilu) return times_sigmoid(x, x);
  // 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
  return times_sigmoid(x, splat(1.59576912f) * (x + splat(0.044715f) * x * x * x));
}

template <Dtype kDtype, Activation kActivation>
static void gated_as(const Gated& call, int64_t begin, int64_t end) {
  using E = Elements<kDtype>;
  const int whole = call.width / kLanes * kLanes, left = call.width - whole;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t from = t * call.stride, out = t * call.width;
    for (int c = 0; c < whole; c += kLanes) {
      E::store(call.out, out + c, activated<kActivation>(E::load(call.gate, from + c)) * E::load(call.up, from + c));
    }
    if (left > 0) {
      const Vec gate = E::load_some(call.gate, from + whole, left), up = E::load_some(call.up, from + whole, left);
      E::store_some(call.out, out + whole, activated<kActivation>(gate) * up, left);
    }
  }
}

// ---- by dtype -------------------------------------------------------------------------------------------------------

static void rms_norm_tokens(const RmsNorm& call, int64_t begin, int64_t end) {
  if (call.dtype == Dtype::kFloat32) return rms_norm_as<Dtype::kFloat32>(call, begin, end);
  if (call.dtype == Dtype::kBfloat16) return rms_norm_as<Dtype::kBfloat16>(call, begin, end);
  rms_norm_as<Dtype::kFloat16>(call, begin, end);
}

static void rotate_tokens(const Rotate& call, int64_t begin, int64_t end) {
  if (call.dtype == Dtype::kFloat32) return rotate_as<Dtype::kFloat32>(call, begin, end);
  if (call.dtype == Dtype::kBfloat16) return rotate_as<Dtype::kBfloat16>(call, begin, end);
  rotate_as<Dtype::kFloat16>(call, begin, end);
}

template <Activation kActivation>
static void gated_tokens_by(const Gated& call, int64_t begin, int64_t end) {
  if (call.dtype == Dtype::kFloat32) return gated_as<Dtype::kFloat32, kActivation>(call, begin, end);
  if (call.dtype == Dtype::kBfloat16) return gated_as<Dtype::kBfloat16, kActivation>(call, begin, end);
  gated_as<Dtype::kFloat16, kActivation>(call, begin, end);
}

static void gated_tokens(const Gated& call, int64_t begin, int64_t end) {
  if (call.activation == Activation::kSilu) return gated_tokens_by<Activation::kSilu>(call, begin, end);
  gated_tokens_by<Activation::kGeluTanh>(call, begin, end);
}

}  // namespace fastcompat::ISA_NAMESPACE
