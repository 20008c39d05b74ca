// The backend of simd.h for AVX-512 (F, BW, DQ, VL, VNNI): one 512-bit register a value.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace motet::MOTET_ISA {

struct f32x16 {
  __m512 v;
};
struct i32x16 {
  __m512i v;
};
struct u8x64 {
  __m512i v;
};
struct mask16 {
  __mmask16 v;
};

MOTET_INLINE mask16 first_n(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
MOTET_INLINE uint32_t bits(mask16 m) { return m.v; }
MOTET_INLINE mask16 operator&(mask16 a, mask16 b) { return {static_cast<__mmask16>(a.v & b.v)}; }
MOTET_INLINE mask16 operator|(mask16 a, mask16 b) { return {static_cast<__mmask16>(a.v | b.v)}; }

MOTET_INLINE f32x16 f32_zero() { return {_mm512_setzero_ps()}; }
MOTET_INLINE f32x16 f32_set1(float x) { return {_mm512_set1_ps(x)}; }
MOTET_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
MOTET_INLINE f32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_n(n).v, p)}; }
MOTET_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
MOTET_INLINE void store_n(float* p, f32x16 a, int n) { _mm512_mask_storeu_ps(p, first_n(n).v, a.v); }

MOTET_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
MOTET_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
MOTET_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
MOTET_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
MOTET_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MOTET_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
MOTET_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
MOTET_INLINE f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
MOTET_INLINE f32x16 sqrt(f32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
MOTET_INLINE f32x16 round_even(f32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MOTET_INLINE mask16 operator<(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
MOTET_INLINE mask16 operator<=(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
MOTET_INLINE mask16 operator>(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
MOTET_INLINE mask16 operator>=(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
MOTET_INLINE mask16 operator==(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
MOTET_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }

MOTET_INLINE i32x16 i32_zero() { return {_mm512_setzero_si512()}; }
MOTET_INLINE i32x16 i32_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
MOTET_INLINE i32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
MOTET_INLINE void store_i32(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
MOTET_INLINE i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
MOTET_INLINE i32x16 operator-(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
MOTET_INLINE i32x16 operator*(i32x16 a, i32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
MOTET_INLINE i32x16 operator&(i32x16 a, i32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
MOTET_INLINE i32x16 operator|(i32x16 a, i32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
MOTET_INLINE i32x16 operator^(i32x16 a, i32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int kBits>
MOTET_INLINE i32x16 shift_left(i32x16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
MOTET_INLINE i32x16 shift_right(i32x16 a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
MOTET_INLINE i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
MOTET_INLINE i32x16 min(i32x16 a, i32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
MOTET_INLINE mask16 operator>(i32x16 a, i32x16 b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
MOTET_INLINE mask16 operator==(i32x16 a, i32x16 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
MOTET_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

MOTET_INLINE f32x16 to_f32(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
MOTET_INLINE i32x16 to_i32(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
MOTET_INLINE f32x16 as_f32(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
MOTET_INLINE i32x16 as_i32(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
MOTET_INLINE i32x16 load_u8(const void* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
MOTET_INLINE i32x16 load_s8(const void* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
MOTET_INLINE void store_s8(void* p, i32x16 a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

MOTET_INLINE f32x16 load_f16(const void* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
MOTET_INLINE f32x16 load_bf16(const void* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
MOTET_INLINE void store_f16(void* p, f32x16 a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MOTET_INLINE void store_bf16(void* p, f32x16 a) {  // not vcvtneps2bf16, which flushes denormals
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}

MOTET_INLINE float reduce_add(f32x16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
MOTET_INLINE float reduce_max(f32x16 a) {
  const __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}
MOTET_INLINE int32_t reduce_add(i32x16 a) { return _mm512_reduce_add_epi32(a.v); }

// A tree over sixteen vectors: every level halves what is left of each, and puts two into one.
template <typename Function>
MOTET_INLINE i32x16 reduce_each(const i32x16 (&v)[16], Function&& f) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = v[4 * i].v, b = v[4 * i + 1].v, c = v[4 * i + 2].v, d = v[4 * i + 3].v;
    const __m512i ab = f(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = f(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    four[i] = f(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));  // a, b, c, d of each quarter
  }
  const auto halve = [&](__m512i a, __m512i b) __attribute__((always_inline)) {
    return f(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return {halve(halve(four[0], four[1]), halve(four[2], four[3]))};
}
MOTET_INLINE i32x16 reduce_max(const i32x16 (&v)[16]) {
  return reduce_each(v, [](__m512i a, __m512i b) __attribute__((always_inline)) { return _mm512_max_epi32(a, b); });
}
MOTET_INLINE i32x16 reduce_add(const i32x16 (&v)[16]) {
  return reduce_each(v, [](__m512i a, __m512i b) __attribute__((always_inline)) { return _mm512_add_epi32(a, b); });
}

MOTET_INLINE void add_fours(i32x16& even, i32x16& odd, const i32x16 (&v)[8]) {
  __m512i four[2];  // in quarter q: sum q of vectors 0, 1, 2, 3
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const i32x16* const w = v + 4 * i;
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(w[0].v, w[1].v), _mm512_unpackhi_epi32(w[0].v, w[1].v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(w[2].v, w[3].v), _mm512_unpackhi_epi32(w[2].v, w[3].v));
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  const __m512i of_even = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  even = {_mm512_permutex2var_epi32(four[0], of_even, four[1])};
  odd = {_mm512_permutex2var_epi32(four[0], _mm512_add_epi32(of_even, _mm512_set1_epi32(4)), four[1])};
}

MOTET_INLINE u8x64 saturate_s8(i32x16 a, i32x16 b, i32x16 c, i32x16 d) {
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));  // four of each in every quarter
  return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes)};
}

MOTET_INLINE u8x64 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
MOTET_INLINE void store_bytes(void* p, u8x64 a) { _mm512_storeu_si512(p, a.v); }
MOTET_INLINE u8x64 bytes_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
MOTET_INLINE u8x64 low_nibbles(u8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
MOTET_INLINE u8x64 high_nibbles(u8x64 a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
// Either of them, without a branch.
MOTET_INLINE u8x64 nibbles(u8x64 a, bool is_high) {
  return low_nibbles({_mm512_srl_epi16(a.v, _mm_cvtsi32_si128(is_high ? 4 : 0))});
}
MOTET_INLINE u8x64 bytes_all(int byte) { return {_mm512_set1_epi8(static_cast<char>(byte))}; }
MOTET_INLINE u8x64 subtract_bytes(u8x64 a, u8x64 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
MOTET_INLINE u8x64 times16(u8x64 a) {
  return {_mm512_and_si512(_mm512_slli_epi16(a.v, 4), _mm512_set1_epi8(-16))};
}
// As assembly: round the intrinsic gcc 12 adds register moves and spills in loops with many accumulators.
MOTET_INLINE i32x16 dot4(i32x16 acc, u8x64 u, u8x64 s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
  return acc;
}
MOTET_INLINE i32x16 dot4_u7(i32x16 acc, u8x64 u, u8x64 s) { return dot4(acc, u, s); }

}  // namespace motet::MOTET_ISA
