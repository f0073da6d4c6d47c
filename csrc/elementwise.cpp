// The rows of each call, shared out among threads; the kernels are an Isa's.

#include "elementwise.h"

#include <algorithm>

#include "isa.h"
#include "threads.h"

namespace fastcompat {
namespace {

// Elements of a work item: enough to be worth the handing out, few enough that threads end together.
constexpr int64_t kElements = 1 << 16;

template <class Call>
void over_tokens(const Call& call, int64_t elements_of_token, int threads,
                 void (*kernel)(const Call&, int64_t, int64_t)) {
  const int64_t tokens = std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements_of_token));
  parallel_for((call.tokens + tokens - 1) / tokens, threads,
               [&](int64_t item, int) { kernel(call, item * tokens, std::min(call.tokens, (item + 1) * tokens)); });
}

}  // namespace

void rms_norm(const Isa& isa, const RmsNorm& call, int threads) {
  over_tokens(call, int64_t(call.heads) * call.width, threads, isa.rms_norm);
}

void rotate(const Isa& isa, const Rotate& call, int threads) {
  over_tokens(call, int64_t(call.heads) * call.rotated, threads, isa.rotate);
}

void gated(const Isa& isa, const Gated& call, int threads) { over_tokens(call, call.width, threads, isa.gated); }

}  // namespace fastcompat
