// Sixteen lanes at a time: the only vocabulary the kernels are written in, so that one source serves every
// instruction set. Each kernel file is compiled once per instruction set with MOTET_ISA naming a namespace.
//
//   f32x16, i32x16  sixteen 32-bit lanes        mask16  one truth value per lane
//   u8x64           sixty-four bytes            always_inline functions only: nothing here reaches the linker
//
// Every function gives the same bits on every instruction set, special values included (but payloads of NaN):
//   - fma rounds once; nothing else is fused.
//   - max(a, b) is a > b ? a : b and min(a, b) is a < b ? a : b, lane by lane: b where either is NaN.
//   - reductions add lanes i and i + 8, then i + 4, i + 2, i + 1; those of sixteen vectors give lane i that of the i-th.
//   - to_i32 rounds half to even; out of range and NaN give INT32_MIN.
// Pointers need no alignment. Functions ending in _n touch n lanes only, 0 <= n <= 16; the others load as 0.
//
// The backends define, besides what the shared part below builds from them:
//   f32_zero, f32_set1, load, load_n, store, store_n, operators + - * /, fma, max, min, abs, sqrt, round_even
//   i32_zero, i32_set1, load_i32, store_i32, operators + - * & | ^, max, min
//   shift_left<n>, shift_right<n> (arithmetic)
//   to_f32, to_i32; as_f32, as_i32 (bit casts)
//   load_u8, load_s8 (16 bytes widened), store_s8 (the low bytes), saturate_s8 (the lanes of four vectors, cut to a byte each)
//   add_fours(even, odd, v): the sums of four neighbouring lanes, four of a vector; those of eight are two vectors
//   operators < <= > >= == on f32x16 and > == on i32x16 giving mask16; select(mask, if_true, if_false), bits,
//   first_n
//   load_f16, load_bf16, store_f16, store_bf16 (round to nearest even)
//   load_bytes, store_bytes, bytes_word (a 32-bit word in every lane), bytes_all (one byte everywhere), low_nibbles,
//   high_nibbles, subtract_bytes and times16 (each byte modulo 256)
//   dot4(acc, u8, s8): acc[i] += Σ_{j<4} u8[4i + j] · s8[4i + j], exact
//   dot4_u7: the same, for u8 at most 127
#pragma once
#include <cstdint>

#define MOTET_INLINE inline __attribute__((always_inline))

#if defined(MOTET_ISA_avx512)
#include "simd_avx512.h"
#elif defined(MOTET_ISA_avx2)
#include "simd_avx2.h"
#elif defined(MOTET_ISA_scalar)
#include "simd_scalar.h"
#else
#error "define MOTET_ISA and MOTET_ISA_<name>"
#endif

namespace motet::MOTET_ISA {

MOTET_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
MOTET_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

MOTET_INLINE f32x16 neg(f32x16 a) { return as_f32(as_i32(a) ^ i32_set1(INT32_MIN)); }

// c − a·b, rounded once.
MOTET_INLINE f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) { return fma(neg(a), b, c); }

MOTET_INLINE f32x16 load_f16_n(const void* p, int n) {
  uint16_t lanes[16] = {};
  __builtin_memcpy(lanes, p, 2 * static_cast<unsigned>(n));
  return load_f16(lanes);
}
MOTET_INLINE f32x16 load_bf16_n(const void* p, int n) {
  uint16_t lanes[16] = {};
  __builtin_memcpy(lanes, p, 2 * static_cast<unsigned>(n));
  return load_bf16(lanes);
}
MOTET_INLINE void store_f16_n(void* p, f32x16 v, int n) {
  uint16_t lanes[16];
  store_f16(lanes, v);
  __builtin_memcpy(p, lanes, 2 * static_cast<unsigned>(n));
}
MOTET_INLINE void store_bf16_n(void* p, f32x16 v, int n) {
  uint16_t lanes[16];
  store_bf16(lanes, v);
  __builtin_memcpy(p, lanes, 2 * static_cast<unsigned>(n));
}

// One lane's worth, by the same instructions as sixteen.
MOTET_INLINE float f16_to_f32(uint16_t h) {
  float lanes[16];
  store(lanes, load_f16_n(&h, 1));
  return lanes[0];
}

// e^x within 1.5 ulp; 0 below −104, infinity above 88.73, results below 2^−126 as denormals.
MOTET_INLINE f32x16 exp(f32x16 x) {
  x = min(f32_set1(89.0f), max(f32_set1(-104.0f), x));  // in this order NaN stays NaN
  const f32x16 n = round_even(x * f32_set1(1.44269504088896341f));
  f32x16 r = fnma(n, f32_set1(0.693359375f), x);
  r = fnma(n, f32_set1(-2.12194440e-4f), r);
  f32x16 p = f32_set1(1.9875691500e-4f);
  p = fma(p, r, f32_set1(1.3981999507e-3f));
  p = fma(p, r, f32_set1(8.3334519073e-3f));
  p = fma(p, r, f32_set1(4.1665795894e-2f));
  p = fma(p, r, f32_set1(1.6666665459e-1f));
  p = fma(p, r, f32_set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + f32_set1(1.0f);
  // 2^n in two factors: one alone would leave the exponent's range.
  const i32x16 whole = to_i32(n);
  const i32x16 half = shift_right<1>(whole);
  const i32x16 bias = i32_set1(127);
  return p * as_f32(shift_left<23>(half + bias)) * as_f32(shift_left<23>(whole - half + bias));
}

// tanh x within 2 ulp: an odd polynomial near zero, 1 − 2 / (e^2|x| + 1) with x's sign elsewhere.
MOTET_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 magnitude = abs(x);
  const f32x16 z = x * x;
  f32x16 p = f32_set1(-5.70498872745e-3f);
  p = fma(p, z, f32_set1(2.06390887954e-2f));
  p = fma(p, z, f32_set1(-5.37397155531e-2f));
  p = fma(p, z, f32_set1(1.33314422036e-1f));
  p = fma(p, z, f32_set1(-3.33332819422e-1f));
  const f32x16 near_zero = fma(p * z, magnitude, magnitude);
  const f32x16 far = f32_set1(1.0f) - f32_set1(2.0f) / (exp(magnitude + magnitude) + f32_set1(1.0f));
  const f32x16 unsigned_tanh = select(magnitude < f32_set1(0.625f), near_zero, far);
  return as_f32(as_i32(unsigned_tanh) | (as_i32(x) & i32_set1(INT32_MIN)));
}

}  // namespace motet::MOTET_ISA
