// The few vector operations that the kernels are written in, for the instruction set that the including file has
// chosen.
//
// Included by one `isa_*.cpp` at a time, after it has defined ISA_NAMESPACE and one of ISA_AVX512, ISA_AVX2 or neither
// (portable: the compiler's own vectors; NEON, SSE2 or whatever the target has). Nothing here or in what includes it
// may call a function of the standard library: its inlined copy, compiled for AVX-512, could serve an older processor.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(ISA_AVX512) || defined(ISA_AVX2)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastcompat::ISA_NAMESPACE {

static inline uint32_t load_u32(const void* p) {
  uint32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint16_t load_u16(const void* p) {
  uint16_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline float bf16_to_float(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
static inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  // No step goes through a denormal float32, which a thread may be set to flush.
  float magnitude = as_float(rest + 0x38000000);
  if (rest < 0x00800000) magnitude = float(int(bits & 0x3ff)) * 5.9604645e-8f;
  if (rest >= 0x0f800000) magnitude = as_float(rest | 0x7f800000);
  return __builtin_copysignf(magnitude, as_float(sign | 1));
}

#if defined(ISA_AVX512)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 4;  // vectors of tokens in a block: 6 x 4 accumulators, 4 tokens, 1 weight of 32 registers

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec splat(float x) { return _mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Returns b where either is NaN.
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
// p * 2^n for whole n in [-126, 127].
static inline Vec scale2(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }
// count + 1 in the lanes where a > b.
static inline Vec count_greater(Vec count, Vec a, Vec b) {
  return _mm512_mask_add_ps(count, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), count, _mm512_set1_ps(1.0f));
}
static inline Vec load_bf16(const uint16_t* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline Vec load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// a < b ? yes : no
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
static inline void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(ISA_AVX2)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 2;  // 6 x 2 accumulators, 2 tokens, 1 weight of 16 registers

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec splat(float x) { return _mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec scale2(Vec p, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
static inline Vec count_greater(Vec count, Vec a, Vec b) {
  return _mm256_add_ps(count, _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_set1_ps(1.0f)));
}
static inline Vec load_bf16(const uint16_t* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static inline Vec load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
#if defined(__ARM_NEON)
constexpr int kRegisters = 4;
#else
constexpr int kRegisters = 2;
#endif

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec splat(float x) { return Vec{x, x, x, x}; }
#if defined(__ARM_NEON)
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
// Adding and taking away 1.5 * 2^23 leaves the nearest whole number of |a| < 2^22.
static inline Vec round(Vec a) { return (a + splat(12582912.0f)) - splat(12582912.0f); }
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec scale2(Vec p, Vec n) { return p * (Vec)((__builtin_convertvector(n, IVec) + 127) << 23); }
static inline Vec count_greater(Vec count, Vec a, Vec b) {
  const IVec one = (IVec)splat(1.0f);
  return count + (Vec)((a > b) & one);
}
static inline Vec load_bf16(const uint16_t* p) {
  return Vec{bf16_to_float(load_u16(p)), bf16_to_float(load_u16(p + 1)), bf16_to_float(load_u16(p + 2)),
             bf16_to_float(load_u16(p + 3))};
}
static inline Vec load_f16(const uint16_t* p) {
  return Vec{f16_to_float(load_u16(p)), f16_to_float(load_u16(p + 1)), f16_to_float(load_u16(p + 2)),
             f16_to_float(load_u16(p + 3))};
}
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
static inline void store_f16(uint16_t* p, Vec v) {
  for (int i = 0; i < 4; ++i) {
    const _Float16 half = (_Float16)v[i];
    std::memcpy(p + i, &half, sizeof half);
  }
}

#endif

constexpr int kBlock = kLanes * kRegisters;  // tokens of a block

#if defined(ISA_AVX512)
static inline Vec interleave_lower(Vec a, Vec b) {
  return (Vec)__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline Vec interleave_upper(Vec a, Vec b) {
  return (Vec)__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(ISA_AVX2)
static inline Vec interleave_lower(Vec a, Vec b) {
  return (Vec)__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
static inline Vec interleave_upper(Vec a, Vec b) {
  return (Vec)__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
static inline Vec interleave_lower(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline Vec interleave_upper(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Rounded to bfloat16, which is then in the upper half of each lane.
static inline Bits round_to_bf16(Vec v) { return (Bits)v + 0x7fff + (((Bits)v >> 16) & 1); }
static inline void store_bf16(uint16_t* p, Vec v) {
  const Halves halves = __builtin_convertvector(round_to_bf16(v) >> 16, Halves);
  std::memcpy(p, &halves, sizeof halves);
}
// Transposes kLanes vectors of kLanes elements in log2(kLanes) rounds of interleaving halves.
static inline void transpose(Vec (&rows)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_lower(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_upper(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}
// As bfloat16, a in the upper half of each lane and b in the lower.
#if defined(ISA_BF16)
static inline Vec bf16_pair(Vec a, Vec b) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(a, b));
}
#else
static inline Vec bf16_pair(Vec a, Vec b) { return (Vec)((round_to_bf16(a) & 0xffff0000u) | (round_to_bf16(b) >> 16)); }
#endif

// (2^f - 1) / f on [-0.5, 0.5]; minimax, relative error of 2^f below 2e-9.
static inline Vec exp2_slope(Vec f) {
  Vec p = splat(1.5353362e-4f);
  p = fma(p, f, splat(1.339887445e-3f));
  p = fma(p, f, splat(9.618437358e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  return fma(p, f, splat(6.931472029e-1f));
}

// 2^t for t <= 0, relative error below 1.1e-4, a twentieth of what rounding to bfloat16 costs. From -125.5 down it
// stays.
static inline Vec exp2_rough(Vec t) {
  t = max(splat(-125.5f), t);
  const Vec n = round(t);
  const Vec f = t - n;
  Vec p = splat(5.500892922e-2f);
  p = fma(p, f, splat(2.422109544e-1f));
  p = fma(p, f, splat(6.932829022e-1f));
  return scale2(fma(p, f, splat(1.0f)), n);
}

// exp(d) for d <= 0; below -87 it stays at exp(-87), 1.6e-38, the last that is not denormal. NaN stays NaN.
static inline Vec clamp_exponent(Vec d) { return max(splat(-87.0f), d); }
static inline Vec exp_clamped(Vec d) {
  const Vec t = d * splat(1.44269504f);
  const Vec n = round(t);
  const Vec f = t - n;
  return scale2(fma(exp2_slope(f), f, splat(1.0f)), n);
}

// tanh(x) = t / (t + 2) with t = expm1(2x), which keeps small x's relative precision.
static inline Vec tanh(Vec x) {
  const Vec zero = splat(0.0f), one = splat(1.0f), two = splat(2.0f), limit = splat(-87.0f);
  const Vec below = zero - max(limit, zero - two * x);
  const Vec t = max(limit, below) * splat(1.44269504f);
  const Vec n = round(t);
  const Vec f = t - n;
  const Vec power = scale2(one, n);
  const Vec expm1 = fma(exp2_slope(f) * f, power, power - one);
  return expm1 / (expm1 + two);
}

}  // namespace fastcompat::ISA_NAMESPACE
