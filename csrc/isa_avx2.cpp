// Every x86 server and laptop since 2013; all that have AVX2 convert float16 too (F16C).

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA_NAMESPACE avx2
#define ISA_AVX2
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

static bool offered() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const Isa kAvx2{"avx2",
                offered,
                avx2::kBlock,
                false,
                avx2::pack,
                avx2::widen,
                avx2::target_logits,
                avx2::fold,
                avx2::packed_token,
                avx2::pack_operands,
                avx2::attend,
                avx2::rms_norm_tokens,
                avx2::rotate_tokens,
                avx2::gated_tokens};

}  // namespace fastcompat
#else
namespace fastcompat {
const Isa kAvx2{"avx2", [] { return false; }};
}  // namespace fastcompat
#endif
