// One instruction set's kernels, as a table; `isa_*.cpp` fill it in, the kernels' own .cpp files run on it.

#pragma once

#include <cstdint>

#include "elementwise.h"
#include "forest_attention.h"
#include "linear_nll.h"

namespace fastcompat {

// Weight rows as the kernel reads them: 32-bit elements, rows `stride` elements apart.
struct Rows {
  const uint32_t* data;
  int64_t stride;
};

// One instruction set's kernels.
struct Isa {
  const char* name;
  bool (*offered)();
  int block = 0;                 // tokens of a block
  bool multiplies_bf16 = false;  // pairs of bfloat16 go in as they are; else everything is widened to float32

  // Token rows [count, D] -> packed [K][block]; lanes past count repeat the last row.
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

  // Keys and values of tokens [begin, end) of one key head, begin even, as Operands; null where they are read in place.
  void (*pack_operands)(const ForestAttention&, int key_head, int64_t begin, int64_t end, uint32_t* key,
                        uint32_t* value) = nullptr;
  // One head of a block of queries from first on; runs are the keys that any of them sees, ascending.
  void (*attend)(const ForestAttention&, int head, int64_t first, int count, const Operands&, const Run* runs,
                 int n_runs, const Scratch&) = nullptr;

  // Tokens [begin, end) of each.
  void (*rms_norm)(const RmsNorm&, int64_t begin, int64_t end) = nullptr;
  void (*rotate)(const Rotate&, int64_t begin, int64_t end) = nullptr;
  void (*gated)(const Gated&, int64_t begin, int64_t end) = nullptr;
};

extern const Isa kAvx512Bf16, kAvx512, kAvx2, kPortable;

}  // namespace fastcompat
