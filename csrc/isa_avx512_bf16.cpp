// AVX-512 with products of bfloat16 pairs (Cooper Lake, Sapphire Rapids, Zen 4 and later).

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif
#define ISA_NAMESPACE avx512_bf16
#define ISA_AVX512
#define ISA_BF16
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
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

const Isa kAvx512Bf16{"avx512_bf16",
                      offered,
                      avx512_bf16::kBlock,
                      true,
                      avx512_bf16::pack,
                      avx512_bf16::widen,
                      avx512_bf16::target_logits,
                      avx512_bf16::fold,
                      avx512_bf16::packed_token,
                      avx512_bf16::pack_operands,
                      avx512_bf16::attend,
                      avx512_bf16::rms_norm_tokens,
                      avx512_bf16::rotate_tokens,
                      avx512_bf16::gated_tokens};

}  // namespace fastcompat
#else
namespace fastcompat {
const Isa kAvx512Bf16{"avx512_bf16", [] { return false; }};
}  // namespace fastcompat
#endif
