// One token's logits -> its statistics, in one pass over memory; lanes are words of the vocabulary here.

#pragma once

#include "linear_nll_isa.h"

namespace fastcompat::ISA_NAMESPACE {

constexpr int kColumns = 2048;  // a stretch of logits that stays in the first-level cache between maximum and sum

template <bool kAll>
static void packed_token_as(const PackedNll& call, int64_t token) {
  const Vec zero = splat(0.0f);
  const int64_t row = token * call.row_stride;
  const float target_logit = element(call.logits, row + call.target[token], call.dtype);
  float m_row = -__builtin_inff();
  double sum = 0.0, first = 0.0, second = 0.0, squares = 0.0, above = 0.0;
  const State state{&m_row, &sum, &first, &second, &squares, &above};
  alignas(64) float z[kColumns];
  for (int64_t begin = 0; begin < call.vocabulary; begin += kColumns) {
    const int count = int(call.vocabulary - begin < kColumns ? call.vocabulary - begin : kColumns);
    const int whole = count / kLanes * kLanes, filled = (count + kLanes - 1) / kLanes * kLanes;
    Vec m = splat(-3.4028235e38f);
    for (int i = 0; i < whole; i += kLanes) {
      const char* p = (const char*)call.logits + (row + begin + i) * (call.dtype == Dtype::kFloat32 ? 4 : 2);
      const Vec v = call.dtype == Dtype::kFloat32    ? load((const float*)p)
                    : call.dtype == Dtype::kBfloat16 ? load_bf16((const uint16_t*)p)
                                                     : load_f16((const uint16_t*)p);
      store(z + i, v);
      m = max(m, v);
    }
    // The tail is filled up with words of no probability.
    for (int i = whole; i < filled; ++i) {
      z[i] = i < count ? element(call.logits, row + begin + i, call.dtype) : -__builtin_inff();
    }
    if (filled > whole) m = max(m, load(z + whole));

    float lanes[kLanes];
    store(lanes, m);
    float m_own = lanes[0];
    for (int i = 1; i < kLanes; ++i) m_own = lanes[i] > m_own ? lanes[i] : m_own;
    Sums sums{splat(m_own), zero, zero, zero, zero, zero};
    for (int i = 0; i < filled; i += kLanes) add_logit<kAll>(sums, load(z + i), splat(target_logit));

    double totals[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
    const Vec parts[5] = {sums.sum, sums.first, sums.second, sums.squares, sums.above};
    for (int j = 0; j < (kAll ? 5 : 1); ++j) {
      store(lanes, parts[j]);
      for (int i = 0; i < kLanes; ++i) totals[j] += lanes[i];
    }
    const float m_now = m_own > m_row ? m_own : m_row;
    float shifts[kLanes];
    store(shifts, clamp_exponent(splat(m_row - m_now)));
    const float shift = shifts[0];
    store(shifts, clamp_exponent(splat(m_own - m_now)));
    const float own_shift = shifts[0];
    store(lanes, exp_clamped(splat(shift)));
    const float scale = lanes[0];
    store(lanes, exp_clamped(splat(own_shift)));
    merge(state, 0, m_now, scale, lanes[0], shift, own_shift, totals, kAll);
  }
  const double log_sum = __builtin_log(sum);
  float* out = call.out + token;
  out[0] = float(log_sum + double(m_row) - double(target_logit));
  if (!kAll) return;
  // Where every word is barred there is no distribution.
  if (m_row <= -3.4028235e38f) sum = __builtin_nan("");
  const double mean = first / sum, variance = second / sum - mean * mean;
  out[call.tokens] = float(log_sum - mean);
  out[2 * call.tokens] = float(variance < 0.0 ? 0.0 : variance);
  out[3 * call.tokens] = float(above);
  out[4 * call.tokens] = float(squares / (sum * sum));
}

static void packed_token(const PackedNll& call, int64_t token) {
  if (call.all_statistics) {
    packed_token_as<true>(call, token);
  } else {
    packed_token_as<false>(call, token);
  }
}

}  // namespace fastcompat::ISA_NAMESPACE
