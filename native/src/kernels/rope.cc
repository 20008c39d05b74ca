// Rotary position embedding in the rotate-half form (Su et al., 2021; the layout of Hugging Face's Llama):
//   x[i]       ← x[i] · cos[p][i] − x[i + D/2] · sin[p][i]
//   x[i + D/2] ← x[i + D/2] · cos[p][i] + x[i] · sin[p][i],   i < D/2
// Two products and one sum each, as the reference rounds them; nothing is fused.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

void rope(float* x, int64_t ldx, int num_heads, int head_dim, const int32_t* positions, int num_rows, const float* cos,
          const float* sin) {
  const int half = head_dim / 2;
  for (int r = 0; r < num_rows; ++r) {
    const float* row_cos = cos + static_cast<int64_t>(positions[r]) * half;
    const float* row_sin = sin + static_cast<int64_t>(positions[r]) * half;
    for (int h = 0; h < num_heads; ++h) {
      float* low = x + r * ldx + static_cast<int64_t>(h) * head_dim;
      float* high = low + half;
      int i = 0;
      for (; i + 16 <= half; i += 16) {
        const f32x16 a = load(low + i), b = load(high + i), c = load(row_cos + i), s = load(row_sin + i);
        store(low + i, a * c - b * s);
        store(high + i, b * c + a * s);
      }
      if (i < half) {
        const int rest = half - i;
        const f32x16 a = load_n(low + i, rest), b = load_n(high + i, rest);
        const f32x16 c = load_n(row_cos + i, rest), s = load_n(row_sin + i, rest);
        store_n(low + i, a * c - b * s, rest);
        store_n(high + i, b * c + a * s, rest);
      }
    }
  }
}

}  // namespace motet::MOTET_ISA
