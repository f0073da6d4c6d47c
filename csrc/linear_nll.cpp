// The loop over segments, chunks and blocks of tokens; the kernels are an Isa's.

#include "linear_nll.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace fastcompat {
namespace {

// Tokens whose packed rows and states are held at a time: at most so many, at most so many bytes of packed rows.
constexpr int64_t kTokens = 1024;
constexpr int64_t kPackedBytes = 2 * 1024 * 1024;
// Work items of a vocabulary. A fixed number: what a segment sums does not depend on how many threads there are.
constexpr int64_t kSegments = 32;
// Bytes of weights in a chunk, which has to stay in a core's second-level cache together with a block of tokens.
constexpr int64_t kChunkBytes = 384 * 1024;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Steps of the inner product: pairs of bfloat16, or single float32.
int64_t steps(const Isa& isa, const LinearNll& call) {
  return isa.multiplies_bf16 && call.dtype == Dtype::kBfloat16 ? (call.width + 1) / 2 : call.width;
}
// Whether weight rows can be read in place.
bool reads_in_place(const Isa& isa, const LinearNll& call) {
  return call.dtype == Dtype::kFloat32 ||
         (call.dtype == Dtype::kBfloat16 && isa.multiplies_bf16 && call.width % 2 == 0);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t rows_of_chunk(int64_t bytes_of_row) {
  const int64_t groups = std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(bytes_of_row, 1) / 6, 4, kChunkRows / 6);
  return 6 * groups;
}

// States of all tokens in one allocation, `stride` tokens to a segment.
class States {
 public:
  States(int64_t n_segments, int64_t stride, bool all)
      : stride_(stride),
        all_(all),
        m_(n_segments * stride, -kInfinity),
        sums_(n_segments * stride * (all ? 5 : 1), 0.0) {}

  State at(int64_t segment, int64_t token) {
    const int64_t i = segment * stride_ + token;
    double* sum = sums_.data() + i;
    const int64_t plane = all_ ? int64_t(m_.size()) : 0;
    return State{m_.data() + i, sum, sum + plane, sum + 2 * plane, sum + 3 * plane, sum + 4 * plane};
  }

 private:
  int64_t stride_;
  bool all_;
  std::vector<float> m_;
  std::vector<double> sums_;
};

// All segments of one token, in order, into its statistics.
void finish(States& states, int64_t n_segments, int64_t token, double target_logit, bool all, float* out,
            int64_t out_stride) {
  double m = -std::numeric_limits<double>::infinity();
  for (int64_t s = 0; s < n_segments; ++s) m = std::max(m, double(*states.at(s, token).m));
  double sum = 0.0, first = 0.0, second = 0.0, squares = 0.0, above = 0.0;
  for (int64_t s = 0; s < n_segments; ++s) {
    const State own = states.at(s, token);
    const double shift = *own.m - m, scale = std::exp(shift);
    sum += scale * *own.sum;
    if (!all || scale == 0.0) continue;
    first += scale * (*own.first + shift * *own.sum);
    second += scale * (*own.second + 2.0 * shift * *own.first + shift * shift * *own.sum);
    squares += scale * scale * *own.squares;
  }
  const double log_sum = std::log(sum);
  out[0] = float(log_sum + m - target_logit);
  if (!all) return;
  for (int64_t s = 0; s < n_segments; ++s) above += *states.at(s, token).above;
  // Where every word is barred there is no distribution.
  if (m <= -std::numeric_limits<float>::max()) sum = NAN;
  const double mean = first / sum;
  out[out_stride] = float(log_sum - mean);
  // NaN comes first: it is the one that max returns.
  out[2 * out_stride] = float(std::max(second / sum - mean * mean, 0.0));
  out[3 * out_stride] = float(above);
  out[4 * out_stride] = float(squares / (sum * sum));
}

// linear_nll of tokens [begin, end).
void token_range(const Isa& isa, const LinearNll& call, int64_t begin, int64_t end, int threads) {
  const int64_t n_steps = steps(isa, call);
  const int64_t n_blocks = divide_up(end - begin, isa.block);
  const int64_t stride = n_blocks * isa.block;
  const int64_t block_size = n_steps * isa.block;
  const bool in_place = reads_in_place(isa, call);
  const int64_t chunk_rows = rows_of_chunk(4 * n_steps);
  const int64_t n_chunks = divide_up(call.vocabulary, chunk_rows);
  const int64_t n_segments = std::min(kSegments, n_chunks);

  std::vector<uint32_t> packed(n_blocks * block_size);
  std::vector<uint32_t> scratch(threads * (in_place ? n_steps : chunk_rows * n_steps));
  std::vector<float> tiles(int64_t(threads) * kChunkRows * kMaxBlock);
  std::vector<float> target_logit(stride, 0.0f);
  States states(n_segments, stride, call.all_statistics);
  const auto tokens_of = [&](int64_t block) {
    return int(std::min<int64_t>(isa.block, end - begin - block * isa.block));
  };
  const auto scratch_of = [&](int thread) { return scratch.data() + thread * (scratch.size() / threads); };

  parallel_for(n_blocks, threads, [&](int64_t block, int thread) {
    const int64_t first = begin + block * isa.block;
    uint32_t* own = packed.data() + block * block_size;
    isa.pack(call, first, tokens_of(block), own);
    isa.target_logits(call, own, first, tokens_of(block), scratch_of(thread), target_logit.data() + block * isa.block);
  });

  // Threads beyond the segments share each segment's tokens; no token's result depends on how.
  const int64_t n_shares = std::min(n_blocks, divide_up(threads, n_segments));
  parallel_for(n_segments * n_shares, threads, [&](int64_t item, int thread) {
    const int64_t segment = item / n_shares, share = item % n_shares;
    for (int64_t chunk = segment * n_chunks / n_segments; chunk < (segment + 1) * n_chunks / n_segments; ++chunk) {
      const int64_t first_row = chunk * chunk_rows;
      const int count = int(std::min(chunk_rows, call.vocabulary - first_row));
      Rows rows{scratch_of(thread), n_steps};
      if (in_place) {
        const int64_t row_bytes = call.width * (call.dtype == Dtype::kFloat32 ? 4 : 2);
        rows.data = reinterpret_cast<const uint32_t*>(static_cast<const char*>(call.weight) + first_row * row_bytes);
      } else {
        isa.widen(call, first_row, count, scratch_of(thread));
      }
      for (int64_t block = share * n_blocks / n_shares; block < (share + 1) * n_blocks / n_shares; ++block) {
        isa.fold(call, packed.data() + block * block_size, tokens_of(block), rows, first_row, count,
                 target_logit.data() + block * isa.block, tiles.data() + int64_t(thread) * kChunkRows * kMaxBlock,
                 states.at(segment, block * isa.block));
      }
    }
  });

  parallel_for(n_blocks, threads, [&](int64_t block, int) {
    for (int64_t i = block * isa.block; i < block * isa.block + tokens_of(block); ++i) {
      finish(states, n_segments, i, target_logit[i], call.all_statistics, call.out + begin + i, call.tokens);
    }
  });
}

}  // namespace

void linear_nll(const Isa& isa, const LinearNll& call, int threads) {
  const int64_t fitting = kPackedBytes / (4 * steps(isa, call)) / isa.block * isa.block;
  const int64_t at_a_time = std::clamp<int64_t>(fitting, 256, kTokens);
  for (int64_t begin = 0; begin < call.tokens; begin += at_a_time) {
    token_range(isa, call, begin, std::min(begin + at_a_time, call.tokens), threads);
  }
}

void packed_nll(const Isa& isa, const PackedNll& call, int threads) {
  parallel_for(call.tokens, threads, [&](int64_t token, int) { isa.packed_token(call, token); });
}

}  // namespace fastcompat
