// The fused LM head on a CPU: per-token statistics of softmax(hidden @ weight.T) without the logits.
//
// Dimension key: S scored tokens, D hidden size, V vocabulary, K steps of the inner product.
//
// Tokens lie in the vector lanes. A block of tokens is packed once as [K][block] 32-bit elements (a pair of bfloat16,
// or a float32); the kernel broadcasts one element of a weight row from where it lies, so that weights are never
// repacked, and max and sum go down the lanes with no horizontal step. A lane never looks at another: a token's bits do
// not depend on its neighbours.
//
//   vocabulary = segments (fixed by V and D, the work items) = chunks (a tile of logits in the cache each)
//
// Within a chunk everything is float32, accumulated afresh every kSteps steps so that long products do not lose their
// last bits; chunks are folded into a segment's state, and segments into the result, in float64 and in a fixed order.
// So equal bits come back from run to run and for any number of threads.
//
// Memory beside the result: packed rows of at most 2 MiB (of 256 tokens where D is large), states of at most 1.4 MiB,
// and for each thread a tile of 24 KiB and, where weights are widened or of odd width, a chunk of them, 0.4 MiB.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastcompat {

constexpr int kStatistics = 5;  // nll, entropy, varentropy, rank, collision: the rows of `out`
constexpr int kChunkRows = 96;  // vocabulary rows of a chunk at most; whole groups of 6
constexpr int kMaxBlock = 64;   // tokens of a block at most

struct Isa;  // isa.h

struct LinearNll {
  const void* hidden;     // [S, D]
  const void* weight;     // [V, D]
  const int64_t* target;  // [S]
  const float* bias;      // [V] or null
  float* out;             // [1 or 5, S]
  int64_t tokens, width, vocabulary;
  Dtype dtype;
  float softcap;  // 0: none
  float logit_scale;
  bool all_statistics;
};

// Logits already there: one read of [S, V] with rows `row_stride` elements apart.
struct PackedNll {
  const void* logits;
  const int64_t* target;
  float* out;
  int64_t tokens, vocabulary, row_stride;
  Dtype dtype;
  bool all_statistics;
};

// What a run of logits has added up to, one entry a token, relative to its maximum m; d = z - m, e = exp(d).
struct State {
  float* m;
  double* sum;      // of e
  double* first;    // of e d
  double* second;   // of e d^2
  double* squares;  // of e^2
  double* above;    // logits above the target's
};

void linear_nll(const Isa&, const LinearNll&, int threads);
void packed_nll(const Isa&, const PackedNll&, int threads);

}  // namespace fastcompat
