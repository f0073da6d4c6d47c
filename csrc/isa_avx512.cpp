// AVX-512 without products of bfloat16: those are widened.

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define ISA_NAMESPACE avx512
#define ISA_AVX512
#include "elementwise_isa.h"
#include "forest_attention_isa.h"
#include "linear_nll_isa.h"
#include "packed_nll_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastcompat {

static bool offered() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Isa kAvx512{"avx512",
                  offered,
                  avx512::kBlock,
                  false,
                  avx512::pack,
                  avx512::widen,
                  avx512::target_logits,
                  avx512::fold,
                  avx512::packed_token,
                  avx512::pack_operands,
                  avx512::attend,
                  avx512::rms_norm_tokens,
                  avx512::rotate_tokens,
                  avx512::gated_tokens};

}  // namespace fastcompat
#else
namespace fastcompat {
const Isa kAvx512{"avx512", [] { return false; }};
}  // namespace fastcompat
#endif
