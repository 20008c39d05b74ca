// How weights lie in memory: the layout that the packed file holds and that the kernels read.
//
// A matrix is [outFeatures, inFeatures], as Hugging Face writes a Linear. It is cut into tiles of kTileColumns
// output features; a tile is one contiguous run of bytes, so a thread that owns a tile reads one stream. Output
// features are padded with zeros to whole tiles; inFeatures of quantised formats is a multiple of 32.
//
// Quantised formats are affine per group of consecutive input features:
//   w[n][k] = scale[n][g] · (q[n][k] − zero) + min[n][g],   g = k / groupSize
// with q stored unsigned, because the dot-product instructions want u8 × s8. `zero` is a constant of the format;
// `min` exists only in the formats whose name says so.
//
// Byte layout of one tile, T = kTileColumns, G = inFeatures / groupSize:
//   float formats:  element [inFeatures][T]
//   quantised:      scale [G][T], then min [G][T] (if any), zero bytes up to a multiple of 64, then quants [G][...]
//     8 bits: per group, groupSize/4 vectors of 64 bytes; byte 4·n + j of vector c is q[n][g·groupSize + 4·c + j]
//     4 bits: per group, 4 vectors of 64 bytes; the low nibbles of vector v are the 8-bit form's vector v, its
//             high nibbles the 8-bit form's vector v + 4
#pragma once
#include <cstddef>
#include <cstdint>

namespace motet {

inline constexpr int kTileColumns = 16;
inline constexpr int kActivationGroup = 32;  // input features that share one activation scale

// The numbers are written to packed files: never reuse one.
enum class WeightFormat : int32_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kInt4 = 3,         // zero 8, group 32, f16 scale                  (Q4_0; our own int4)
  kInt4Min = 4,      // zero 0, group 32, f16 scale, f16 min         (Q4_1)
  kInt4MinF32 = 5,   // zero 0, group 32, f32 scale, f32 min         (Q4_K: scale = d·sc, min = −dmin·m)
  kInt8 = 6,         // zero 128, group 32, f16 scale                (Q8_0, Q5_0; our own int8)
  kInt8Min = 7,      // zero 0, group 32, f16 scale, f16 min         (Q5_1)
  kInt8MinF32 = 8,   // zero 0, group 32, f32 scale, f32 min         (Q5_K)
  kInt8Group16 = 9,  // zero 128, group 16, f32 scale                (Q6_K)
};
inline constexpr int kNumWeightFormats = 10;

struct FormatInfo {
  int bits;          // 4 or 8; 16 or 32 for the float formats
  int group_size;    // 0 for the float formats
  int zero;
  bool has_min;
  int scale_bytes;   // 2 (f16) or 4 (f32); 0 for the float formats
};

constexpr FormatInfo format_info(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32: return {32, 0, 0, false, 0};
    case WeightFormat::kF16: return {16, 0, 0, false, 0};
    case WeightFormat::kBF16: return {16, 0, 0, false, 0};
    case WeightFormat::kInt4: return {4, 32, 8, false, 2};
    case WeightFormat::kInt4Min: return {4, 32, 0, true, 2};
    case WeightFormat::kInt4MinF32: return {4, 32, 0, true, 4};
    case WeightFormat::kInt8: return {8, 32, 128, false, 2};
    case WeightFormat::kInt8Min: return {8, 32, 0, true, 2};
    case WeightFormat::kInt8MinF32: return {8, 32, 0, true, 4};
    case WeightFormat::kInt8Group16: return {8, 16, 128, false, 4};
  }
  return {0, 0, 0, false, 0};
}

constexpr bool is_quantized(WeightFormat format) { return format_info(format).group_size != 0; }

constexpr int64_t num_tiles(int64_t out_features) { return (out_features + kTileColumns - 1) / kTileColumns; }

// Bytes before a tile's quants: its scales and mins, rounded up to 64.
constexpr size_t tile_header_bytes(WeightFormat format, int64_t in_features) {
  const FormatInfo f = format_info(format);
  if (f.group_size == 0) return 0;
  const size_t one = static_cast<size_t>(in_features / f.group_size) * kTileColumns * f.scale_bytes;
  return (one * (f.has_min ? 2 : 1) + 63) / 64 * 64;
}

constexpr size_t tile_bytes(WeightFormat format, int64_t in_features) {
  const FormatInfo f = format_info(format);
  return tile_header_bytes(format, in_features) + static_cast<size_t>(in_features) * kTileColumns * f.bits / 8;
}

constexpr size_t packed_bytes(WeightFormat format, int64_t out_features, int64_t in_features) {
  return static_cast<size_t>(num_tiles(out_features)) * tile_bytes(format, in_features);
}

// A view of one packed matrix; the bytes belong to the mapped file, or to who streams it. `data` is 64-byte aligned.
struct PackedMatrix {
  WeightFormat format = WeightFormat::kF32;
  int32_t out_features = 0;
  int32_t in_features = 0;
  const uint8_t* data = nullptr;

  const uint8_t* tile(int64_t t) const { return data + t * tile_bytes(format, in_features); }
};

// Element type of plain arrays: KV blocks, adapter weights, vectors.
enum class ElementType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };
constexpr size_t element_bytes(ElementType type) { return type == ElementType::kF32 ? 4 : 2; }

}  // namespace motet
