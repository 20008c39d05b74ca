#include "pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace motet {
namespace {

constexpr SourceInfo kSources[kNumSourceTypes] = {
    {"f32", 1, 4},      {"f16", 1, 2},      {"bf16", 1, 2},     {"q8_0", 32, 34},
    {"q4_0", 32, 18},   {"q4_1", 32, 20},   {"q5_0", 32, 22},   {"q5_1", 32, 24},
    {"q4_k", 256, 144}, {"q5_k", 256, 176}, {"q6_k", 256, 210},
};

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t to_bits(float value) { return std::bit_cast<uint32_t>(value); }

template <typename T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <typename T>
void store(uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact in f32
  return sign ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even; too large becomes infinity.
uint16_t f32_to_f16(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves the value's multiple of 2^-24, rounded, in the low mantissa bits.
    return sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

float bf16_to_f32(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

uint16_t f32_to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float half_at(const uint8_t* at) { return f16_to_f32(load<uint16_t>(at)); }

// One block of a quantised type, in the terms of its lossless packed format: w = scale · (q − zero) + min.
struct Block {
  uint8_t q[256];
  float scale[16], min[8];  // per group of that format
};

// The low nibbles of 16 bytes are elements 0..15, the high nibbles 16..31. `fifth` holds bit 4 of element i
// at bit i.
void decode_nibbles(uint8_t* q, const uint8_t* nibbles, uint32_t fifth, int offset) {
  for (int i = 0; i < 16; i++) {
    q[i] = static_cast<uint8_t>(((nibbles[i] & 15) | ((fifth >> i) & 1) << 4) + offset);
    q[i + 16] = static_cast<uint8_t>(((nibbles[i] >> 4) | ((fifth >> (i + 16)) & 1) << 4) + offset);
  }
}

// Q4_K and Q5_K pack eight 6-bit scales and eight 6-bit mins into 12 bytes: bytes 0..3 and 4..7 hold the
// first four of each in their low 6 bits; bytes 8..11 the low nibbles of the last four (scale low, min high),
// whose upper two bits are the upper two bits of bytes 0..3 (scales) and 4..7 (mins).
void decode_k_scales(Block& block, const uint8_t* bytes) {
  const float d = half_at(bytes), dmin = half_at(bytes + 2);
  const uint8_t* packed = bytes + 4;
  for (int g = 0; g < 4; g++) {
    const int low_scale = packed[g] & 63, low_min = packed[g + 4] & 63;
    const int high_scale = (packed[g + 8] & 15) | (packed[g] >> 6) << 4;
    const int high_min = packed[g + 8] >> 4 | (packed[g + 4] >> 6) << 4;
    block.scale[g] = d * static_cast<float>(low_scale);
    block.min[g] = -(dmin * static_cast<float>(low_min));
    block.scale[g + 4] = d * static_cast<float>(high_scale);
    block.min[g + 4] = -(dmin * static_cast<float>(high_min));
  }
}

template <SourceType>
void decode(Block& block, const uint8_t* bytes);

template <>
void decode<SourceType::kQ8_0>(Block& block, const uint8_t* bytes) {
  block.scale[0] = half_at(bytes);
  for (int i = 0; i < 32; i++) block.q[i] = bytes[2 + i] ^ 0x80;  // i8 + 128
}

template <>
void decode<SourceType::kQ4_0>(Block& block, const uint8_t* bytes) {
  block.scale[0] = half_at(bytes);
  decode_nibbles(block.q, bytes + 2, 0, 0);
}

template <>
void decode<SourceType::kQ4_1>(Block& block, const uint8_t* bytes) {
  block.scale[0] = half_at(bytes);
  block.min[0] = half_at(bytes + 2);
  decode_nibbles(block.q, bytes + 4, 0, 0);
}

template <>
void decode<SourceType::kQ5_0>(Block& block, const uint8_t* bytes) {
  block.scale[0] = half_at(bytes);
  decode_nibbles(block.q, bytes + 6, load<uint32_t>(bytes + 2), 128 - 16);
}

template <>
void decode<SourceType::kQ5_1>(Block& block, const uint8_t* bytes) {
  block.scale[0] = half_at(bytes);
  block.min[0] = half_at(bytes + 2);
  decode_nibbles(block.q, bytes + 8, load<uint32_t>(bytes + 4), 0);
}

// 32 bytes hold the nibbles of two groups: low ones of group 2p, high ones of group 2p + 1.
template <>
void decode<SourceType::kQ4_K>(Block& block, const uint8_t* bytes) {
  decode_k_scales(block, bytes);
  for (int pair = 0; pair < 4; pair++) {
    const uint8_t* nibbles = bytes + 16 + 32 * pair;
    uint8_t* q = block.q + 64 * pair;
    for (int i = 0; i < 32; i++) {
      q[i] = nibbles[i] & 15;
      q[i + 32] = nibbles[i] >> 4;
    }
  }
}

// As Q4_K, and bit g of fifth[i] is bit 4 of element i of group g.
template <>
void decode<SourceType::kQ5_K>(Block& block, const uint8_t* bytes) {
  decode_k_scales(block, bytes);
  const uint8_t* fifth = bytes + 16;
  for (int pair = 0; pair < 4; pair++) {
    const uint8_t* nibbles = bytes + 48 + 32 * pair;
    uint8_t* q = block.q + 64 * pair;
    for (int i = 0; i < 32; i++) {
      q[i] = static_cast<uint8_t>((nibbles[i] & 15) | ((fifth[i] >> (2 * pair)) & 1) << 4);
      q[i + 32] = static_cast<uint8_t>(nibbles[i] >> 4 | ((fifth[i] >> (2 * pair + 1)) & 1) << 4);
    }
  }
}

// Two halves of 128 elements, each four runs of 32. Runs 0 and 1 are the low nibbles of 64 bytes, runs 2 and
// 3 the high ones; the upper two bits of run r are bits 2r, 2r + 1 of 32 more bytes. Scales are i8 per 16
// elements.
template <>
void decode<SourceType::kQ6_K>(Block& block, const uint8_t* bytes) {
  const float d = half_at(bytes + 208);
  for (int g = 0; g < 16; g++) block.scale[g] = d * static_cast<float>(static_cast<int8_t>(bytes[192 + g]));
  for (int half = 0; half < 2; half++) {
    const uint8_t* low = bytes + 64 * half;
    const uint8_t* high = bytes + 128 + 32 * half;
    uint8_t* q = block.q + 128 * half;
    for (int i = 0; i < 32; i++) {
      q[i] = static_cast<uint8_t>(((low[i] & 15) | (high[i] & 3) << 4) + 96);  // − 32 + 128
      q[i + 32] = static_cast<uint8_t>(((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) + 96);
      q[i + 64] = static_cast<uint8_t>((low[i] >> 4 | (high[i] >> 4 & 3) << 4) + 96);
      q[i + 96] = static_cast<uint8_t>((low[i + 32] >> 4 | (high[i] >> 6) << 4) + 96);
    }
  }
}

// Calls visit.operator()<type>() for the quantised type at hand, so that its block loop is compiled for that
// type alone.
template <typename Visit>
void with_quantized_type(SourceType type, Visit visit) {
  switch (type) {
    case SourceType::kQ8_0:
      return visit.template operator()<SourceType::kQ8_0>();
    case SourceType::kQ4_0:
      return visit.template operator()<SourceType::kQ4_0>();
    case SourceType::kQ4_1:
      return visit.template operator()<SourceType::kQ4_1>();
    case SourceType::kQ5_0:
      return visit.template operator()<SourceType::kQ5_0>();
    case SourceType::kQ5_1:
      return visit.template operator()<SourceType::kQ5_1>();
    case SourceType::kQ4_K:
      return visit.template operator()<SourceType::kQ4_K>();
    case SourceType::kQ5_K:
      return visit.template operator()<SourceType::kQ5_K>();
    case SourceType::kQ6_K:
      return visit.template operator()<SourceType::kQ6_K>();
    case SourceType::kF32:
    case SourceType::kF16:
    case SourceType::kBF16:
      break;
  }
  throw std::runtime_error("pack: not a quantised source type");
}

constexpr WeightFormat kLosslessFormats[kNumSourceTypes] = {
    WeightFormat::kF32,        WeightFormat::kF16,        WeightFormat::kBF16,        WeightFormat::kInt8,
    WeightFormat::kInt4,       WeightFormat::kInt4Min,    WeightFormat::kInt8,        WeightFormat::kInt8Min,
    WeightFormat::kInt4MinF32, WeightFormat::kInt8MinF32, WeightFormat::kInt8Group16,
};

template <SourceType type>
void dequantize_blocks(float* out, const uint8_t* source, int64_t num_blocks) {
  constexpr SourceInfo info = kSources[static_cast<int>(type)];
  constexpr FormatInfo format = format_info(kLosslessFormats[static_cast<int>(type)]);
  Block block;
  for (int64_t b = 0; b < num_blocks; b++) {
    decode<type>(block, source + b * info.block_bytes);
    for (int i = 0; i < info.block_elements; i++) {
      const int g = i / format.group_size;
      const float product = static_cast<float>(block.q[i] - format.zero) * block.scale[g];
      out[b * info.block_elements + i] = format.has_min ? product + block.min[g] : product;
    }
  }
}

[[noreturn]] void refuse_row(int64_t row, const char* what) {
  throw std::runtime_error("pack: row " + std::to_string(row) + ": expected " + what);
}
constexpr const char* kFinite = "finite values, got one that is not";
constexpr const char* kInRange = "values that the packed format can hold, got one that is too large";

// What a call packs, checked; a row is -1 where the tile is padding.
struct Source {
  SourceType type;
  const uint8_t* data;
  int64_t row_bytes, out_features, in_features;
  const int32_t* rows;

  int64_t row_index(int64_t row) const {
    if (row >= out_features) return -1;
    const int64_t index = rows ? rows[row] : row;
    if (index < 0 || index >= out_features)
      refuse_row(row, "a source row within the matrix, got one outside");
    return index;
  }
  const uint8_t* row(int64_t index) const { return data + index * row_bytes; }
};

// The quantised part of one tile. put_group writes row n's quants of group g as weights.h lays them out.
struct TileWriter {
  TileWriter(uint8_t* tile, WeightFormat format, int64_t in_features)
      : info(format_info(format)),
        scales(tile),
        mins(tile + in_features / info.group_size * kTileColumns * info.scale_bytes),
        quants(tile + tile_header_bytes(format, in_features)) {
    // What follows the scales, up to the quants, is zero in every file.
    const int64_t used =
        in_features / info.group_size * kTileColumns * info.scale_bytes * (info.has_min ? 2 : 1);
    std::memset(tile + used, 0, quants - (tile + used));
  }

  void put_number(uint8_t* array, int64_t g, int n, float value) const {
    const int64_t at = g * kTileColumns + n;
    if (info.scale_bytes == 2)
      store(array + 2 * at, f32_to_f16(value));
    else
      store(array + 4 * at, value);
  }

  void put_group(int64_t g, int n, const uint8_t* q, float scale, float min) const {
    put_number(scales, g, n, scale);
    if (info.has_min) put_number(mins, g, n, min);
    uint8_t* group = quants + g * info.group_size * kTileColumns * info.bits / 8 + 4 * n;
    if (info.bits == 8) {
      for (int c = 0; c < info.group_size / 4; c++) std::memcpy(group + 64 * c, q + 4 * c, 4);
    } else {
      for (int v = 0; v < 4; v++)
        store(group + 64 * v, load<uint32_t>(q + 4 * v) | load<uint32_t>(q + 4 * v + 16) << 4);
    }
  }

  FormatInfo info;
  uint8_t *scales, *mins, *quants;
};

template <SourceType type>
void copy_tile(const TileWriter& tile, const Source& source, int64_t first_row) {
  constexpr SourceInfo info = kSources[static_cast<int>(type)];
  constexpr FormatInfo format = format_info(kLosslessFormats[static_cast<int>(type)]);
  constexpr int groups = info.block_elements / format.group_size;
  Block block;
  for (int n = 0; n < kTileColumns; n++) {
    const int64_t row = source.row_index(first_row + n);
    if (row < 0) {
      std::memset(&block, 0, sizeof block);
      std::memset(block.q, format.zero, sizeof block.q);
    }
    for (int64_t b = 0; b < source.in_features / info.block_elements; b++) {
      if (row >= 0) decode<type>(block, source.row(row) + b * info.block_bytes);
      for (int g = 0; g < groups; g++) {
        if (!std::isfinite(block.scale[g]) || (format.has_min && !std::isfinite(block.min[g]))) {
          refuse_row(first_row + n, kFinite);
        }
        const float min = format.has_min ? block.min[g] : 0;
        tile.put_group(b * groups + g, n, block.q + g * format.group_size, block.scale[g], min);
      }
    }
  }
}

// One value of each of a tile's rows: the quantisers below work on sixteen rows at once, in vector lanes. GCC
// and Clang split such a vector into what the machine has.
typedef float Lanes __attribute__((vector_size(4 * kTileColumns)));
constexpr int kGroup = 32;

Lanes magnitude(const Lanes& x) { return x < 0 ? -x : x; }

// As f16 holds it.
Lanes round_to_f16(const Lanes& x) {
  Lanes out;
  for (int n = 0; n < kTileColumns; n++) out[n] = f16_to_f32(f32_to_f16(x[n]));
  return out;
}

// q = round(x / scale) into [low, high], ties to even; 0 where the scale is 0.
void round_to_scale(Lanes* q, const Lanes* x, const Lanes& scale, float low, float high) {
  // Adding and taking away 1.5·2^23 rounds any |x| below 2^22 to an integer.
  constexpr float kMagic = 12582912.0f;
  const Lanes inverse = scale == 0 ? Lanes{} : 1 / scale;
  const Lanes lowest = Lanes{} + low, highest = Lanes{} + high;
  for (int k = 0; k < kGroup; k++) {
    const Lanes scaled = x[k] * inverse;
    const Lanes above = scaled > lowest ? scaled : lowest;
    q[k] = ((above < highest ? above : highest) + kMagic) - kMagic;
  }
}

// Symmetric int4, q in [-8, 7]. Each candidate puts the value of largest magnitude at another place, then
// refits the scale to the quants: Σxq / Σqq is the best one for them. The candidate of least squared error
// stays. 7 is plain absmax, -8 is Q4_0's rule; beyond -8 the extreme value is clipped for the benefit of the
// others. Scales are judged as f16 holds them.
void quantize_int4(Lanes* q, Lanes& scale, const Lanes* x) {
  constexpr float kPlaces[] = {7, -7.25f, -7.5f, -7.75f, -8, -8.25f, -8.5f, -8.75f, -9, -9.5f, -10};
  Lanes extreme = {};
  for (int k = 0; k < kGroup; k++) extreme = magnitude(x[k]) > magnitude(extreme) ? x[k] : extreme;

  Lanes least_error = Lanes{} + INFINITY;
  Lanes candidate_q[kGroup];
  for (const float place : kPlaces) {
    round_to_scale(candidate_q, x, round_to_f16(extreme / place), -8, 7);
    Lanes xq = {}, qq = {}, error = {};
    for (int k = 0; k < kGroup; k++) {
      xq += x[k] * candidate_q[k];
      qq += candidate_q[k] * candidate_q[k];
    }
    const Lanes candidate = round_to_f16(qq == 0 ? Lanes{} : xq / qq);
    for (int k = 0; k < kGroup; k++) {
      const Lanes difference = x[k] - candidate * candidate_q[k];
      error += difference * difference;
    }
    const auto is_better = error < least_error;
    least_error = is_better ? error : least_error;
    scale = is_better ? candidate : scale;
    for (int k = 0; k < kGroup; k++) q[k] = is_better ? candidate_q[k] : q[k];
  }
  // No candidate fits f16: say so to the caller, which refuses the row.
  scale = magnitude(extreme) > 8 * 65504.0f ? Lanes{} + INFINITY : scale;
}

// Symmetric int8, q in [-127, 127], scale = max|x| / 127.
void quantize_int8(Lanes* q, Lanes& scale, const Lanes* x) {
  Lanes largest = {};
  for (int k = 0; k < kGroup; k++) largest = magnitude(x[k]) > largest ? magnitude(x[k]) : largest;
  scale = round_to_f16(largest / 127);
  round_to_scale(q, x, scale, -127, 127);
}

// Compiled for wider vectors too, and chosen when the program starts. The arithmetic is the same, bit for
// bit. (GCC takes such a function for one that never throws, so nothing in it may.)
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
void quantize_group(Lanes* q, Lanes* scale, const Lanes* x, int bits) {
  if (bits == 4)
    quantize_int4(q, *scale, x);
  else
    quantize_int8(q, *scale, x);
}

// values: [kTileColumns][in_features] f32.
void quantize_tile(const TileWriter& tile, const float* values, int64_t in_features, int64_t first_row) {
  Lanes x[kGroup], q[kGroup] = {};
  Lanes scale = {};
  for (int64_t g = 0; g < in_features / kGroup; g++) {
    for (int n = 0; n < kTileColumns; n++) {
      for (int k = 0; k < kGroup; k++) x[k][n] = values[n * in_features + g * kGroup + k];
    }
    quantize_group(q, &scale, x, tile.info.bits);
    for (int n = 0; n < kTileColumns; n++) {
      if (!std::isfinite(scale[n])) refuse_row(first_row + n, kInRange);
      uint8_t quants[kGroup];
      for (int k = 0; k < kGroup; k++)
        quants[k] = static_cast<uint8_t>(static_cast<int>(q[k][n]) + tile.info.zero);
      tile.put_group(g, n, quants, scale[n], 0);
    }
  }
}

void store_float_tile(uint8_t* out, WeightFormat target, const float* values, int64_t in_features,
                      int64_t first_row) {
  for (int n = 0; n < kTileColumns; n++) {
    for (int64_t k = 0; k < in_features; k++) {
      const float value = values[n * in_features + k];
      const int64_t at = k * kTileColumns + n;
      if (target == WeightFormat::kF32) {
        store(out + 4 * at, value);
        continue;
      }
      const bool is_f16 = target == WeightFormat::kF16;
      const uint16_t bits = is_f16 ? f32_to_f16(value) : f32_to_bf16(value);
      const uint16_t infinity = is_f16 ? 0x7c00 : 0x7f80;
      if ((bits & 0x7fff) >= infinity) refuse_row(first_row + n, kInRange);
      store(out + 2 * at, bits);
    }
  }
}

// The tile's rows in f32, addend added, padding zero.
void read_rows(float* values, const Source& source, float addend, int64_t first_row) {
  for (int n = 0; n < kTileColumns; n++) {
    float* row = values + n * source.in_features;
    const int64_t index = source.row_index(first_row + n);
    if (index < 0) {
      std::fill_n(row, source.in_features, 0.0f);
      continue;
    }
    dequantize_row(row, source.type, source.row(index), source.in_features);
    uint32_t largest_exponent = 0;
    for (int64_t k = 0; k < source.in_features; k++) {
      if (addend != 0) row[k] += addend;  // adding 0 would turn -0 into 0
      largest_exponent = std::max(largest_exponent, to_bits(row[k]) & 0x7f800000);
    }
    if (largest_exponent == 0x7f800000) refuse_row(first_row + n, kFinite);
  }
}

}  // namespace

const SourceInfo& source_info(SourceType type) { return kSources[static_cast<int>(type)]; }

WeightFormat lossless_format(SourceType type) { return kLosslessFormats[static_cast<int>(type)]; }

void dequantize_row(float* out, SourceType type, const uint8_t* source, int64_t num_elements) {
  switch (type) {
    case SourceType::kF32:
      std::memcpy(out, source, num_elements * sizeof(float));
      return;
    case SourceType::kF16:
      for (int64_t i = 0; i < num_elements; i++) out[i] = f16_to_f32(load<uint16_t>(source + 2 * i));
      return;
    case SourceType::kBF16:
      for (int64_t i = 0; i < num_elements; i++) out[i] = bf16_to_f32(load<uint16_t>(source + 2 * i));
      return;
    default:
      with_quantized_type(type, [&]<SourceType quantized>() {
        dequantize_blocks<quantized>(out, source,
                                     num_elements / kSources[static_cast<int>(quantized)].block_elements);
      });
  }
}

void pack_tiles(uint8_t* out, WeightFormat target, SourceType source_type, const uint8_t* source_data,
                int64_t row_bytes, int64_t out_features, int64_t in_features, const int32_t* rows,
                float addend, int64_t tile_begin, int64_t tile_end) {
  const SourceInfo& info = source_info(source_type);
  const bool to_quants = is_quantized(target);
  const bool is_copy = to_quants && addend == 0 && lossless_format(source_type) == target;
  if (in_features % info.block_elements != 0 || (to_quants && in_features % kActivationGroup != 0)) {
    throw std::runtime_error("pack: in_features: expected a multiple of " +
                             std::to_string(std::max(info.block_elements, to_quants ? kActivationGroup : 1)) +
                             ", got " + std::to_string(in_features));
  }
  if (to_quants && !is_copy && target != WeightFormat::kInt4 && target != WeightFormat::kInt8) {
    throw std::runtime_error(
        std::string("pack: target: expected int4, int8 or a float format for source type ") + info.name +
        ", got a format that only holds its own source type");
  }

  const Source source = {source_type, source_data, row_bytes, out_features, in_features, rows};
  std::vector<float> values(is_copy ? 0 : kTileColumns * in_features);
  for (int64_t t = tile_begin; t < tile_end; t++, out += tile_bytes(target, in_features)) {
    const int64_t first_row = t * kTileColumns;
    if (is_copy) {
      const TileWriter tile(out, target, in_features);
      with_quantized_type(source_type,
                          [&]<SourceType quantized>() { copy_tile<quantized>(tile, source, first_row); });
      continue;
    }
    read_rows(values.data(), source, addend, first_row);
    if (to_quants)
      quantize_tile(TileWriter(out, target, in_features), values.data(), in_features, first_row);
    else
      store_float_tile(out, target, values.data(), in_features, first_row);
  }
}

}  // namespace motet
