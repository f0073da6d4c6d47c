// The kernel of forest_attention.h in terms of simd.h. Included once by each isa_*.cpp.

#pragma once

#include "product.h"

namespace fastcompat::ISA_NAMESPACE {

// ---- packing --------------------------------------------------------------------------------------------------------

static void pack_operands(const ForestAttention& call, int key_head, int64_t begin, int64_t end, uint32_t* key,
                          uint32_t* value) {
  const int64_t n_steps = operand_steps(call.width, call.dtype);
  if (key != nullptr) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = key_head * call.key_head + t * call.key_token;
      for (int64_t k = 0; k < n_steps; ++k) {
        key[t * n_steps + k] = operand(call.key, at, k, call.width, call.dtype);
      }
    }
  }
  if (value == nullptr) return;
  const int64_t at = key_head * call.value_head;
  if (in_pairs(call.dtype)) {
    // Of a pair of keys the earlier one goes into the upper half, which the product adds first.
    for (int64_t t = begin; t < end; t += 2) {
      const uint16_t* upper = (const uint16_t*)call.value + at + t * call.value_token;
      const uint16_t* lower = t + 1 < call.tokens ? upper + call.value_token : nullptr;
      uint32_t* to = value + t / 2 * call.value_width;
      for (int c = 0; c < call.value_width; ++c) {
        to[c] = uint32_t(load_u16(upper + c)) << 16 | (lower ? load_u16(lower + c) : 0);
      }
    }
  } else {
    for (int64_t t = begin; t < end; ++t) {
      for (int c = 0; c < call.value_width; ++c) {
        value[t * call.value_width + c] =
            operand(call.value, at + t * call.value_token, c, call.value_width, call.dtype);
      }
    }
  }
}

// ---- one head of one block of queries -------------------------------------------------------------------------------

template <class Product, int N>
static void attend_as(const ForestAttention& call, int head, int64_t first, int count, const Operands& operands,
                      const Run* runs, int n_runs, const Scratch& scratch) {
  constexpr bool pairs = Product::kPairs;
  const int64_t n_steps = operand_steps(call.width, call.dtype);
  const int64_t first_token = call.token_of(first), end_token = call.token_of(first + count - 1) + 1;
  const Vec hidden = splat(-__builtin_inff());
  // What is left to multiply scores with when their maximum has been taken away.
  const float scaling = call.softcap != 0.0f ? 1.0f : call.scaling;
  pack_rows(call.query, head * call.query_head + first * call.query_token, call.query_token, count, call.width,
            call.dtype, scratch.query);

  // Lanes past the last query see what the last one sees; nobody reads them.
  float indices[kBlock], positions[kBlock];
  int deepest = 0;
  for (int i = 0; i < kBlock; ++i) {
    const int64_t t = call.token_of(first + (i < count ? i : count - 1));
    indices[i] = float(t);
    positions[i] = float(call.position[t]);
    if (call.position[t] > deepest) deepest = call.position[t];
  }

  Vec m[N];
  for (int n = 0; n < N; ++n) m[n] = splat(call.sinks != nullptr ? call.sinks[head] / scaling : -3.4028235e38f);
  const auto partly_hidden = [&](int64_t j) {
    return j > first_token || call.subtree_end[j] < end_token ||
           (call.window > 0 && deepest - call.position[j] >= call.window);
  };

  // Scores, a few keys at a time while they are in the cache.
  int64_t row = 0;
  for (int u = 0; u < n_runs; ++u) {
    row += runs[u].begin & 1;
    for (int64_t begin = runs[u].begin, end = begin; begin < runs[u].end; begin = end) {
      end = begin + 4 * kGroup < runs[u].end ? begin + 4 * kGroup : runs[u].end;
      float* scores = scratch.scores + row * kBlock;
      row += end - begin;
      const Rows keys{operands.key + begin * operands.key_stride, operands.key_stride};
      bool plain = call.softcap == 0.0f;
      for (int64_t j = begin; j < end; ++j) plain = plain && !partly_hidden(j);
      if (plain) {
        multiply_rows<Product, N, true>(scratch.query, keys, int(end - begin), n_steps, scores, m);
        continue;
      }
      multiply_rows<Product, N>(scratch.query, keys, int(end - begin), n_steps, scores);
      for (int64_t j = begin; j < end; ++j, scores += kBlock) {
        const bool masked = partly_hidden(j);
        const Vec index = splat(float(j)), stop = splat(float(call.subtree_end[j]));
        const Vec reach = splat(float(call.position[j] + call.window));
        for (int n = 0; n < N; ++n) {
          Vec s = load(scores + n * kLanes);
          if (call.softcap != 0.0f) s = splat(call.softcap) * tanh(s * splat(call.scaling / call.softcap));
          if (masked) {
            const Vec query = load(indices + n * kLanes);
            s = where_less(query, index, hidden, s);
            s = where_less(query, stop, s, hidden);
            if (call.window > 0) s = where_less(load(positions + n * kLanes), reach, s, hidden);
          }
          m[n] = max(m[n], s);
          store(scores + n * kLanes, s);
        }
      }
    }
    row += runs[u].end & 1;
  }

  // Probabilities, not yet divided by their sum; the rows of a pair of keys become one row of pairs.
  const float exponent = scaling * 1.44269504f;
  Vec sum[N], most[N];
  for (int n = 0; n < N; ++n) most[n] = splat(0.0f) - m[n] * splat(exponent);
  const auto probability = [&](Vec s, int n) {
    return pairs ? exp2_rough(fma(s, splat(exponent), most[n]))
                 : exp_clamped(clamp_exponent((s - m[n]) * splat(scaling)));
  };
  for (int n = 0; n < N; ++n) {
    sum[n] = call.sinks != nullptr ? exp_clamped(clamp_exponent(splat(call.sinks[head]) - m[n] * splat(scaling)))
                                   : splat(0.0f);
  }
  row = 0;
  uint32_t* probabilities = (uint32_t*)scratch.scores;
  for (int u = 0; u < n_runs; ++u) {
    const int64_t begin = runs[u].begin & ~1, end = (runs[u].end + 1) & ~1;
    for (int64_t pair = begin; pair < end; pair += 2, row += 2) {
      Vec e[2][N];
      for (int which = 0; which < 2; ++which) {
        const int64_t j = pair + which;
        const bool there = j >= runs[u].begin && j < runs[u].end;
        const bool masked = there && partly_hidden(j);
        for (int n = 0; n < N; ++n) {
          if (!there) {
            e[which][n] = splat(0.0f);
            continue;
          }
          const Vec s = load(scratch.scores + (row + which) * kBlock + n * kLanes);
          Vec p = probability(s, n);
          // Hidden is -inf; a NaN that the query sees stays.
          if (masked) p = where_less(hidden, s, p, where_less(s, splat(0.0f), splat(0.0f), p));
          sum[n] = sum[n] + p;
          e[which][n] = p;
        }
      }
      for (int n = 0; n < N; ++n) {
        if (pairs) {
          store((float*)(probabilities + row / 2 * kBlock) + n * kLanes, bf16_pair(e[0][n], e[1][n]));
        } else {
          store(scratch.scores + row * kBlock + n * kLanes, e[0][n]);
          store(scratch.scores + (row + 1) * kBlock + n * kLanes, e[1][n]);
        }
      }
    }
  }

  for (int c = 0; c < call.value_width; ++c) {
    for (int n = 0; n < N; ++n) store(scratch.out + c * kBlock + n * kLanes, splat(0.0f));
  }
  row = 0;
  for (int u = 0; u < n_runs; ++u) {
    const int64_t begin = runs[u].begin & ~1, end = (runs[u].end + 1) & ~1;
    if (pairs) {
      accumulate_rows<Product, N>(probabilities + row / 2 * kBlock, operands.value + begin / 2 * operands.value_stride,
                                  operands.value_stride, call.value_width, (end - begin) / 2, scratch.out);
    } else {
      const int64_t skip = runs[u].begin - begin;
      accumulate_rows<Product, N>(probabilities + (row + skip) * kBlock,
                                  operands.value + runs[u].begin * operands.value_stride, operands.value_stride,
                                  call.value_width, runs[u].end - runs[u].begin, scratch.out);
    }
    row += end - begin;
  }

  float scale[kBlock];
  for (int n = 0; n < N; ++n) store(scale + n * kLanes, splat(1.0f) / sum[n]);
  const int64_t out_token = int64_t(call.heads) * call.value_width, out = first * out_token + head * call.value_width;
  const int whole = call.value_width / kLanes * kLanes;
  for (int n = 0; n < N; ++n) {
    const Vec factor = load(scale + n * kLanes);
    for (int c = 0; c < whole; c += kLanes) {
      Vec rows[kLanes];
      for (int r = 0; r < kLanes; ++r) rows[r] = load(scratch.out + (c + r) * kBlock + n * kLanes) * factor;
      transpose(rows);
      for (int r = 0; r < kLanes && n * kLanes + r < count; ++r) {
        const int64_t at = out + (n * kLanes + r) * out_token + c;
        store_as(call.out, at, rows[r], call.dtype);
      }
    }
  }
  // What is left of a row goes by way of a whole vector.
  const int left = call.value_width - whole;
  const int64_t element_bytes = call.dtype == Dtype::kFloat32 ? 4 : 2;
  for (int i = 0; left > 0 && i < count; ++i) {
    float lanes[kLanes] = {}, stored[kLanes];
    for (int k = 0; k < left; ++k) lanes[k] = scratch.out[(whole + k) * kBlock + i] * scale[i];
    store_as(stored, 0, load(lanes), call.dtype);
    std::memcpy((char*)call.out + element_bytes * (out + i * out_token + whole), stored, element_bytes * left);
  }
}

template <int N>
static void attend_block(const ForestAttention& call, int head, int64_t first, int count, const Operands& operands,
                         const Run* runs, int n_runs, const Scratch& scratch) {
#if defined(ISA_BF16)
  if (in_pairs(call.dtype)) {
    attend_as<Bfloat16Pairs, N>(call, head, first, count, operands, runs, n_runs, scratch);
    return;
  }
#endif
  attend_as<Float32, N>(call, head, first, count, operands, runs, n_runs, scratch);
}

static void attend(const ForestAttention& call, int head, int64_t first, int count, const Operands& operands,
                   const Run* runs, int n_runs, const Scratch& scratch) {
  switch ((count + kLanes - 1) / kLanes) {
    case 1:
      return attend_block<1>(call, head, first, count, operands, runs, n_runs, scratch);
    case 2:
      return attend_block<2>(call, head, first, count, operands, runs, n_runs, scratch);
#if defined(ISA_AVX512) || defined(__ARM_NEON)
    case 3:
      return attend_block<3>(call, head, first, count, operands, runs, n_runs, scratch);
    default:
      return attend_block<4>(call, head, first, count, operands, runs, n_runs, scratch);
#endif
  }
}

}  // namespace fastcompat::ISA_NAMESPACE
