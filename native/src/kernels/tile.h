// A packed tile (weights.h) as the kernels walk it: its parts, and its weights as sixteen columns at a time.
#pragma once
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// The parts of one tile of a quantised format with K input features. All is known at compile time but K.
template <WeightFormat kFormat>
struct Tile {
  static constexpr FormatInfo kInfo = format_info(kFormat);
  static constexpr int kGroupBytes = kInfo.group_size * kTileColumns * kInfo.bits / 8;
  static constexpr int kScaleStride = kTileColumns * kInfo.scale_bytes;  // bytes of a group's scales

  const uint8_t* scales;
  const uint8_t* mins;
  const uint8_t* quants;

  MOTET_INLINE static int64_t header_bytes(int64_t k) {
    const int64_t one = k / kInfo.group_size * kScaleStride;
    return (one * (kInfo.has_min ? 2 : 1) + 63) / 64 * 64;
  }
  MOTET_INLINE static int64_t bytes(int64_t k) {
    return header_bytes(k) + k / kInfo.group_size * kGroupBytes;
  }

  MOTET_INLINE Tile(const uint8_t* tile, int64_t k)
      : scales(tile), mins(tile + k / kInfo.group_size * kScaleStride), quants(tile + header_bytes(k)) {}

  MOTET_INLINE f32x16 scale(int64_t g) const { return load_header(scales + g * kScaleStride); }
  MOTET_INLINE f32x16 min(int64_t g) const {
    if constexpr (kInfo.has_min) return load_header(mins + g * kScaleStride);
    return f32_zero();
  }
  MOTET_INLINE const uint8_t* group(int64_t g) const { return quants + g * kGroupBytes; }

  // What a group's step of a walk through tiles counts for: its part of the header too.
  static constexpr int kStepBytes = kGroupBytes + kScaleStride * (kInfo.has_min ? 2 : 1);

  // Asks for what lies `ahead` bytes from group g. Over a walk through neighbours it asks for every line.
  MOTET_INLINE void ask_ahead(int64_t g, int64_t ahead) const {
    const uint8_t* const p = quants + ahead + g * kStepBytes;
#pragma GCC unroll 16
    for (int c = 0; c < (kStepBytes + 63) / 64; ++c) prefetch(p + 64 * c);
  }

  // Asks, for the second level of cache, for part kPart of kParts of what group g counts for of kNum tiles, neighbours that begin at
  // `tiles`. Over all groups and parts that is every line.
  template <int kPart, int kParts, int kNum>
  MOTET_INLINE static void ask_part(const uint8_t* tiles, int64_t g) {
    const uint8_t* const p = tiles + g * kNum * kStepBytes;
#pragma GCC unroll 32
    for (int c = kPart; c < (kNum * kStepBytes + 63) / 64; c += kParts) prefetch_l2(p + 64 * c);
  }

 private:
  MOTET_INLINE static f32x16 load_header(const uint8_t* p) {
    if constexpr (kInfo.scale_bytes == 2) return load_f16(p);
    return load(reinterpret_cast<const float*>(p));
  }
};

// Writes w[k][16] in f32 for one group of a quantised tile: fma(f32(q − zero), scale, min).
template <WeightFormat kFormat>
MOTET_INLINE void dequantize_group(float* out, const Tile<kFormat>& tile, int64_t g) {
  constexpr FormatInfo kInfo = Tile<kFormat>::kInfo;
  const f32x16 scale = tile.scale(g), min = tile.min(g);
  const i32x16 zero = i32_set1(kInfo.zero), mask = i32_set1(kInfo.bits == 4 ? 15 : 255);
  const auto put = [&](int k, i32x16 q) __attribute__((always_inline)) {
    store(out + k * kTileColumns, fma(to_f32((q & mask) - zero), scale, min));
  };
  const int32_t* words = reinterpret_cast<const int32_t*>(tile.group(g));  // byte 4n + j: column n
  for (int c = 0; c < Tile<kFormat>::kGroupBytes / 64; ++c) {
    const i32x16 word = load_i32(words + 16 * c);
    put(4 * c + 0, word);
    put(4 * c + 1, shift_right<8>(word));
    put(4 * c + 2, shift_right<16>(word));
    put(4 * c + 3, shift_right<24>(word));
    if constexpr (kInfo.bits == 4) {
      put(4 * c + 16, shift_right<4>(word));
      put(4 * c + 17, shift_right<12>(word));
      put(4 * c + 18, shift_right<20>(word));
      put(4 * c + 19, shift_right<28>(word));
    }
  }
}

// Calls f with the weight format as a template argument.
template <typename Function>
MOTET_INLINE void dispatch_format(WeightFormat format, Function&& f) {
  switch (format) {
    case WeightFormat::kF32:
      return f.template operator()<WeightFormat::kF32>();
    case WeightFormat::kF16:
      return f.template operator()<WeightFormat::kF16>();
    case WeightFormat::kBF16:
      return f.template operator()<WeightFormat::kBF16>();
    case WeightFormat::kInt4:
      return f.template operator()<WeightFormat::kInt4>();
    case WeightFormat::kInt4Min:
      return f.template operator()<WeightFormat::kInt4Min>();
    case WeightFormat::kInt4MinF32:
      return f.template operator()<WeightFormat::kInt4MinF32>();
    case WeightFormat::kInt8:
      return f.template operator()<WeightFormat::kInt8>();
    case WeightFormat::kInt8Min:
      return f.template operator()<WeightFormat::kInt8Min>();
    case WeightFormat::kInt8MinF32:
      return f.template operator()<WeightFormat::kInt8MinF32>();
    case WeightFormat::kInt8Group16:
      return f.template operator()<WeightFormat::kInt8Group16>();
  }
}

}  // namespace motet::MOTET_ISA
