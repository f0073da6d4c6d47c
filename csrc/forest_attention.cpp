// Which keys each block of queries sees, and the loop over blocks and heads; the kernels are an Isa's.

#include "forest_attention.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace fastcompat {
namespace {

// Tokens whose keys and values are packed by one work item; even.
constexpr int64_t kPackedTokens = 512;

// The keys of every block of queries.
struct Seen {
  std::vector<Run> runs;
  std::vector<size_t> begins;  // of each block in `runs`, and the end of the last
  int64_t most_rows = 0;       // of any block, its runs rounded out to pairs
};

// A block sees the tokens from its first query to its last and the first one's ancestors: a token's ancestors before
// the block contain the block's first query too, because subtrees are contiguous. Ancestors come in chains of adjacent
// tokens.
Seen seen_by(const ForestAttention& call, int64_t block) {
  // Depth first, a token's parent is the last one before it that is one less deep.
  std::vector<int32_t> last_at(*std::max_element(call.position, call.position + call.tokens) + 1, -1);
  std::vector<int32_t> chain_begin(call.tokens), parent(call.tokens);
  for (int32_t t = 0; t < call.tokens; ++t) {
    const int32_t depth = call.position[t];
    parent[t] = depth == 0 ? -1 : last_at[depth - 1];
    last_at[depth] = t;
    chain_begin[t] = t > 0 && parent[t] == t - 1 ? chain_begin[t - 1] : t;
  }
  Seen seen;
  seen.begins.push_back(0);
  for (int64_t begin = 0; begin < call.queries; begin += block) {
    const int64_t first = call.token_of(begin), last = call.token_of(std::min(begin + block, call.queries) - 1) + 1;
    // Below this depth a key is out of every query's window.
    const int32_t shallowest = *std::min_element(call.position + first, call.position + last);
    const int32_t reached = call.window > 0 ? shallowest - call.window + 1 : 0;
    int64_t rows = 0;
    int32_t end = int32_t(last), token = int32_t(first);
    while (true) {
      const int32_t from = std::max(chain_begin[token], token - (call.position[token] - reached));
      if (from < end) {
        seen.runs.push_back({from, end});
        rows += ((end + 1) & ~1) - (from & ~1);
      }
      const int32_t above = parent[chain_begin[token]];
      if (above < 0 || call.position[above] < reached) break;
      token = above;
      end = above + 1;
    }
    std::reverse(seen.runs.begin() + int64_t(seen.begins.back()), seen.runs.end());
    seen.begins.push_back(seen.runs.size());
    seen.most_rows = std::max(seen.most_rows, rows);
  }
  return seen;
}

// 32-bit elements of one array over all threads or heads, laid out one after another.
class Parts {
 public:
  Parts(int64_t n_parts, int64_t size) : size_(size), data_(n_parts * size) {}
  uint32_t* operator[](int64_t part) { return data_.empty() ? nullptr : data_.data() + part * size_; }

 private:
  int64_t size_;
  std::vector<uint32_t> data_;
};

}  // namespace

void forest_attention(const Isa& isa, const ForestAttention& call, int threads) {
  if (call.queries == 0) return;
  const int64_t block = isa.block, n_blocks = (call.queries + block - 1) / block;
  const bool pairs = isa.multiplies_bf16 && call.dtype == Dtype::kBfloat16;
  const bool key_in_place = call.dtype == Dtype::kFloat32 || (pairs && call.width % 2 == 0 && call.key_token % 2 == 0);
  const bool value_in_place = call.dtype == Dtype::kFloat32;
  const int64_t key_steps = pairs ? (call.width + 1) / 2 : call.width;
  const int64_t value_steps = pairs ? (call.tokens + 1) / 2 : call.tokens;
  const Seen seen = seen_by(call, block);

  Parts key(call.key_heads, key_in_place ? 0 : call.tokens * key_steps);
  Parts value(call.key_heads, value_in_place ? 0 : value_steps * call.value_width);
  if (!key_in_place || !value_in_place) {
    const int64_t n_parts = (call.tokens + kPackedTokens - 1) / kPackedTokens;
    parallel_for(call.key_heads * n_parts, threads, [&](int64_t item, int) {
      const int64_t head = item / n_parts, begin = item % n_parts * kPackedTokens;
      isa.pack_operands(call, int(head), begin, std::min(begin + kPackedTokens, call.tokens), key[head], value[head]);
    });
  }

  Parts query_scratch(threads, key_steps * block), score_scratch(threads, seen.most_rows * block);
  Parts out_scratch(threads, call.value_width * block);
  const int64_t element_bytes = call.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto at = [&](const void* data, int64_t offset) {
    return reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + element_bytes * offset);
  };
  parallel_for(n_blocks * call.heads, threads, [&](int64_t item, int thread) {
    // Late blocks see the most keys: they come first, so that threads end together.
    const int64_t index = n_blocks - 1 - item / call.heads, head = item % call.heads;
    const int64_t key_head = head / (call.heads / call.key_heads), first = index * block;
    Operands operands;
    operands.key = key_in_place ? at(call.key, key_head * call.key_head) : key[key_head];
    operands.key_stride = key_in_place ? call.key_token * element_bytes / 4 : key_steps;
    operands.value = value_in_place ? at(call.value, key_head * call.value_head) : value[key_head];
    operands.value_stride = value_in_place ? call.value_token : call.value_width;
    const Scratch scratch{query_scratch[thread], reinterpret_cast<float*>(score_scratch[thread]),
                          reinterpret_cast<float*>(out_scratch[thread])};
    isa.attend(call, int(head), first, int(std::min(block, call.queries - first)), operands,
               seen.runs.data() + seen.begins[index], int(seen.begins[index + 1] - seen.begins[index]), scratch);
  });
}

}  // namespace fastcompat
