// The backend of simd.h in plain C++: arrays of sixteen. It is what the other backends are held to, and what
// runs where nothing better is known; clarity comes before speed.
#pragma once
#include <cstdint>

namespace motet::MOTET_ISA {

struct f32x16 {
  float v[16];
};
struct i32x16 {
  int32_t v[16];
};
struct u8x64 {
  uint8_t v[64];
};
struct mask16 {
  uint32_t v;
};  // bit i is lane i

// One result lane from the lanes of the arguments; i is the lane.
#define MOTET_LANES(Type, expression)                   \
  Type out;                                             \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out
#define MOTET_LANE_BITS(expression)                                                       \
  mask16 out{0};                                                                          \
  for (int i = 0; i < 16; ++i) out.v |= static_cast<uint32_t>((expression) ? 1 : 0) << i; \
  return out

MOTET_INLINE mask16 first_n(int n) { return {(1u << n) - 1}; }
MOTET_INLINE uint32_t bits(mask16 m) { return m.v; }
MOTET_INLINE mask16 operator&(mask16 a, mask16 b) { return {a.v & b.v}; }
MOTET_INLINE mask16 operator|(mask16 a, mask16 b) { return {a.v | b.v}; }

MOTET_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
MOTET_INLINE float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
MOTET_INLINE int32_t wrap(uint32_t u) { return static_cast<int32_t>(u); }
MOTET_INLINE uint32_t unwrap(int32_t x) { return static_cast<uint32_t>(x); }

MOTET_INLINE f32x16 f32_set1(float x) { MOTET_LANES(f32x16, x); }
MOTET_INLINE f32x16 f32_zero() { return f32_set1(0); }
MOTET_INLINE f32x16 load(const float* p) { MOTET_LANES(f32x16, p[i]); }
MOTET_INLINE f32x16 load_n(const float* p, int n) { MOTET_LANES(f32x16, i < n ? p[i] : 0); }
MOTET_INLINE void store_n(float* p, f32x16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
MOTET_INLINE void store(float* p, f32x16 a) { store_n(p, a, 16); }

MOTET_INLINE f32x16 operator+(f32x16 a, f32x16 b) { MOTET_LANES(f32x16, a.v[i] + b.v[i]); }
MOTET_INLINE f32x16 operator-(f32x16 a, f32x16 b) { MOTET_LANES(f32x16, a.v[i] - b.v[i]); }
MOTET_INLINE f32x16 operator*(f32x16 a, f32x16 b) { MOTET_LANES(f32x16, a.v[i] * b.v[i]); }
MOTET_INLINE f32x16 operator/(f32x16 a, f32x16 b) { MOTET_LANES(f32x16, a.v[i] / b.v[i]); }
MOTET_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  MOTET_LANES(f32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i]));
}
MOTET_INLINE f32x16 max(f32x16 a, f32x16 b) { MOTET_LANES(f32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
MOTET_INLINE f32x16 min(f32x16 a, f32x16 b) { MOTET_LANES(f32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
MOTET_INLINE f32x16 abs(f32x16 a) { MOTET_LANES(f32x16, __builtin_fabsf(a.v[i])); }
MOTET_INLINE f32x16 sqrt(f32x16 a) { MOTET_LANES(f32x16, __builtin_sqrtf(a.v[i])); }
MOTET_INLINE f32x16 round_even(f32x16 a) { MOTET_LANES(f32x16, __builtin_nearbyintf(a.v[i])); }
MOTET_INLINE mask16 operator<(f32x16 a, f32x16 b) { MOTET_LANE_BITS(a.v[i] < b.v[i]); }
MOTET_INLINE mask16 operator<=(f32x16 a, f32x16 b) { MOTET_LANE_BITS(a.v[i] <= b.v[i]); }
MOTET_INLINE mask16 operator>(f32x16 a, f32x16 b) { MOTET_LANE_BITS(a.v[i] > b.v[i]); }
MOTET_INLINE mask16 operator>=(f32x16 a, f32x16 b) { MOTET_LANE_BITS(a.v[i] >= b.v[i]); }
MOTET_INLINE mask16 operator==(f32x16 a, f32x16 b) { MOTET_LANE_BITS(a.v[i] == b.v[i]); }
MOTET_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
  MOTET_LANES(f32x16, m.v >> i & 1 ? a.v[i] : b.v[i]);
}

MOTET_INLINE i32x16 i32_set1(int32_t x) { MOTET_LANES(i32x16, x); }
MOTET_INLINE i32x16 i32_zero() { return i32_set1(0); }
MOTET_INLINE i32x16 load_i32(const int32_t* p) { MOTET_LANES(i32x16, p[i]); }
MOTET_INLINE void store_i32(int32_t* p, i32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
MOTET_INLINE i32x16 operator+(i32x16 a, i32x16 b) {
  MOTET_LANES(i32x16, wrap(unwrap(a.v[i]) + unwrap(b.v[i])));
}
MOTET_INLINE i32x16 operator-(i32x16 a, i32x16 b) {
  MOTET_LANES(i32x16, wrap(unwrap(a.v[i]) - unwrap(b.v[i])));
}
MOTET_INLINE i32x16 operator*(i32x16 a, i32x16 b) {
  MOTET_LANES(i32x16, wrap(unwrap(a.v[i]) * unwrap(b.v[i])));
}
MOTET_INLINE i32x16 operator&(i32x16 a, i32x16 b) { MOTET_LANES(i32x16, a.v[i] & b.v[i]); }
MOTET_INLINE i32x16 operator|(i32x16 a, i32x16 b) { MOTET_LANES(i32x16, a.v[i] | b.v[i]); }
MOTET_INLINE i32x16 operator^(i32x16 a, i32x16 b) { MOTET_LANES(i32x16, a.v[i] ^ b.v[i]); }
template <int kBits>
MOTET_INLINE i32x16 shift_left(i32x16 a) {
  MOTET_LANES(i32x16, wrap(unwrap(a.v[i]) << kBits));
}
template <int kBits>
MOTET_INLINE i32x16 shift_right(i32x16 a) {
  MOTET_LANES(i32x16, a.v[i] >> kBits);
}
MOTET_INLINE i32x16 max(i32x16 a, i32x16 b) { MOTET_LANES(i32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
MOTET_INLINE i32x16 min(i32x16 a, i32x16 b) { MOTET_LANES(i32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
MOTET_INLINE mask16 operator>(i32x16 a, i32x16 b) { MOTET_LANE_BITS(a.v[i] > b.v[i]); }
MOTET_INLINE mask16 operator==(i32x16 a, i32x16 b) { MOTET_LANE_BITS(a.v[i] == b.v[i]); }
MOTET_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) {
  MOTET_LANES(i32x16, m.v >> i & 1 ? a.v[i] : b.v[i]);
}

MOTET_INLINE int32_t to_i32_lane(float x) {
  const float whole = __builtin_nearbyintf(x);
  return whole >= -2147483648.0f && whole < 2147483648.0f ? static_cast<int32_t>(whole) : INT32_MIN;
}
MOTET_INLINE f32x16 to_f32(i32x16 a) { MOTET_LANES(f32x16, static_cast<float>(a.v[i])); }
MOTET_INLINE i32x16 to_i32(f32x16 a) { MOTET_LANES(i32x16, to_i32_lane(a.v[i])); }
MOTET_INLINE f32x16 as_f32(i32x16 a) { MOTET_LANES(f32x16, bits_float(unwrap(a.v[i]))); }
MOTET_INLINE i32x16 as_i32(f32x16 a) { MOTET_LANES(i32x16, wrap(float_bits(a.v[i]))); }
MOTET_INLINE i32x16 load_u8(const void* p) { MOTET_LANES(i32x16, static_cast<const uint8_t*>(p)[i]); }
MOTET_INLINE i32x16 load_s8(const void* p) { MOTET_LANES(i32x16, static_cast<const int8_t*>(p)[i]); }
MOTET_INLINE void store_s8(void* p, i32x16 a) {
  for (int i = 0; i < 16; ++i) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(a.v[i] & 255);
}

MOTET_INLINE float f16_lane(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13 | (mantissa != 0 ? 0x400000 : 0));
  if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}
MOTET_INLINE uint16_t to_f16_lane(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000)
    return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));  // NaN, quiet
  if (magnitude >= 0x477ff000)
    return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
  if (magnitude <
      0x38800000) {  // below 2^−14: a multiple of 2^−24; adding 0.5 lets the hardware round half to even
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}
MOTET_INLINE uint16_t to_bf16_lane(float x) {
  const uint32_t u = float_bits(x);
  if (x != x) return static_cast<uint16_t>((u | 0x400000) >> 16);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
MOTET_INLINE uint16_t half_at(const void* p, int i) {
  uint16_t h;
  __builtin_memcpy(&h, static_cast<const uint8_t*>(p) + 2 * i, 2);
  return h;
}
MOTET_INLINE f32x16 load_f16(const void* p) { MOTET_LANES(f32x16, f16_lane(half_at(p, i))); }
MOTET_INLINE f32x16 load_bf16(const void* p) {
  MOTET_LANES(f32x16, bits_float(static_cast<uint32_t>(half_at(p, i)) << 16));
}
MOTET_INLINE void store_f16(void* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t h = to_f16_lane(a.v[i]);
    __builtin_memcpy(static_cast<uint8_t*>(p) + 2 * i, &h, 2);
  }
}
MOTET_INLINE void store_bf16(void* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t h = to_bf16_lane(a.v[i]);
    __builtin_memcpy(static_cast<uint8_t*>(p) + 2 * i, &h, 2);
  }
}

MOTET_INLINE float reduce_add(f32x16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  }
  return a.v[0];
}
MOTET_INLINE float reduce_max(f32x16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  }
  return a.v[0];
}
MOTET_INLINE int32_t reduce_add(i32x16 a) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += unwrap(a.v[i]);
  return wrap(sum);
}
MOTET_INLINE i32x16 reduce_max(const i32x16 (&v)[16]) {
  i32x16 out;
  for (int i = 0; i < 16; ++i) {
    out.v[i] = v[i].v[0];
    for (int j = 1; j < 16; ++j) out.v[i] = out.v[i] > v[i].v[j] ? out.v[i] : v[i].v[j];
  }
  return out;
}
MOTET_INLINE i32x16 reduce_add(const i32x16 (&v)[16]) {
  i32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = reduce_add(v[i]);
  return out;
}

MOTET_INLINE void add_fours(i32x16& even, i32x16& odd, const i32x16 (&v)[8]) {
  for (int i = 0; i < 16; ++i) {
    const int32_t* const four = v[i / 2].v + i % 2 * 8;
    even.v[i] = wrap(unwrap(four[0]) + unwrap(four[1]) + unwrap(four[2]) + unwrap(four[3]));
    odd.v[i] = wrap(unwrap(four[4]) + unwrap(four[5]) + unwrap(four[6]) + unwrap(four[7]));
  }
}

MOTET_INLINE u8x64 saturate_s8(i32x16 a, i32x16 b, i32x16 c, i32x16 d) {
  const i32x16 all[] = {a, b, c, d};
  u8x64 out;
  for (int i = 0; i < 64; ++i) {
    const int32_t n = all[i / 16].v[i % 16];
    out.v[i] = static_cast<uint8_t>(n < -128 ? -128 : n > 127 ? 127 : n);
  }
  return out;
}

MOTET_INLINE u8x64 load_bytes(const void* p) {
  u8x64 out;
  __builtin_memcpy(out.v, p, 64);
  return out;
}
MOTET_INLINE void store_bytes(void* p, u8x64 a) { __builtin_memcpy(p, a.v, 64); }
MOTET_INLINE u8x64 bytes_word(const void* p) {
  u8x64 out;
  for (int i = 0; i < 16; ++i) __builtin_memcpy(out.v + 4 * i, p, 4);
  return out;
}
MOTET_INLINE u8x64 low_nibbles(u8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] &= 15;
  return a;
}
MOTET_INLINE u8x64 high_nibbles(u8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] >>= 4;
  return a;
}
// Either of them, without a branch where there are vectors.
MOTET_INLINE u8x64 nibbles(u8x64 a, bool is_high) { return is_high ? high_nibbles(a) : low_nibbles(a); }
MOTET_INLINE u8x64 bytes_all(int byte) {
  u8x64 out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(byte);
  return out;
}
MOTET_INLINE u8x64 subtract_bytes(u8x64 a, u8x64 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] - b.v[i]);
  return a;
}
MOTET_INLINE u8x64 times16(u8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] << 4);
  return a;
}
MOTET_INLINE i32x16 dot4(i32x16 acc, u8x64 u, u8x64 s) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) acc.v[i] += u.v[4 * i + j] * static_cast<int8_t>(s.v[4 * i + j]);
  }
  return acc;
}
MOTET_INLINE i32x16 dot4_u7(i32x16 acc, u8x64 u, u8x64 s) { return dot4(acc, u, s); }

#undef MOTET_LANES
#undef MOTET_LANE_BITS

}  // namespace motet::MOTET_ISA
