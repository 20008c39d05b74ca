// y = x / √(mean(x²) + eps) · weight, row by row (Zhang & Sennrich, 2019).
// The sum of squares runs over 16 lanes × kSums accumulators in an order fixed by n alone, and the root and the
// division are exact, so that every instruction set and every batch gives the same bits.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

namespace {

constexpr int kSums = 4;  // independent chains: the latency of a fused multiply-add is hidden

float sum_of_squares(const float* x, int n) {
  f32x16 sums[kSums] = {f32_zero(), f32_zero(), f32_zero(), f32_zero()};
  int i = 0;
  for (; i + 16 * kSums <= n; i += 16 * kSums) {
    for (int j = 0; j < kSums; ++j) {
      const f32x16 v = load(x + i + 16 * j);
      sums[j] = fma(v, v, sums[j]);
    }
  }
  for (int j = 0; i < n; ++j, i += 16) {
    const f32x16 v = n - i < 16 ? load_n(x + i, n - i) : load(x + i);
    sums[j] = fma(v, v, sums[j]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

void rmsnorm(float* y, int64_t ldy, const float* x, int64_t ldx, const float* weight, int num_rows, int n, float eps) {
  for (int r = 0; r < num_rows; ++r) {
    const float* x_row = x + r * ldx;
    float* y_row = y + r * ldy;
    const float mean = sum_of_squares(x_row, n) / static_cast<float>(n);
    const f32x16 factor = f32_set1(1.0f / __builtin_sqrtf(mean + eps));
    int i = 0;
    for (; i + 16 <= n; i += 16) store(y_row + i, load(x_row + i) * factor * load(weight + i));
    if (i < n) store_n(y_row + i, load_n(x_row + i, n - i) * factor * load_n(weight + i, n - i), n - i);
  }
}

}  // namespace motet::MOTET_ISA
