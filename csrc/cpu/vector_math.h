// exp and log in float without branches or tables, so that loops under `omp simd` vectorise (libm's are calls).
// Polynomials on a reduced range after Cephes; within 2 ulp of libm. double goes to libm: it serves gradient checks.
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

RVLM_INLINE double exp_(double x) { return std::exp(x); }
RVLM_INLINE double log_(double x) { return std::log(x); }

// 0 below -87.3, where float becomes subnormal; NaN stays NaN; x must not exceed 88.
RVLM_INLINE float exp_(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float clipped = x < -87.3f ? -87.3f : x;
  const float shifted = clipped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * r * r + r + 1.0f;
  const auto scaled = std::bit_cast<uint32_t>(mantissa) + (std::bit_cast<uint32_t>(shifted) << 23);
  const float y = std::bit_cast<float>(scaled);
  return x < -87.3f ? 0.0f : (x != x ? x : y);
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
