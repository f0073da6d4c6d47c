// The products that both kernels are made of: tokens in the lanes, rows of the other operand broadcast element by
// element. Included once by each isa_*.cpp. With ISA_BF16 defined, pairs of bfloat16 are multiplied as they are.

#pragma once

#include "dtype.h"
#include "isa.h"
#include "simd.h"

namespace fastcompat::ISA_NAMESPACE {

constexpr int kGroup = 6;    // vocabulary rows multiplied together
constexpr int kSteps = 128;  // steps of the inner product between two additions to the tile

#if defined(ISA_BF16)
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif

static inline int least(int a, int b) { return a < b ? a : b; }
// Whether elements are multiplied as pairs of bfloat16.
static inline bool in_pairs(Dtype dtype) { return kMultipliesBf16 && dtype == Dtype::kBfloat16; }

static inline float element(const void* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return as_float(load_u32((const char*)data + 4 * i));
  const uint16_t bits = load_u16((const char*)data + 2 * i);
  return dtype == Dtype::kBfloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// Element k of a row that begins at `at`, as the products read it: 32 bits, a pair of bfloat16 or a float32. Where the
// width is odd, the last pair's second half is zero.
static inline uint32_t operand(const void* data, int64_t at, int64_t k, int64_t width, Dtype dtype) {
  if (in_pairs(dtype)) {
    const char* p = (const char*)data + 2 * (at + 2 * k);
    return 2 * k + 1 < width ? load_u32(p) : load_u16(p);
  }
  const float x = element(data, at + k, dtype);
  return load_u32(&x);
}
static inline int64_t operand_steps(int64_t width, Dtype dtype) { return in_pairs(dtype) ? (width + 1) / 2 : width; }

// Rows [count, width], `stride` elements apart, -> packed [steps][block]. Lanes past count repeat the last row.
static void pack_rows(const void* data, int64_t at, int64_t stride, int count, int64_t width, Dtype dtype,
                      uint32_t* packed) {
  const int64_t n_steps = operand_steps(width, dtype), per_step = in_pairs(dtype) ? 2 : 1;
  const auto row_of = [&](int i) { return at + (i < count ? i : count - 1) * stride; };
  for (int i = 0; i < kBlock; i += kLanes) {
    int64_t k = 0;
    if (in_pairs(dtype) || dtype == Dtype::kFloat32) {
      for (; (k + kLanes) * per_step <= width; k += kLanes) {
        Vec rows[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          rows[r] = load((const float*)((const char*)data + 4 / per_step * row_of(i + r) + 4 * k));
        }
        transpose(rows);
        for (int r = 0; r < kLanes; ++r) store((float*)(packed + (k + r) * kBlock + i), rows[r]);
      }
    }
    for (; k < n_steps; ++k) {
      for (int r = 0; r < kLanes; ++r) packed[k * kBlock + i + r] = operand(data, row_of(i + r), k, width, dtype);
    }
  }
}

// Writes a vector at element i of a tensor.
static inline void store_as(void* data, int64_t i, Vec v, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    store((float*)data + i, v);
  } else if (dtype == Dtype::kBfloat16) {
    store_bf16((uint16_t*)data + i, v);
  } else {
    store_f16((uint16_t*)data + i, v);
  }
}

struct Float32 {
  static constexpr bool kPairs = false;
  static inline Vec multiply_add(Vec sum, Vec tokens, const uint32_t* weight) {
    return fma(tokens, splat(as_float(load_u32(weight))), sum);
  }
};
#if defined(ISA_BF16)
struct Bfloat16Pairs {
  static constexpr bool kPairs = true;
  static inline Vec multiply_add(Vec sum, Vec tokens, const uint32_t* weight) {
    return _mm512_dpbf16_ps(sum, (__m512bh)tokens, (__m512bh)_mm512_set1_epi32(int(load_u32(weight))));
  }
};
#endif

// sums[r][t] += sum over steps k of packed[k, t] * rows[r * row_stride + k * step_stride], in the order of steps.
template <class Product, int R, int N>
static inline __attribute__((always_inline)) void add_products(const uint32_t* packed, const uint32_t* rows,
                                                               int64_t row_stride, int64_t step_stride, int64_t n_steps,
                                                               Vec (&sums)[R][N]) {
  for (int64_t k = 0; k < n_steps; ++k) {
    Vec tokens[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) tokens[n] = load((const float*)(packed + k * kBlock) + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        sums[r][n] = Product::multiply_add(sums[r][n], tokens[n], rows + r * row_stride + k * step_stride);
      }
    }
  }
}

// tile[r][t] = packed[:, t] . rows[r] for R rows and N vectors of tokens; with kMax also m[t] = max(m[t], tile[r][t]).
template <class Product, int R, int N, bool kMax>
static inline void multiply(const uint32_t* packed, const uint32_t* rows, int64_t stride, int64_t n_steps, float* tile,
                            Vec* m) {
  for (int64_t begin = 0; begin < n_steps; begin += kSteps) {
    const int64_t end = begin + kSteps < n_steps ? begin + kSteps : n_steps;
    Vec sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = splat(0.0f);
    }
    add_products<Product>(packed + begin * kBlock, rows + begin, stride, 1, end - begin, sums);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = tile + r * kBlock + n * kLanes;
        const Vec sum = begin == 0 ? sums[r][n] : load(at) + sums[r][n];
        store(at, sum);
        if (kMax && end == n_steps) m[n] = max(m[n], sum);
      }
    }
  }
}

template <class Product, int N, bool kMax = false>
static void multiply_rows(const uint32_t* packed, Rows rows, int count, int64_t n_steps, float* tile,
                          Vec* m = nullptr) {
  int r = 0;
  for (; r + kGroup <= count; r += kGroup) {
    multiply<Product, kGroup, N, kMax>(packed, rows.data + r * rows.stride, rows.stride, n_steps, tile + r * kBlock, m);
  }
  for (; r < count; ++r) {
    multiply<Product, 1, N, kMax>(packed, rows.data + r * rows.stride, rows.stride, n_steps, tile + r * kBlock, m);
  }
}

// out[r][t] += sum over steps of packed[step, t] * rows[step * stride + r], without a break in the order of additions.
template <class Product, int R, int N>
static inline void accumulate(const uint32_t* packed, const uint32_t* rows, int64_t stride, int64_t n_steps,
                              float* out) {
  Vec sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = load(out + r * kBlock + n * kLanes);
  }
  add_products<Product>(packed, rows, 1, stride, n_steps, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + r * kBlock + n * kLanes, sums[r][n]);
  }
}

template <class Product, int N>
static void accumulate_rows(const uint32_t* packed, const uint32_t* rows, int64_t stride, int count, int64_t n_steps,
                            float* out) {
  int r = 0;
  for (; r + kGroup <= count; r += kGroup) {
    accumulate<Product, kGroup, N>(packed, rows + r, stride, n_steps, out + r * kBlock);
  }
  for (; r + 4 <= count; r += 4) accumulate<Product, 4, N>(packed, rows + r, stride, n_steps, out + r * kBlock);
  for (; r < count; ++r) accumulate<Product, 1, N>(packed, rows + r, stride, n_steps, out + r * kBlock);
}

}  // namespace fastcompat::ISA_NAMESPACE
