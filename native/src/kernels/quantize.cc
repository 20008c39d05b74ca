// Activations to int8, a scale per group of 32 input features; the greatest value of a group may be wider
// (kernels.h).
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Below this a quotient of denormals is too coarse to be trusted to stay in range.
static constexpr float kSmallestScale = 0x1p-126f;

struct Group {
  float scale;
  int peak;  // place of the greatest magnitude
};

alignas(64) static constexpr int32_t kPlaces[kActivationGroup] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

MOTET_INLINE Group measure(f32x16 x0, f32x16 x1) {
  const bool finite = bits((x0 - x0 == f32_zero()) & (x1 - x1 == f32_zero())) == 0xffff;
  if (!finite) return {__builtin_nanf(""), 0};
  const f32x16 a0 = abs(x0), a1 = abs(x1);
  const float greatest = reduce_max(max(a0, a1));
  const uint32_t places = bits(a0 == f32_set1(greatest)) | bits(a1 == f32_set1(greatest)) << 16;
  const int peak = __builtin_ctz(places);
  const i32x16 at = i32_set1(peak);
  const f32x16 others0 = select(load_i32(kPlaces) == at, f32_zero(), a0);
  const f32x16 others1 = select(load_i32(kPlaces + 16) == at, f32_zero(), a1);
  const float second = reduce_max(max(others0, others1));
  const float narrow = second / 127.0f, wide = greatest / kPeakMax;
  const float scale = narrow > wide ? narrow : wide;
  return {scale >= kSmallestScale ? scale : 0.0f, peak};
}

void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end) {
  const int64_t groups = out.k / kActivationGroup;
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = x + r * ldx + g * kActivationGroup;
      const f32x16 x0 = load(from);
      const f32x16 x1 = load(from + 16);
      const Group group = measure(x0, x1);
      i32x16 n0 = i32_zero(), n1 = i32_zero();
      if (group.scale > 0) {
        const f32x16 inverse = f32_set1(1.0f / group.scale);
        n0 = to_i32(x0 * inverse);
        n1 = to_i32(x1 * inverse);
      }
      int32_t n[kActivationGroup];
      store_i32(n, n0);
      store_i32(n + 16, n1);
      const int64_t at = out.at(r, g);
      int8_t* to = out.q + at * 2 * kActivationGroup;
      store_s8(to, n0);
      store_s8(to + 16, n1);
      store_s8(to + 32, i32_zero());
      store_s8(to + 48, i32_zero());
      const int32_t high = (n[group.peak] + (1 << (kHighShift - 1))) >> kHighShift;
      const int32_t top = (high + 8) >> 4;
      to[group.peak] = static_cast<int8_t>(n[group.peak] - high * (1 << kHighShift));
      to[kActivationGroup + group.peak] = static_cast<int8_t>(8 * (high - 16 * top));
      const int32_t sum0 = reduce_add(n0), sum1 = reduce_add(n1);
      out.scale[at] = group.scale;
      out.offsets[at] = group.scale * static_cast<float>(sum0 + sum1);
      out.sums[at * 2] = sum0;
      out.sums[at * 2 + 1] = sum1;
      out.peak_chunks[at] = group.peak / 4;
      out.peak_highs[at] = static_cast<int32_t>(static_cast<uint32_t>(top & 0xff) << (8 * (group.peak % 4)));
    }
  }
}

}  // namespace motet::MOTET_ISA
