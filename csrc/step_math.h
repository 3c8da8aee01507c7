// One pixel of a step, shared by the CPU and the CUDA code so that both give the same bits.
// The specification is the eager reference in rvlm/ops/steps.py; floating-point contraction is off in both compilers.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RVLM_INLINE __host__ __device__ __forceinline__
#else
#define RVLM_INLINE inline __attribute__((always_inline))
#endif

namespace rvlm {

template <typename T>
RVLM_INLINE T sign(T g) {  // sign(0) = sign(NaN) = 0, as torch.sign
  return T(g > T(0)) - T(g < T(0));
}

template <typename T>
RVLM_INLINE T clip(T v, T lo, T hi) {  // NaN falls through, as in torch.clamp
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// What is the same for every pixel of a call. levels = 0: no quantisation.
template <typename T>
struct Box {
  T lo, hi, levels;
};

// y rounded to the nearest k / levels that lies within eps of x and inside the box. A bound that misses a level by
// rounding alone (1e-6 of the range) counts as reaching it: 8/255 in fp32 holds eight levels.
template <typename T>
RVLM_INLINE T quantize_linf(T y, T x, T eps, Box<T> box) {
  const T levels = box.levels, slack = T(double(levels) * 1e-6);
  T q = std::floor(levels * y + T(0.5));
  const T lowest = std::ceil(levels * (x - eps) - slack), highest = std::floor(levels * (x + eps) + slack);
  q = q < lowest ? lowest : q;
  q = q > highest ? highest : q;
  return clip(q, std::ceil(levels * box.lo), std::floor(levels * box.hi)) / levels;
}

// y rounded toward x, level by level, so that no coordinate of y - x grows; x is on the grid.
template <typename T>
RVLM_INLINE T quantize_toward(T y, T x, Box<T> box) {
  const T levels = box.levels, slack = T(double(levels) * 1e-6);
  const T moved = levels * (y - x);
  const T whole = std::floor(std::fabs(moved) + slack);
  return (std::floor(levels * x + T(0.5)) + (moved < T(0) ? -whole : whole)) / levels;
}

template <typename T, bool kQuantize>
RVLM_INLINE T linf_pixel(T x_adv, T g, T x, T alpha, T eps, Box<T> box) {
  const T moved = x_adv + alpha * sign(g);
  const T y = clip(x + clip(moved - x, -eps, eps), box.lo, box.hi);
  if constexpr (kQuantize) return quantize_linf(y, x, eps, box);
  return y;
}

// The ball in the form that AutoAttack clips to it, then the box.
template <typename T>
RVLM_INLINE T project(T u, T x, T eps, Box<T> box) {
  return clip(clip(u, x - eps, x + eps), box.lo, box.hi);
}

template <typename T>
RVLM_INLINE T apgd_pixel(T x_prev, T x_adv, T g, T x, T step, T eps, T a, T rest, Box<T> box) {
  const T z = project(x_adv + step * sign(g), x, eps, box);
  return project(x_adv + (z - x_adv) * a + (x_adv - x_prev) * rest, x, eps, box);
}

// scale = alpha / ||g|| (0 where the row has no direction), shrink = min(1, eps / ||delta'||).
template <typename T, bool kQuantize>
RVLM_INLINE T l2_pixel(T x_adv, T g, T x, T scale, T shrink, Box<T> box) {
  const T direction = scale == T(0) ? T(0) : scale * g;
  const T y = clip(x + ((x_adv - x) + direction) * shrink, box.lo, box.hi);
  if constexpr (kQuantize) return quantize_toward(y, x, box);
  return y;
}

// From the three sums of a row to its scale and shrink factor (float64, rounded once to the image type).
template <typename T>
RVLM_INLINE void l2_factors(double gg, double dg, double dd, T alpha, T eps, T& scale, T& shrink) {
  const double norm = std::sqrt(gg);
  const bool directed = norm > 0.0 && norm < HUGE_VAL && std::isfinite(T(double(alpha) / norm));
  const double s = directed ? double(alpha) / norm : 0.0;
  const double length2 = dd + (directed ? 2.0 * s * dg + double(alpha) * double(alpha) : 0.0);
  const double ratio = double(eps) / std::sqrt(length2);
  scale = T(s);
  shrink = length2 > 0.0 && ratio < 1.0 ? T(ratio) : T(1);
}

// Philox4x32-10 (Salmon et al., SC 2011). Four 32-bit words per counter; nothing depends on batch size or order.
struct Philox {
  uint32_t word[4];

  RVLM_INLINE Philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
  }
};

template <typename T>
RVLM_INLINE T start_pixel(uint32_t word, T x, T eps, T lo, T hi) {
  const T u = T(word >> 8) * T(1.0 / 16777216.0);  // [0, 1), 24 bits: the same numbers in fp32 and fp64
  return clip(x + (u * T(2) - T(1)) * eps, lo, hi);
}

}  // namespace rvlm
