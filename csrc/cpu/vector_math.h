// exp, exp2 and log in float without branches or tables, so that loops under `omp simd` vectorise (libm's are calls).
// Polynomials on a reduced range, that of log after Cephes; within 2 ulp of libm. double goes to libm: it serves
// gradient checks.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../step_math.h"

// x86-64 Linux: one clone of a leaf function per instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define RVLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RVLM_CLONES
#endif

namespace rvlm {

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// Exponents of two below which a power is 0, float's a little before it becomes subnormal.
template <typename T>
constexpr T kNothing = T(-1080);
template <>
constexpr float kNothing<float> = -127.0f;

template <typename T>
RVLM_INLINE T bounded(T x) {
  return x < kNothing<T> ? kNothing<T> : x;
}

RVLM_INLINE double exp_(double x) { return std::exp(x); }
RVLM_INLINE double exp2_(double x) { return std::exp2(x); }
RVLM_INLINE double log_(double x) { return std::log(x); }

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// 2^(n + f) for shifted = n + kRound, n from -127 to 127, and |f| at most about 1/2. n = -127 gives 0. Terms are summed
// in pairs: as one chain they would take longer than the processor can look ahead.
RVLM_INLINE float power_of_two(float shifted, float f) {
  const float f2 = f * f;
  const float low = 0.693147182f + 0.240226477f * f, middle = 0.0555033237f + 0.00961843692f * f;
  const float high = 0.00133988739f + 0.00015353362f * f;
  const float mantissa = ((high * f2 + middle) * f2 + low) * f + 1.0f;
  return mantissa * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
}

// For a bounded x up to 127; NaN stays NaN.
RVLM_INLINE float exp2_(float x) {
  const float shifted = x + kRound;
  return power_of_two(shifted, x - (shifted - kRound));
}

// 0 below -87.7, where float is subnormal; NaN stays NaN; x must not exceed 88.
RVLM_INLINE float exp_(float x) {
  const float clipped = x < -88.03f ? -88.03f : x;
  const float shifted = clipped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  return power_of_two(shifted, ((clipped - n * 0.693359375f) - n * -2.12194440e-4f) * 1.44269504f);
}

// For normal x > 0; NaN stays NaN.
RVLM_INLINE float log_(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  // Exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;
  const float m = std::bit_cast<float>(bits - (uint32_t(exponent) << 23)) - 1.0f;
  const float e = float(exponent);
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float m2 = m * m;
  float y = p * m * m2 + e * -2.12194440e-4f - 0.5f * m2;
  y = m + y + e * 0.693359375f;
  return x != x ? x : y;
}

}  // namespace rvlm
