// The kernels of linear_nll.h in terms of simd.h. Included once by each isa_*.cpp, compiled for its instruction set.

#pragma once

#include "product.h"

namespace fastcompat::ISA_NAMESPACE {

// ---- packing --------------------------------------------------------------------------------------------------------

static void pack(const LinearNll& call, int64_t first, int count, uint32_t* packed) {
  pack_rows(call.hidden, first * call.width, call.width, count, call.width, call.dtype, packed);
}

static void widen(const LinearNll& call, int64_t first_row, int count, uint32_t* rows) {
  const int64_t n_steps = operand_steps(call.width, call.dtype);
  for (int i = 0; i < count; ++i) {
    uint32_t* row = rows + i * n_steps;
    int64_t k = 0;
    if (!in_pairs(call.dtype) && call.dtype != Dtype::kFloat32) {
      const uint16_t* from = (const uint16_t*)call.weight + (first_row + i) * call.width;
      for (; k + kLanes <= n_steps; k += kLanes) {
        const Vec v = call.dtype == Dtype::kBfloat16 ? load_bf16(from + k) : load_f16(from + k);
        std::memcpy(row + k, &v, sizeof v);
      }
    }
    const int64_t at = (first_row + i) * call.width;
    for (; k < n_steps; ++k) row[k] = operand(call.weight, at, k, call.width, call.dtype);
  }
}

// ---- the product ----------------------------------------------------------------------------------------------------

template <int N>
static void multiply_block(const LinearNll& call, const uint32_t* packed, Rows rows, int count, float* tile) {
#if defined(ISA_BF16)
  if (in_pairs(call.dtype)) {
    multiply_rows<Bfloat16Pairs, N>(packed, rows, count, (call.width + 1) / 2, tile);
    return;
  }
#endif
  multiply_rows<Float32, N>(packed, rows, count, call.width, tile);
}

// ---- from products to logits ----------------------------------------------------------------------------------------

static inline bool transforms(const LinearNll& call) {
  return call.bias != nullptr || call.logit_scale != 1.0f || call.softcap != 0.0f;
}

static inline Vec transform(const LinearNll& call, Vec z, int64_t row) {
  if (call.bias != nullptr) z = z + splat(call.bias[row]);
  z = z * splat(call.logit_scale);
  if (call.softcap != 0.0f) z = splat(call.softcap) * tanh(z / splat(call.softcap));
  return z;
}

// ---- folding a tile into the state ----------------------------------------------------------------------------------

// Sums over the logits of one vector of tokens.
struct Sums {
  Vec m, sum, first, second, squares, above;
};

template <bool kAll>
static inline void add_logit(Sums& sums, Vec z, Vec target_logit) {
  const Vec d = clamp_exponent(z - sums.m);
  const Vec e = exp_clamped(d);
  sums.sum = sums.sum + e;
  if (kAll) {
    const Vec ed = e * d;
    sums.first = sums.first + ed;
    sums.second = fma(ed, d, sums.second);
    sums.squares = fma(e, e, sums.squares);
    sums.above = count_greater(sums.above, z, target_logit);
  }
}

// Adds sums relative to their own maximum to one token's state, rebased to the larger of the two.
static inline void merge(const State& state, int i, float m, float scale, float own_scale, double shift,
                         double own_shift, const double* sums, bool all) {
  const double s = sums[0];
  if (all) {
    const double a = sums[1], b = sums[2];
    const double S = state.sum[i], A = state.first[i], B = state.second[i];
    state.first[i] = scale * (A + shift * S) + own_scale * (a + own_shift * s);
    state.second[i] = scale * (B + 2.0 * shift * A + shift * shift * S) +
                      own_scale * (b + 2.0 * own_shift * a + own_shift * own_shift * s);
    state.squares[i] = double(scale) * scale * state.squares[i] + double(own_scale) * own_scale * sums[3];
    state.above[i] += sums[4];
  }
  state.sum[i] = scale * state.sum[i] + own_scale * s;
  state.m[i] = m;
}

template <bool kAll>
static void fold_tile(const float* tile, int count, int n_vectors, int tokens, const float* target_logit,
                      const State& state) {
  for (int n = 0; n < n_vectors; ++n) {
    const float* column = tile + n * kLanes;
    const Vec zero = splat(0.0f);
    // A tile of -inf throughout keeps a finite maximum, so that no difference is NaN.
    Vec m = splat(-3.4028235e38f);
    for (int r = 0; r < count; ++r) m = max(m, load(column + r * kBlock));
    Sums sums{m, zero, zero, zero, zero, zero};
    const Vec z_target = kAll ? load(target_logit + n * kLanes) : zero;
    for (int r = 0; r < count; ++r) add_logit<kAll>(sums, load(column + r * kBlock), z_target);

    const Vec before = load(state.m + n * kLanes);
    const Vec now = max(before, m);
    float m_now[kLanes], shift[kLanes], own_shift[kLanes], scale[kLanes], own_scale[kLanes], parts[5][kLanes];
    store(m_now, now);
    store(shift, clamp_exponent(before - now));
    store(own_shift, clamp_exponent(m - now));
    store(scale, exp_clamped(clamp_exponent(before - now)));
    store(own_scale, exp_clamped(clamp_exponent(m - now)));
    store(parts[0], sums.sum);
    store(parts[1], sums.first);
    store(parts[2], sums.second);
    store(parts[3], sums.squares);
    store(parts[4], sums.above);
    const int last = least(kLanes, tokens - n * kLanes);
    for (int i = 0; i < last; ++i) {
      const double own[5] = {parts[0][i], parts[1][i], parts[2][i], parts[3][i], parts[4][i]};
      merge(state, n * kLanes + i, m_now[i], scale[i], own_scale[i], shift[i], own_shift[i], own, kAll);
    }
  }
}

static void fold(const LinearNll& call, const uint32_t* packed, int tokens, Rows rows, int64_t first_row, int count,
                 const float* target_logit, float* tile, const State& state) {
  const int n_vectors = (tokens + kLanes - 1) / kLanes;
  switch (n_vectors) {
    case 1:
      multiply_block<1>(call, packed, rows, count, tile);
      break;
    case 2:
      multiply_block<2>(call, packed, rows, count, tile);
      break;
#if defined(ISA_AVX512) || defined(__ARM_NEON)
    case 3:
      multiply_block<3>(call, packed, rows, count, tile);
      break;
    default:
      multiply_block<4>(call, packed, rows, count, tile);
      break;
#endif
  }
  if (transforms(call)) {
    for (int r = 0; r < count; ++r) {
      for (int n = 0; n < n_vectors; ++n) {
        float* at = tile + r * kBlock + n * kLanes;
        store(at, transform(call, load(at), first_row + r));
      }
    }
  }
  if (call.all_statistics) {
    fold_tile<true>(tile, count, n_vectors, tokens, target_logit, state);
  } else {
    fold_tile<false>(tile, count, n_vectors, tokens, target_logit, state);
  }
}

static void target_logits(const LinearNll& call, const uint32_t* packed, int64_t first, int count, uint32_t* scratch,
                          float* z) {
  const int64_t n_steps = operand_steps(call.width, call.dtype);
  float tile[kBlock];
  for (int i = 0; i < count; ++i) {
    const int64_t row = call.target[first + i];
    widen(call, row, 1, scratch);
    // The vector of tokens that holds token i, against its own target's row.
    multiply_block<1>(call, packed + i / kLanes * kLanes, Rows{scratch, n_steps}, 1, tile);
    store(tile, transforms(call) ? transform(call, load(tile), row) : load(tile));
    z[i] = tile[i % kLanes];
  }
}

}  // namespace fastcompat::ISA_NAMESPACE
