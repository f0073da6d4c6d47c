// The fused LM head on a CPU: per-token statistics of softmax(hidden @ weight.T) without the logits.
//
// Dimension key: S scored tokens, D hidden size, V vocabulary, K steps of the inner product.
//
// Tokens lie in the vector lanes. A block of tokens is packed once as [K][block] 32-bit elements (a pair of bfloat16, or
// a float32); the kernel broadcasts one element of a weight row from where it lies, so that weights are never repacked,
// and max and sum go down the lanes with no horizontal step. A lane never looks at another: a token's bits do not depend
// on its neighbours.
//
//   vocabulary = segments (fixed by V and D, one work item each) = chunks (a tile of logits in the cache each)
//
// Within a chunk everything is float32, accumulated afresh every kSteps steps so that long products do not lose their
// last bits; chunks are folded into a segment's state, and segments into the result, in float64 and in a fixed order.
// So equal bits come back from run to run and for any number of threads.

#pragma once

#include <cstdint>

namespace fastcompat {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

constexpr int kStatistics = 5;  // nll, entropy, varentropy, rank, collision: the rows of `out`
constexpr int kChunkRows = 96;  // vocabulary rows of a chunk at most; whole groups of 6
constexpr int kMaxBlock = 64;   // tokens of a block at most

struct LinearNll {
  const void* hidden;  // [S, D]
  const void* weight;  // [V, D]
  const int64_t* target;  // [S]
  const float* bias;  // [V] or null
  float* out;  // [1 or 5, S]
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

// Weight rows as the kernel reads them: 32-bit elements, rows `stride` elements apart.
struct Rows {
  const uint32_t* data;
  int64_t stride;
};

// One instruction set's kernels.
struct Isa {
  const char* name;
  bool (*offered)();
  int block = 0;              // tokens of a block
  bool multiplies_bf16 = false;   // pairs of bfloat16 go in as they are; else everything is widened to float32

  // Token rows [count, D] -> packed [K][block]; lanes past count are zero.
  void (*pack)(const LinearNll&, int64_t first, int count, uint32_t* packed) = nullptr;
  // Weight rows -> widened or padded copies [count][K].
  void (*widen)(const LinearNll&, int64_t first_row, int count, uint32_t* rows) = nullptr;
  // The target's logit of each token, by the arithmetic that `fold` uses; scratch holds one row.
  void (*target_logits)(const LinearNll&, const uint32_t* packed, int64_t first, int count, uint32_t* scratch,
                        float* z) = nullptr;
  // Folds `count` vocabulary rows from first_row on into the state of a block of tokens; tile is [kChunkRows][block].
  void (*fold)(const LinearNll&, const uint32_t* packed, int tokens, Rows rows, int64_t first_row, int count,
               const float* target_logit, float* tile, const State&) = nullptr;
  // One token of packed_nll: out[0], and with all statistics out[S], out[2 S] ...
  void (*packed_token)(const PackedNll&, int64_t token) = nullptr;
};

extern const Isa kAvx512Bf16, kAvx512, kAvx2, kPortable;

// Steps of the inner product: pairs of bfloat16, or single float32.
inline int64_t steps(const Isa& isa, const LinearNll& call) {
  return isa.multiplies_bf16 && call.dtype == Dtype::kBfloat16 ? (call.width + 1) / 2 : call.width;
}
// Whether weight rows can be read in place.
inline bool reads_in_place(const Isa& isa, const LinearNll& call) {
  return call.dtype == Dtype::kFloat32 ||
         (call.dtype == Dtype::kBfloat16 && isa.multiplies_bf16 && call.width % 2 == 0);
}

void linear_nll(const Isa&, const LinearNll&, int threads);
void packed_nll(const Isa&, const PackedNll&, int threads);

}  // namespace fastcompat
