// Activations to int8, a scale per group of 32 input features; the greatest value of a group may be wider
// (kernels.h). Up to sixteen groups go together, so that what is one number of a group is a lane of a vector.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Below this a quotient of denormals is too coarse to be trusted to stay in range.
static constexpr float kSmallestScale = 0x1p-126f;
static constexpr int32_t kGreatestFinite = 0x7f7fffff;  // the bits of the greatest finite magnitude

MOTET_INLINE i32x16 magnitude(const float* x) { return as_i32(abs(load(x))); }

// `count` neighbouring groups of one row: the place of the first is `at`, those of the others `height` apart.
// Magnitudes are compared as integers, which order them as floats do, infinity and NaN above all others.
MOTET_INLINE void quantize_groups(const QuantizedRows& out, const float* x, int count, int64_t at, int64_t height) {
  alignas(64) int32_t greatest[16], places[16], used[16], peak[16], low_byte[16], sums8[16], first_sums8[16], middles[16], highs[16];
  alignas(64) float inverse[16], at_peak[16], scales[16], offsets[16];
  i32x16 of_group[16], n[2][16];  // n: the first and the second sixteen integers of each
  for (int g = 0; g < count; ++g) of_group[g] = max(magnitude(x + 32 * g), magnitude(x + 32 * g + 16));
  for (int g = count; g < 16; ++g) {
    of_group[g] = n[0][g] = n[1][g] = i32_zero();
    places[g] = peak[g] = 0;
    at_peak[g] = 0;
  }
  const i32x16 first = reduce_max(of_group);
  store_i32(greatest, first);
  for (int g = 0; g < count; ++g) {
    const float* const from = x + 32 * g;
    const i32x16 all = i32_set1(greatest[g]), a0 = magnitude(from), a1 = magnitude(from + 16);
    const mask16 at0 = a0 == all, at1 = a1 == all;
    const uint32_t where = bits(at0) | bits(at1) << 16;
    places[g] = static_cast<int32_t>(where);
    peak[g] = __builtin_ctz(where);
    at_peak[g] = from[peak[g]];
    of_group[g] = max(select(at0, i32_zero(), a0), select(at1, i32_zero(), a1));
  }
  // Where two values are the greatest, so is the second.
  const i32x16 where = load_i32(places);
  const i32x16 rest = reduce_max(of_group), second = select((where & (where - i32_set1(1))) == i32_zero(), rest, first);
  const f32x16 wanted = max(as_f32(second) / f32_set1(127.0f), as_f32(first) / f32_set1(kPeakMax));
  const f32x16 finite = select(wanted >= f32_set1(kSmallestScale), wanted, f32_zero());
  const f32x16 scale = select(first > i32_set1(kGreatestFinite), f32_set1(__builtin_nanf("")), finite);
  const mask16 is_used = scale > f32_zero();
  const f32x16 factors = f32_set1(1.0f) / select(is_used, scale, f32_set1(1.0f));
  const i32x16 keeps = select(is_used, i32_set1(-1), i32_zero());
  store(inverse, factors);
  store_i32(used, keeps);

  for (int g = 0; g < count; ++g) {
    const f32x16 factor = f32_set1(inverse[g]);
    const i32x16 keep = i32_set1(used[g]);
    n[0][g] = to_i32(load(x + 32 * g) * factor) & keep;
    n[1][g] = to_i32(load(x + 32 * g + 16) * factor) & keep;
  }
  const i32x16 first_sum = reduce_add(n[0]), sum = first_sum + reduce_add(n[1]);

  // The peaks' integers in their parts: n = low + 128 · h, 128 · h = 16 · m + 2048 · t.
  const i32x16 n_peak = to_i32(load(at_peak) * factors) & keeps;
  const i32x16 h = shift_right<kHighShift>(n_peak + i32_set1(1 << (kHighShift - 1)));
  const i32x16 t = shift_right<4>(h + i32_set1(8));
  const i32x16 m = shift_left<3>(h - shift_left<4>(t));
  const i32x16 peaks = load_i32(peak), lane = peaks & i32_set1(3);
  const i32x16 word_factor = select(lane == i32_zero(), i32_set1(1), select(lane == i32_set1(1), i32_set1(1 << 8),
                                    select(lane == i32_set1(2), i32_set1(1 << 16), i32_set1(1 << 24))));
  const i32x16 byte = i32_set1(255);
  store_i32(low_byte, n_peak - shift_left<kHighShift>(h));
  store_i32(middles, (m & byte) * word_factor);
  store_i32(highs, (t & byte) * word_factor);
  store_i32(sums8, i32_zero() - shift_left<3>(sum));
  store_i32(first_sums8, i32_zero() - shift_left<3>(first_sum));
  store(scales, scale);
  store(offsets, scale * to_f32(sum));
  for (int g = 0; g < count; ++g, at += height) {
    int8_t* const to = out.q + at * kQBytes;
    const int chunk = peak[g] / 4;
    store_s8(to, n[0][g]);
    store_s8(to + 16, n[1][g]);
    to[peak[g]] = static_cast<int8_t>(low_byte[g]);
    if constexpr (kQBytes > kActivationGroup) {
      store_s8(to + kActivationGroup, i32_zero());
      store_s8(to + kActivationGroup + 16, i32_zero());
      __builtin_memcpy(to + kActivationGroup + 4 * chunk, &middles[g], 4);
    }
    out.scale[at] = scales[g];
    out.offsets[at] = offsets[g];
    out.sums8[at] = sums8[g];
    out.first_sums8[at] = first_sums8[g];
    out.peak_chunks[at] = chunk;
    out.peak_middles[at] = middles[g];
    out.peak_highs[at] = highs[g];
  }
}

void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end, int group_begin, int group_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int g = group_begin; g < group_end; g += 16)
      quantize_groups(out, x + r * ldx + int64_t{g} * kActivationGroup, group_end - g < 16 ? group_end - g : 16, out.at(r, g), out.block_rows(r));
  }
}

}  // namespace motet::MOTET_ISA
