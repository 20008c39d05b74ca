// Activations to int8, a scale per group of 32 input features.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// The scale of a group, or 0 where it is too small to divide by; NaN where a value is not finite, so that it shows.
static float group_scale(f32x16 x0, f32x16 x1) {
  const float scale = reduce_max(max(abs(x0), abs(x1))) / 127.0f;
  const bool finite = bits((x0 - x0 == f32_zero()) & (x1 - x1 == f32_zero())) == 0xffff;
  if (!finite) return __builtin_nanf("");
  return scale >= 0x1p-126f ? scale : 0.0f;
}

void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int num_rows) {
  const int64_t k = out.k;
  const int64_t groups = k / kActivationGroup;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = x + r * ldx + g * kActivationGroup;
      const f32x16 x0 = load(from);
      const f32x16 x1 = load(from + 16);
      const float scale = group_scale(x0, x1);
      i32x16 q0 = i32_zero(), q1 = i32_zero();
      if (scale > 0) {
        q0 = to_i32(x0 / f32_set1(scale));
        q1 = to_i32(x1 / f32_set1(scale));
      }
      int8_t* to = out.q + r * k + g * kActivationGroup;
      store_s8(to, q0);
      store_s8(to + 16, q1);
      out.scale[r * groups + g] = scale;
      out.sums[(r * groups + g) * 2] = reduce_add(q0);
      out.sums[(r * groups + g) * 2 + 1] = reduce_add(q1);
    }
  }
}

}  // namespace motet::MOTET_ISA
