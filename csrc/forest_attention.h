// Attention over a prefix forest on a CPU: query i sees key j exactly when j <= i < subtree_end[j].
//
// Dimension key: T packed tokens, Q queries, H query heads, K key heads, C head width.
//
// As in linear_nll.h, queries lie in the vector lanes: a block of queries, adjacent tokens as a rule, is packed once,
// products broadcast one element of a key (or of a value) from where it lies, and the softmax goes down the lanes. The
// keys that a block sees are a few runs of packed tokens: its first query's ancestors, and all from its first query to
// its last. All other keys are skipped.
//
// Each query's maximum is found before anything is summed, and sums run in key order without a break, where a key that
// the query does not see adds an exact zero: so a query's bits do not depend on what else is in the pack.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastcompat {

struct ForestAttention {
  const void* query;  // [H, Q, C] by the strides below, elements of a head next to each other
  const void* key;    // [K, T, C]
  const void* value;  // [K, T, value_width]
  void* out;          // [Q, H, value_width]
  int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides in elements
  int64_t tokens, queries;
  const int32_t* query_index;  // [Q], the packed token of each query, ascending; null: all of them
  int heads, key_heads, width, value_width;
  const int32_t* position;     // [T], depth on the path
  const int32_t* subtree_end;  // [T], one past the last token below
  const float* sinks;          // [H] or null
  Dtype dtype;
  float scaling, softcap;  // softcap 0: none
  int window;              // tokens, the query's own included; 0: none

  int64_t token_of(int64_t query) const { return query_index != nullptr ? query_index[query] : query; }
};

// Keys and values as the products read them: 32-bit elements (bfloat16 pairs or float32).
struct Operands {
  const uint32_t* key;
  int64_t key_stride;  // elements between keys
  const uint32_t* value;
  int64_t value_stride;  // elements between steps: pairs of keys, or keys
};

// Keys [begin, end) in the pack.
struct Run {
  int32_t begin, end;
};

struct Scratch {
  uint32_t* query;  // [steps of C][block]
  float* scores;    // [keys seen, each run rounded out to pairs][block]
  float* out;       // [value_width][block]
};

struct Isa;  // isa.h

void forest_attention(const Isa&, const ForestAttention&, int threads);

}  // namespace fastcompat
