// The backend of simd.h for AVX2 with FMA and F16C: two 256-bit registers a value, lanes 0–7 in `a`, 8–15 in
// `b`.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace motet::MOTET_ISA {

struct f32x16 {
  __m256 a, b;
};
struct i32x16 {
  __m256i a, b;
};
struct u8x64 {
  __m256i a, b;
};
struct mask16 {
  __m256 a, b;
};  // all ones or all zeros per lane

MOTET_INLINE mask16 first_n(int n) {
  const __m256i count = _mm256_set1_epi32(n);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)))};
}
MOTET_INLINE uint32_t bits(mask16 m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.a)) | static_cast<uint32_t>(_mm256_movemask_ps(m.b)) << 8;
}
MOTET_INLINE mask16 operator&(mask16 x, mask16 y) {
  return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)};
}
MOTET_INLINE mask16 operator|(mask16 x, mask16 y) { return {_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)}; }

MOTET_INLINE f32x16 f32_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MOTET_INLINE f32x16 f32_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MOTET_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MOTET_INLINE f32x16 load_n(const float* p, int n) {
  const mask16 m = first_n(n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.a)),
          _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b))};
}
MOTET_INLINE void store(float* p, f32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
MOTET_INLINE void store_n(float* p, f32x16 x, int n) {
  const mask16 m = first_n(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
}

MOTET_INLINE f32x16 operator+(f32x16 x, f32x16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
MOTET_INLINE f32x16 operator-(f32x16 x, f32x16 y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
MOTET_INLINE f32x16 operator*(f32x16 x, f32x16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
MOTET_INLINE f32x16 operator/(f32x16 x, f32x16 y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
MOTET_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
MOTET_INLINE f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
MOTET_INLINE f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
MOTET_INLINE f32x16 abs(f32x16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
MOTET_INLINE f32x16 sqrt(f32x16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
MOTET_INLINE f32x16 round_even(f32x16 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
template <int kCompare>
MOTET_INLINE mask16 compare(f32x16 x, f32x16 y) {
  return {_mm256_cmp_ps(x.a, y.a, kCompare), _mm256_cmp_ps(x.b, y.b, kCompare)};
}
MOTET_INLINE mask16 operator<(f32x16 x, f32x16 y) { return compare<_CMP_LT_OQ>(x, y); }
MOTET_INLINE mask16 operator<=(f32x16 x, f32x16 y) { return compare<_CMP_LE_OQ>(x, y); }
MOTET_INLINE mask16 operator>(f32x16 x, f32x16 y) { return compare<_CMP_GT_OQ>(x, y); }
MOTET_INLINE mask16 operator>=(f32x16 x, f32x16 y) { return compare<_CMP_GE_OQ>(x, y); }
MOTET_INLINE mask16 operator==(f32x16 x, f32x16 y) { return compare<_CMP_EQ_OQ>(x, y); }
MOTET_INLINE f32x16 select(mask16 m, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}

MOTET_INLINE f32x16 as_f32(i32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
MOTET_INLINE i32x16 as_i32(f32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

MOTET_INLINE i32x16 i32_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
MOTET_INLINE i32x16 i32_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
MOTET_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
MOTET_INLINE i32x16 load_i32(const int32_t* p) { return {load_256(p), load_256(p + 8)}; }
MOTET_INLINE void store_i32(int32_t* p, i32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
MOTET_INLINE i32x16 operator+(i32x16 x, i32x16 y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
MOTET_INLINE i32x16 operator-(i32x16 x, i32x16 y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
MOTET_INLINE i32x16 operator*(i32x16 x, i32x16 y) {
  return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}
MOTET_INLINE i32x16 operator&(i32x16 x, i32x16 y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
MOTET_INLINE i32x16 operator|(i32x16 x, i32x16 y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
MOTET_INLINE i32x16 operator^(i32x16 x, i32x16 y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
template <int kBits>
MOTET_INLINE i32x16 shift_left(i32x16 x) {
  return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
template <int kBits>
MOTET_INLINE i32x16 shift_right(i32x16 x) {
  return {_mm256_srai_epi32(x.a, kBits), _mm256_srai_epi32(x.b, kBits)};
}
MOTET_INLINE i32x16 max(i32x16 x, i32x16 y) {
  return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
MOTET_INLINE i32x16 min(i32x16 x, i32x16 y) {
  return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)};
}
MOTET_INLINE mask16 operator>(i32x16 x, i32x16 y) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(x.a, y.a)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(x.b, y.b))};
}
MOTET_INLINE mask16 operator==(i32x16 x, i32x16 y) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(x.a, y.a)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(x.b, y.b))};
}
MOTET_INLINE i32x16 select(mask16 m, i32x16 x, i32x16 y) { return as_i32(select(m, as_f32(x), as_f32(y))); }

MOTET_INLINE f32x16 to_f32(i32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
MOTET_INLINE i32x16 to_i32(f32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
MOTET_INLINE i32x16 load_u8(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x))};
}
MOTET_INLINE i32x16 load_s8(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x))};
}
// The low 16 bits of each lane, in lane order; the values must fit u16.
MOTET_INLINE __m256i narrow_u16(i32x16 x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
MOTET_INLINE void store_s8(void* p, i32x16 x) {
  const __m256i words = narrow_u16(x & i32_set1(255));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

MOTET_INLINE f32x16 load_f16(const void* p) {
  const __m128i* h = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
MOTET_INLINE f32x16 load_bf16(const void* p) {
  const __m128i* h = static_cast<const __m128i*>(p);
  return as_f32(shift_left<16>(
      i32x16{_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), _mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1))}));
}
MOTET_INLINE void store_f16(void* p, f32x16 x) {
  __m128i* h = static_cast<__m128i*>(p);
  _mm_storeu_si128(h, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(h + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MOTET_INLINE void store_bf16(void* p, f32x16 x) {
  const i32x16 u = as_i32(x);
  const i32x16 odd = shift_right<16>(u) & i32_set1(1);
  const i32x16 value = select(x == x, u + (odd + i32_set1(0x7fff)), u | i32_set1(0x400000));
  const i32x16 high = shift_right<16>(value) & i32_set1(0xffff);
  _mm256_storeu_si256(static_cast<__m256i*>(p), narrow_u16(high));
}

MOTET_INLINE float reduce_add(f32x16 x) {
  const __m256 s8 = _mm256_add_ps(x.a, x.b);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
MOTET_INLINE float reduce_max(f32x16 x) {
  const __m256 s8 = _mm256_max_ps(x.a, x.b);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}
MOTET_INLINE int32_t reduce_add(i32x16 x) {
  const __m256i s8 = _mm256_add_epi32(x.a, x.b);
  const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_add_epi32(s4, _mm_unpackhi_epi64(s4, s4));
  return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 1)));
}

// A tree over eight vectors: every level halves what is left of each, and puts two into one.
template <typename Function>
MOTET_INLINE __m256i reduce_eight(const i32x16* v, Function&& f) {
  __m256i four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const i32x16* const w = v + 4 * i;
    const __m256i a = f(w[0].a, w[0].b), b = f(w[1].a, w[1].b), c = f(w[2].a, w[2].b), d = f(w[3].a, w[3].b);
    const __m256i ab = f(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const __m256i cd = f(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    four[i] = f(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));  // a, b, c, d of each half
  }
  return f(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
}
template <typename Function>
MOTET_INLINE i32x16 reduce_each(const i32x16 (&v)[16], Function&& f) {
  return {reduce_eight(v, f), reduce_eight(v + 8, f)};
}
MOTET_INLINE i32x16 reduce_max(const i32x16 (&v)[16]) {
  return reduce_each(v, [](__m256i a, __m256i b) __attribute__((always_inline)) { return _mm256_max_epi32(a, b); });
}
MOTET_INLINE i32x16 reduce_add(const i32x16 (&v)[16]) {
  return reduce_each(v, [](__m256i a, __m256i b) __attribute__((always_inline)) { return _mm256_add_epi32(a, b); });
}

MOTET_INLINE void add_fours(i32x16& even, i32x16& odd, const i32x16 (&v)[8]) {
  __m256i two[4];  // of two vectors each: the even sums, and in the upper half the odd ones
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) two[i] = _mm256_hadd_epi32(_mm256_hadd_epi32(v[2 * i].a, v[2 * i].b), _mm256_hadd_epi32(v[2 * i + 1].a, v[2 * i + 1].b));
  even = {_mm256_permute2x128_si256(two[0], two[1], 0x20), _mm256_permute2x128_si256(two[2], two[3], 0x20)};
  odd = {_mm256_permute2x128_si256(two[0], two[1], 0x31), _mm256_permute2x128_si256(two[2], two[3], 0x31)};
}

// Sixteen bytes of each, in order.
MOTET_INLINE __m256i saturate_s8_half(i32x16 x, i32x16 y) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(x.a, x.b), _mm256_packs_epi32(y.a, y.b));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
MOTET_INLINE u8x64 saturate_s8(i32x16 a, i32x16 b, i32x16 c, i32x16 d) { return {saturate_s8_half(a, b), saturate_s8_half(c, d)}; }

MOTET_INLINE u8x64 load_bytes(const void* p) {
  return {load_256(p), load_256(static_cast<const __m256i*>(p) + 1)};
}
MOTET_INLINE void store_bytes(void* p, u8x64 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.b);
}
MOTET_INLINE u8x64 bytes_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
MOTET_INLINE u8x64 low_nibbles(u8x64 x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
MOTET_INLINE u8x64 high_nibbles(u8x64 x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
// Either of them, without a branch.
MOTET_INLINE u8x64 nibbles(u8x64 x, bool is_high) {
  const __m128i count = _mm_cvtsi32_si128(is_high ? 4 : 0);
  return low_nibbles({_mm256_srl_epi16(x.a, count), _mm256_srl_epi16(x.b, count)});
}
MOTET_INLINE u8x64 bytes_all(int byte) {
  const __m256i all = _mm256_set1_epi8(static_cast<char>(byte));
  return {all, all};
}
MOTET_INLINE u8x64 subtract_bytes(u8x64 x, u8x64 y) {
  return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)};
}
MOTET_INLINE u8x64 times16(u8x64 x) {
  const __m256i mask = _mm256_set1_epi8(-16);
  return {_mm256_and_si256(_mm256_slli_epi16(x.a, 4), mask),
          _mm256_and_si256(_mm256_slli_epi16(x.b, 4), mask)};
}
// vpmaddubsw saturates at 16 bits for u8 above 127, so even and odd bytes are widened and multiplied apart.
MOTET_INLINE __m256i dot4_half(__m256i acc, __m256i u, __m256i s) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#if defined(MOTET_ISA_avxvnni)
MOTET_INLINE i32x16 dot4(i32x16 acc, u8x64 u, u8x64 s) {
  return {_mm256_dpbusd_avx_epi32(acc.a, u.a, s.a), _mm256_dpbusd_avx_epi32(acc.b, u.b, s.b)};
}
MOTET_INLINE i32x16 dot4_u7(i32x16 acc, u8x64 u, u8x64 s) { return dot4(acc, u, s); }
#else
MOTET_INLINE i32x16 dot4(i32x16 acc, u8x64 u, u8x64 s) {
  return {dot4_half(acc.a, u.a, s.a), dot4_half(acc.b, u.b, s.b)};
}
MOTET_INLINE i32x16 dot4_u7(i32x16 acc, u8x64 u, u8x64 s) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(u.a, s.a), ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(u.b, s.b), ones))};
}
#endif

}  // namespace motet::MOTET_ISA
