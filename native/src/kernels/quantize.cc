// Activations to int8, a scale per group of 32 input features; the greatest value of a group may be wider
// (kernels.h). Up to sixteen groups go together, of one row or of a block of rows, so that what is one number of a group is a lane of a
// vector.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Below this a quotient of denormals is too coarse to be trusted to stay in range.
static constexpr float kSmallestScale = 0x1p-126f;
// How far ahead a block asks for its rows, which are sixteen streams.
static constexpr int64_t kPrefetchFloats = 4 * kActivationGroup;
static constexpr int32_t kGreatestFinite = 0x7f7fffff;  // the bits of the greatest finite magnitude

MOTET_INLINE i32x16 magnitude(const float* x) { return as_i32(abs(load(x))); }

// What up to sixteen groups say of themselves, a lane each.
struct GroupScales {
  i32x16 peak;         // where the greatest is, 0 to 31
  f32x16 at_peak;      // and what
  f32x16 scale;
  f32x16 factors;      // 1 / scale
  i32x16 keeps;        // 0 where all integers are 0: nothing but zeros, or no number
};

// `count` groups, one after the other.
// Magnitudes are compared as integers, which order them as floats do, infinity and NaN above all others.
MOTET_INLINE GroupScales scales_of(const float* x, int count) {
  alignas(64) int32_t greatest[16], peak[16];
  alignas(64) uint16_t places[16][2];  // of the first and of the second sixteen: a bit for each that is the greatest
  alignas(64) float at_peak[16];
  i32x16 of_group[16];
  for (int g = 0; g < count; ++g) of_group[g] = max(magnitude(x + kActivationGroup * g), magnitude(x + kActivationGroup * g + 16));
  for (int g = count; g < 16; ++g) {
    of_group[g] = i32_zero();
    places[g][0] = places[g][1] = 0;
    at_peak[g] = 0;
  }
  const i32x16 first = reduce_max(of_group);
  store_i32(greatest, first);
  for (int g = 0; g < count; ++g) {
    const float* const from = x + kActivationGroup * g;
    const i32x16 all = i32_set1(greatest[g]), a0 = magnitude(from), a1 = magnitude(from + 16);
    const mask16 at0 = a0 == all, at1 = a1 == all;
    places[g][0] = static_cast<uint16_t>(bits(at0));
    places[g][1] = static_cast<uint16_t>(bits(at1));
    of_group[g] = max(select(at0, i32_zero(), a0), select(at1, i32_zero(), a1));
  }
  // The first place is the exponent of the lowest bit as a float.
  __builtin_memcpy(peak, places, sizeof peak);
  const i32x16 where = load_i32(peak), exponent = shift_right<23>(as_i32(to_f32(where & (i32_zero() - where)))) & i32_set1(255);
  const i32x16 place = max(exponent - i32_set1(127), i32_zero());
  store_i32(peak, place);
  for (int g = 0; g < count; ++g) at_peak[g] = x[kActivationGroup * g + peak[g]];
  // Where two values are the greatest, so is the second.
  const i32x16 rest = reduce_max(of_group), second = select((where & (where - i32_set1(1))) == i32_zero(), rest, first);
  const f32x16 wanted = max(as_f32(second) / f32_set1(127.0f), as_f32(first) / f32_set1(kPeakMax));
  const f32x16 finite = select(wanted >= f32_set1(kSmallestScale), wanted, f32_zero());
  const f32x16 scale = select(first > i32_set1(kGreatestFinite), f32_set1(__builtin_nanf("")), finite);
  const mask16 is_used = scale > f32_zero();
  return {place, load(at_peak), scale, f32_set1(1.0f) / select(is_used, scale, f32_set1(1.0f)), select(is_used, i32_set1(-1), i32_zero())};
}

// The peaks' integers in their parts: n = low + 128 · h, 128 · h = 16 · m + 2048 · t; m and t at their places among four.
struct Peaks {
  i32x16 n, low, chunks, middles, highs;
};
MOTET_INLINE Peaks peaks_of(const GroupScales& groups) {
  const i32x16 n = to_i32(groups.at_peak * groups.factors) & groups.keeps;
  const i32x16 h = shift_right<kHighShift>(n + i32_set1(1 << (kHighShift - 1)));
  const i32x16 t = shift_right<4>(h + i32_set1(8));
  const i32x16 m = shift_left<3>(h - shift_left<4>(t));
  const i32x16 lane = groups.peak & i32_set1(3), byte = i32_set1(255);
  const i32x16 factor = select(lane == i32_zero(), i32_set1(1), select(lane == i32_set1(1), i32_set1(1 << 8),
                               select(lane == i32_set1(2), i32_set1(1 << 16), i32_set1(1 << 24))));
  return {n, n - shift_left<kHighShift>(h), shift_right<2>(groups.peak), (m & byte) * factor, (t & byte) * factor};
}

// Where the low parts are not all that a group has: the middle one in its place.
MOTET_INLINE void put_middle([[maybe_unused]] int8_t* to, [[maybe_unused]] int chunk, [[maybe_unused]] const int32_t* middle) {
  if constexpr (kQBytes > kActivationGroup) {
    __builtin_memset(to + kActivationGroup, 0, kActivationGroup);
    __builtin_memcpy(to + kActivationGroup + 4 * chunk, middle, 4);
  }
}

// `count` neighbouring groups of one row: the place of the first is `at`, those of the others `height` apart.
MOTET_INLINE void quantize_groups(const QuantizedRows& out, const float* x, int count, int64_t at, int64_t height) {
  const GroupScales groups = scales_of(x, count);
  const Peaks peaks = peaks_of(groups);
  alignas(64) int32_t used[16], peak[16], low[16], sums8[16], first_sums8[16], chunks[16], middles[16], highs[16];
  alignas(64) float factors[16], scales[16], offsets[16];
  store(factors, groups.factors);
  store_i32(used, groups.keeps);
  i32x16 n[2][16];  // the first and the second sixteen integers of each
  for (int g = 0; g < count; ++g) {
    const f32x16 factor = f32_set1(factors[g]);
    const i32x16 keep = i32_set1(used[g]);
    n[0][g] = to_i32(load(x + kActivationGroup * g) * factor) & keep;
    n[1][g] = to_i32(load(x + kActivationGroup * g + 16) * factor) & keep;
  }
  for (int g = count; g < 16; ++g) n[0][g] = n[1][g] = i32_zero();
  const i32x16 first_sum = reduce_add(n[0]), sum = first_sum + reduce_add(n[1]);
  store_i32(peak, groups.peak);
  store_i32(low, peaks.low);
  store_i32(chunks, peaks.chunks);
  store_i32(middles, peaks.middles);
  store_i32(highs, peaks.highs);
  store_i32(sums8, i32_zero() - shift_left<3>(sum));
  store_i32(first_sums8, i32_zero() - shift_left<3>(first_sum));
  store(scales, groups.scale);
  store(offsets, groups.scale * to_f32(sum));
  for (int g = 0; g < count; ++g, at += height) {
    int8_t* const to = out.q + at * kQBytes;
    store_s8(to, n[0][g]);
    store_s8(to + 16, n[1][g]);
    to[peak[g]] = static_cast<int8_t>(low[g]);
    put_middle(to, chunks[g], middles + g);
    out.scale[at] = scales[g];
    out.offsets[at] = offsets[g];
    out.sums8[at] = sums8[g];
    out.first_sums8[at] = first_sums8[g];
    out.peak_chunks[at] = chunks[g];
    out.peak_middles[at] = middles[g];
    out.peak_highs[at] = highs[g];
  }
}

// The same group of the sixteen rows of a block, whose places follow one another from `at` on.
MOTET_INLINE void quantize_block(const QuantizedRows& out, const float* x, int64_t ldx, int64_t at) {
  // Rows may lie a power of two apart, where the first level of cache has no room for all of them.
  alignas(64) float copy[16 * kActivationGroup];
  for (int g = 0; g < 16; ++g) {
    prefetch(x + g * ldx + kPrefetchFloats);
    prefetch(x + g * ldx + kPrefetchFloats + 16);
    store(copy + kActivationGroup * g, load(x + g * ldx));
    store(copy + kActivationGroup * g + 16, load(x + g * ldx + 16));
  }
  const GroupScales groups = scales_of(copy, 16);
  const Peaks peaks = peaks_of(groups);
  alignas(64) int32_t peak[16], low[16];
  alignas(64) float factors[16];
  store(factors, groups.factors);
  i32x16 sums[8];  // of two rows each: of four neighbours
  for (int g = 0; g < 16; g += 2) {
    const auto integers = [&](int row, int i) { return to_i32(load(copy + kActivationGroup * row + i) * f32_set1(factors[row])); };
    const u8x64 bytes = saturate_s8(integers(g, 0), integers(g, 16), integers(g + 1, 0), integers(g + 1, 16));
    sums[g / 2] = dot4(i32_zero(), bytes_all(1), bytes);
    if constexpr (kQBytes == kActivationGroup) {
      store_bytes(out.q + (at + g) * kQBytes, bytes);
    } else {
      alignas(64) int8_t both[2 * kActivationGroup];
      store_bytes(both, bytes);
      __builtin_memcpy(out.q + (at + g) * kQBytes, both, kActivationGroup);
      __builtin_memcpy(out.q + (at + g + 1) * kQBytes, both + kActivationGroup, kActivationGroup);
    }
  }
  i32x16 first_sum, sum;
  add_fours(first_sum, sum, sums);
  // Peaks took part with what a byte holds of them.
  const i32x16 rest = peaks.n - max(i32_set1(-128), min(i32_set1(127), peaks.n));
  first_sum = (first_sum + select(groups.peak > i32_set1(15), i32_zero(), rest)) & groups.keeps;
  sum = first_sum + ((sum + select(groups.peak > i32_set1(15), rest, i32_zero())) & groups.keeps);
  store_i32(peak, groups.peak);
  store_i32(low, peaks.low);
  store(out.scale + at, groups.scale);
  store(out.offsets + at, groups.scale * to_f32(sum));
  store_i32(out.sums8 + at, i32_zero() - shift_left<3>(sum));
  store_i32(out.first_sums8 + at, i32_zero() - shift_left<3>(first_sum));
  store_i32(out.peak_chunks + at, peaks.chunks);
  store_i32(out.peak_middles + at, peaks.middles);
  store_i32(out.peak_highs + at, peaks.highs);
  const uint32_t unused = bits(groups.keeps == i32_zero());
  for (int g = 0; g < 16; ++g) {
    int8_t* const to = out.q + (at + g) * kQBytes;
    if (__builtin_expect(unused >> g & 1, 0)) __builtin_memset(to, 0, kActivationGroup);
    to[peak[g]] = static_cast<int8_t>(low[g]);
    put_middle(to, peak[g] / 4, out.peak_middles + at + g);
  }
}

void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end, int group_begin, int group_end) {
  static_assert(kRowBlock == 16);
  for (int64_t r = row_begin; r < row_end;) {
    const bool is_block = r % kRowBlock == 0 && row_end - r >= kRowBlock;
    for (int g = group_begin; g < group_end; g += is_block ? 1 : 16) {
      const float* const from = x + r * ldx + int64_t{g} * kActivationGroup;
      if (is_block) quantize_block(out, from, ldx, out.at(r, g));
      else quantize_groups(out, from, group_end - g < 16 ? group_end - g : 16, out.at(r, g), out.block_rows(r));
    }
    r += is_block ? kRowBlock : 1;
  }
}

}  // namespace motet::MOTET_ISA
