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

static Group measure(f32x16 x0, f32x16 x1) {
  const bool finite = bits((x0 - x0 == f32_zero()) & (x1 - x1 == f32_zero())) == 0xffff;
  if (!finite) return {__builtin_nanf(""), 0};
  const f32x16 a0 = abs(x0), a1 = abs(x1);
  const float greatest = reduce_max(max(a0, a1));
  const uint32_t places = bits(a0 == f32_set1(greatest)) | bits(a1 == f32_set1(greatest)) << 16;
  const int peak = __builtin_ctz(places);
  float others[kActivationGroup];
  store(others, a0);
  store(others + 16, a1);
  others[peak] = 0;
  const float second = reduce_max(max(load(others), load(others + 16)));
  const float narrow = second / 127.0f, wide = greatest / kPeakMax;
  const float scale = narrow > wide ? narrow : wide;
  return {scale >= kSmallestScale ? scale : 0.0f, peak};
}

void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int num_rows) {
  const int64_t k = out.k;
  const int64_t groups = k / kActivationGroup;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = x + r * ldx + g * kActivationGroup;
      const f32x16 x0 = load(from);
      const f32x16 x1 = load(from + 16);
      const Group group = measure(x0, x1);
      i32x16 n0 = i32_zero(), n1 = i32_zero();
      if (group.scale > 0) {
        n0 = to_i32(x0 / f32_set1(group.scale));
        n1 = to_i32(x1 / f32_set1(group.scale));
      }
      int32_t n[kActivationGroup];
      store_i32(n, n0);
      store_i32(n + 16, n1);
      const int32_t high = (n[group.peak] + (1 << (kPeakShift - 1))) >> kPeakShift;
      int8_t* to = out.q + r * k + g * kActivationGroup;
      store_s8(to, n0);
      store_s8(to + 16, n1);
      to[group.peak] = static_cast<int8_t>(n[group.peak] - high * (1 << kPeakShift));
      const int64_t at = r * groups + g;
      out.scale[at] = group.scale;
      out.sums[at * 2] = reduce_add(n0);
      out.sums[at * 2 + 1] = reduce_add(n1);
      out.peak_words[at] = static_cast<int32_t>(static_cast<uint32_t>(high & 0xff) << (8 * (group.peak % 4)));
      out.peak_chunks[at] = group.peak / 4;
    }
  }
}

}  // namespace motet::MOTET_ISA
