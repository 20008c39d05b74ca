// Packing: every source type against a dequantiser written element by element from the format's description,
// packed tiles against a slow unpack, and the two quantisers against plain rounding.
#include "pack.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace motet {
namespace {

using Bytes = std::vector<uint8_t>;

constexpr SourceType kAllSources[] = {
    SourceType::kF32,  SourceType::kF16,  SourceType::kBF16, SourceType::kQ8_0,
    SourceType::kQ4_0, SourceType::kQ4_1, SourceType::kQ5_0, SourceType::kQ5_1,
    SourceType::kQ4_K, SourceType::kQ5_K, SourceType::kQ6_K,
};

uint16_t u16(const uint8_t* at) { return static_cast<uint16_t>(at[0] | at[1] << 8); }

// f16 by its definition, in double.
double half(uint16_t bits) {
  const double sign = bits >> 15 ? -1 : 1;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return exponent == 0 ? sign * std::ldexp(mantissa, -24) : sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// Scale or min number j of Q4_K and Q5_K, as ggml's get_scale_min_k4 states it.
std::pair<int, int> k_scale_min(int j, const uint8_t* s) {
  if (j < 4) return {s[j] & 63, s[j + 4] & 63};
  return {(s[j + 4] & 15) | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4};
}

// Element i of a block. Every product here is exact in double; sums round once, to f32.
float element(SourceType type, const uint8_t* b, int i) {
  const auto nibble = [&](const uint8_t* qs, int at, int shift) { return qs[at] >> shift & 15; };
  const auto nibble32 = [&](const uint8_t* qs) { return i < 16 ? nibble(qs, i, 0) : nibble(qs, i - 16, 4); };
  const auto fifth32 = [&](const uint8_t* qh) { return qh[i / 8] >> (i % 8) & 1; };
  switch (type) {
    case SourceType::kF32: {
      float value;
      std::memcpy(&value, b, 4);
      return value;
    }
    case SourceType::kF16:
      return static_cast<float>(half(u16(b)));
    case SourceType::kBF16:
      return std::bit_cast<float>(static_cast<uint32_t>(u16(b)) << 16);
    case SourceType::kQ8_0:
      return static_cast<float>(half(u16(b)) * static_cast<int8_t>(b[2 + i]));
    case SourceType::kQ4_0:
      return static_cast<float>(half(u16(b)) * (nibble32(b + 2) - 8));
    case SourceType::kQ4_1:
      return static_cast<float>(half(u16(b)) * nibble32(b + 4) + half(u16(b + 2)));
    case SourceType::kQ5_0:
      return static_cast<float>(half(u16(b)) * ((nibble32(b + 6) | fifth32(b + 2) << 4) - 16));
    case SourceType::kQ5_1:
      return static_cast<float>(half(u16(b)) * (nibble32(b + 8) | fifth32(b + 4) << 4) + half(u16(b + 2)));
    case SourceType::kQ4_K: {
      const auto [scale, min] = k_scale_min(i / 32, b + 4);
      const int q = nibble(b + 16, i / 64 * 32 + i % 32, i / 32 % 2 * 4);
      return static_cast<float>(half(u16(b)) * scale * q - half(u16(b + 2)) * min);
    }
    case SourceType::kQ5_K: {
      const auto [scale, min] = k_scale_min(i / 32, b + 4);
      const int q = nibble(b + 48, i / 64 * 32 + i % 32, i / 32 % 2 * 4) | (b[16 + i % 32] >> (i / 32) & 1)
                                                                               << 4;
      return static_cast<float>(half(u16(b)) * scale * q - half(u16(b + 2)) * min);
    }
    case SourceType::kQ6_K: {
      const int h = i / 128, run = i % 128 / 32, l = i % 32;
      const int low = nibble(b, 64 * h + l + run % 2 * 32, run / 2 * 4);
      const int high = b[128 + 32 * h + l] >> (2 * run) & 3;
      return static_cast<float>(half(u16(b + 208)) * static_cast<int8_t>(b[192 + i / 16]) *
                                ((low | high << 4) - 32));
    }
  }
  return NAN;
}

// A random source matrix whose f16 fields are finite; quants and integer scales are any bits.
Bytes random_source(SourceType type, int64_t rows, int64_t in_features, std::mt19937& random) {
  const SourceInfo& info = source_info(type);
  const int64_t num_blocks = rows * in_features / info.block_elements;
  Bytes bytes(num_blocks * info.block_bytes);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
  const auto finite_half = [&](uint8_t* at) { at[1] = (at[1] & 0x80) | (at[1] & 0x7f) % 0x7c; };
  for (int64_t i = 0; i < num_blocks; i++) {
    uint8_t* block = bytes.data() + i * info.block_bytes;
    switch (type) {
      case SourceType::kF32: {
        const float value = std::normal_distribution<float>()(random);
        std::memcpy(block, &value, 4);
        break;
      }
      case SourceType::kBF16:
        block[1] = static_cast<uint8_t>((block[1] & 0x80) | 0x3f);
        break;
      case SourceType::kF16:
      case SourceType::kQ8_0:
      case SourceType::kQ4_0:
      case SourceType::kQ5_0:
        finite_half(block);
        break;
      case SourceType::kQ4_1:
      case SourceType::kQ5_1:
      case SourceType::kQ4_K:
      case SourceType::kQ5_K:
        finite_half(block);
        finite_half(block + 2);
        break;
      case SourceType::kQ6_K:
        finite_half(block + 208);
        break;
    }
  }
  return bytes;
}

int64_t row_bytes(SourceType type, int64_t in_features) {
  return in_features / source_info(type).block_elements * source_info(type).block_bytes;
}

std::vector<float> slow_dequantize(SourceType type, const Bytes& source, int64_t rows, int64_t in_features) {
  const SourceInfo& info = source_info(type);
  std::vector<float> out(rows * in_features);
  for (size_t i = 0; i < out.size(); i++) {
    out[i] =
        element(type, source.data() + i / info.block_elements * info.block_bytes, i % info.block_elements);
  }
  return out;
}

// Element (n, k) of a packed matrix, read by the words of weights.h.
float packed_element(const Bytes& packed, WeightFormat format, int64_t in_features, int64_t n, int64_t k) {
  const FormatInfo f = format_info(format);
  const uint8_t* tile = packed.data() + n / 16 * tile_bytes(format, in_features);
  const int64_t column = n % 16;
  const auto number = [&](const uint8_t* array, int64_t at, int bytes) -> double {
    if (bytes == 2) return half(u16(array + 2 * at));
    float value;
    std::memcpy(&value, array + 4 * at, 4);
    return value;
  };
  if (format == WeightFormat::kBF16) return element(SourceType::kBF16, tile + 2 * (k * 16 + column), 0);
  if (f.group_size == 0) return static_cast<float>(number(tile, k * 16 + column, f.bits / 8));

  const int64_t groups = in_features / f.group_size, g = k / f.group_size, i = k % f.group_size;
  const double scale = number(tile, g * 16 + column, f.scale_bytes);
  const double min =
      f.has_min ? number(tile + groups * 16 * f.scale_bytes, g * 16 + column, f.scale_bytes) : 0;
  const uint8_t* quants = tile + tile_header_bytes(format, in_features) + g * f.group_size * 16 * f.bits / 8;
  const int64_t vector = i / 4, byte = 4 * column + i % 4;
  const int q =
      f.bits == 8 ? quants[64 * vector + byte] : quants[64 * (vector % 4) + byte] >> (vector / 4 * 4) & 15;
  const double product = scale * (q - f.zero);
  return static_cast<float>(f.has_min ? product + min : product);
}

Bytes pack(WeightFormat target, SourceType type, const Bytes& source, int64_t out_features,
           int64_t in_features, const int32_t* rows = nullptr, float addend = 0) {
  Bytes packed(packed_bytes(target, out_features, in_features), 0xee);
  pack_tiles(packed.data(), target, type, source.data(), row_bytes(type, in_features), out_features,
             in_features, rows, addend, 0, num_tiles(out_features));
  return packed;
}

void expect_same_bits(float actual, float expected, const std::string& where) {
  ASSERT_EQ(std::bit_cast<uint32_t>(actual), std::bit_cast<uint32_t>(expected))
      << where << ": " << actual << " instead of " << expected;
}

std::string at(SourceType type, int64_t n, int64_t k) {
  return std::string(source_info(type).name) + " [" + std::to_string(n) + ", " + std::to_string(k) + "]";
}

class EverySource : public testing::TestWithParam<SourceType> {};
INSTANTIATE_TEST_SUITE_P(Pack, EverySource, testing::ValuesIn(kAllSources),
                         [](const auto& info) { return std::string(source_info(info.param).name); });

TEST_P(EverySource, DequantizesBitForBitAsTheFormatIsDescribed) {
  std::mt19937 random(1);
  const SourceType type = GetParam();
  const Bytes source = random_source(type, 40, 512, random);
  const std::vector<float> expected = slow_dequantize(type, source, 40, 512);
  std::vector<float> actual(expected.size());
  dequantize_row(actual.data(), type, source.data(), actual.size());
  for (size_t i = 0; i < expected.size(); i++) expect_same_bits(actual[i], expected[i], at(type, 0, i));
}

TEST_P(EverySource, PacksWithoutLossAndPadsWithZeros) {
  std::mt19937 random(2);
  const SourceType type = GetParam();
  const WeightFormat target = lossless_format(type);
  const int64_t block = std::max(32, source_info(type).block_elements);
  for (const int64_t out_features : {1, 15, 16, 17, 35}) {
    for (const int64_t in_features : {block, 3 * block}) {
      const Bytes source = random_source(type, out_features, in_features, random);
      const std::vector<float> expected = slow_dequantize(type, source, out_features, in_features);
      const Bytes packed = pack(target, type, source, out_features, in_features);
      for (int64_t n = 0; n < num_tiles(out_features) * kTileColumns; n++) {
        for (int64_t k = 0; k < in_features; k++) {
          const float value = n < out_features ? expected[n * in_features + k] : 0.0f;
          const float actual = packed_element(packed, target, in_features, n, k);
          if (value == 0)
            ASSERT_EQ(actual, 0) << at(type, n, k);  // q = zero times a negative scale may give -0
          else
            expect_same_bits(actual, value, at(type, n, k));
        }
      }
    }
  }
}

TEST_P(EverySource, PermutesRows) {
  std::mt19937 random(3);
  const SourceType type = GetParam();
  const WeightFormat target = lossless_format(type);
  std::vector<int32_t> rows(20);
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), random);
  const Bytes source = random_source(type, 20, 256, random);
  const Bytes plain = pack(target, type, source, 20, 256);
  const Bytes permuted = pack(target, type, source, 20, 256, rows.data());
  for (int n = 0; n < 20; n++) {
    for (int k = 0; k < 256; k++) {
      ASSERT_EQ(packed_element(permuted, target, 256, n, k), packed_element(plain, target, 256, rows[n], k));
    }
  }
}

TEST_P(EverySource, PacksAnyRunOfTilesAlike) {
  std::mt19937 random(4);
  const SourceType type = GetParam();
  for (const WeightFormat target : {lossless_format(type), WeightFormat::kF32}) {
    const Bytes source = random_source(type, 50, 256, random);
    const Bytes whole = pack(target, type, source, 50, 256);
    Bytes parts(whole.size(), 0x11);
    for (int64_t t = 0; t < num_tiles(50); t++) {
      pack_tiles(parts.data() + t * tile_bytes(target, 256), target, type, source.data(),
                 row_bytes(type, 256), 50, 256, nullptr, 0, t, t + 1);
    }
    ASSERT_EQ(whole, parts) << source_info(type).name;
  }
}

TEST_P(EverySource, WidensToF32ExactlyAndAddsTheAddend) {
  std::mt19937 random(5);
  const SourceType type = GetParam();
  const Bytes source = random_source(type, 17, 256, random);
  const std::vector<float> expected = slow_dequantize(type, source, 17, 256);
  for (const float addend : {0.0f, 1.0f}) {
    const Bytes packed = pack(WeightFormat::kF32, type, source, 17, 256, nullptr, addend);
    for (int n = 0; n < 17; n++) {
      for (int k = 0; k < 256; k++) {
        ASSERT_EQ(packed_element(packed, WeightFormat::kF32, 256, n, k), expected[n * 256 + k] + addend)
            << at(type, n, k);
      }
    }
  }
}

Bytes f32_source(const std::vector<float>& values) {
  Bytes bytes(values.size() * 4);
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

float round_to_half(float value) {
  const Bytes packed =
      pack(WeightFormat::kF16, SourceType::kF32, f32_source(std::vector<float>(1, value)), 1, 1);
  return static_cast<float>(half(u16(packed.data())));
}

TEST(Pack, RoundsToF16ToNearestEven) {
  // Each f16, its neighbour's midpoint, and just beside it.
  for (int bits = 0; bits < 0x7bff; bits++) {
    const double low = half(static_cast<uint16_t>(bits)), high = half(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(round_to_half(static_cast<float>(low)), low);
    ASSERT_EQ(round_to_half(middle), bits % 2 == 0 ? low : high);
    ASSERT_EQ(round_to_half(std::nextafter(middle, 0.0f)), low);
    ASSERT_EQ(round_to_half(-std::nextafter(middle, 1e9f)), -high);
  }
}

TEST(Pack, RoundsToBf16ToNearestEven) {
  const std::vector<float> values = {1.0f, 1.00390625f, 1.01171875f, -1.00390637f, 3.0e38f};
  const std::vector<float> expected = {1.0f, 1.0f, 1.015625f, -1.0078125f, 0};
  const Bytes packed = pack(WeightFormat::kBF16, SourceType::kF32, f32_source(values), 1, 5);
  for (int k = 0; k < 4; k++) EXPECT_EQ(packed_element(packed, WeightFormat::kBF16, 5, 0, k), expected[k]);
  EXPECT_NEAR(packed_element(packed, WeightFormat::kBF16, 5, 0, 4), 3.0e38f, 1e36f);
}

// Squared error of a row's group under the plain rule: scale = max|w| / 7 as f16 holds it, round, clamp.
double plain_int4_error(const float* w) {
  float largest = 0;
  for (int i = 0; i < 32; i++) largest = std::max(largest, std::fabs(w[i]));
  const float scale = round_to_half(largest / 7);
  double error = 0;
  for (int i = 0; i < 32; i++) {
    const double q =
        scale == 0 ? 0 : std::min(7.0, std::max(-8.0, std::nearbyint(w[i] / static_cast<double>(scale))));
    error += (w[i] - scale * q) * (w[i] - scale * q);
  }
  return error;
}

TEST(Pack, SearchedInt4ScalesAreNeverWorseThanAbsmaxAndBetterOnTheWhole) {
  std::mt19937 random(6);
  std::student_t_distribution<float> heavy_tailed(4);
  for (const float spread : {1.0f, 0.02f, 1e-5f}) {
    std::vector<float> w(64 * 256);
    for (float& value : w) value = spread * heavy_tailed(random);
    const Bytes packed = pack(WeightFormat::kInt4, SourceType::kF32, f32_source(w), 64, 256);
    double total = 0, plain_total = 0;
    for (int n = 0; n < 64; n++) {
      for (int g = 0; g < 8; g++) {
        double error = 0;
        for (int k = 32 * g; k < 32 * g + 32; k++) {
          const double difference = w[n * 256 + k] - packed_element(packed, WeightFormat::kInt4, 256, n, k);
          error += difference * difference;
        }
        const double plain = plain_int4_error(&w[n * 256 + 32 * g]);
        // The search sums squares in f32; that is all the slack it gets.
        ASSERT_LE(error, plain * (1 + 1e-5)) << "row " << n << " group " << g << " spread " << spread;
        total += error;
        plain_total += plain;
      }
    }
    EXPECT_LT(total, 0.9 * plain_total) << spread;
  }
}

TEST(Pack, Int8IsWithinHalfAStepOfTheValue) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> w(33 * 96);
  for (float& value : w) value = normal(random);
  const Bytes packed = pack(WeightFormat::kInt8, SourceType::kF32, f32_source(w), 33, 96);
  for (int n = 0; n < 33; n++) {
    for (int g = 0; g < 3; g++) {
      float largest = 0;
      for (int i = 0; i < 32; i++) largest = std::max(largest, std::fabs(w[n * 96 + 32 * g + i]));
      for (int k = 32 * g; k < 32 * g + 32; k++) {
        // 0.5 of a step from rounding the value; the extreme value loses up to 127 · 2^-11 of a step to f16.
        EXPECT_NEAR(packed_element(packed, WeightFormat::kInt8, 96, n, k), w[n * 96 + k],
                    0.57f * largest / 127);
      }
    }
  }
}

TEST(Pack, QuantisesAGroupOfZerosToZeros) {
  const Bytes source = f32_source(std::vector<float>(16 * 32, 0.0f));
  for (const WeightFormat target : {WeightFormat::kInt4, WeightFormat::kInt8}) {
    const Bytes packed = pack(target, SourceType::kF32, source, 16, 32);
    for (int k = 0; k < 32; k++) EXPECT_EQ(packed_element(packed, target, 32, 3, k), 0);
  }
}

// The message of the error that packing throws, or "".
std::string refusal(WeightFormat target, SourceType type, const Bytes& source, int64_t out_features,
                    int64_t in_features, const int32_t* rows = nullptr) {
  try {
    pack(target, type, source, out_features, in_features, rows);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(Pack, RefusesValuesThatAreNotFiniteAndNamesTheRow) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> w(20 * 32, 0.5f);
    w[18 * 32 + 7] = bad;
    for (const WeightFormat target :
         {WeightFormat::kF32, WeightFormat::kInt4, WeightFormat::kInt8, WeightFormat::kBF16}) {
      EXPECT_EQ(refusal(target, SourceType::kF32, f32_source(w), 20, 32),
                "pack: row 18: expected finite values, got one that is not");
    }
  }
}

TEST(Pack, RefusesBlocksWhoseScaleIsNotFinite) {
  std::mt19937 random(8);
  for (const SourceType type : kAllSources) {
    if (type <= SourceType::kBF16) continue;
    Bytes source = random_source(type, 18, 256, random);
    uint8_t* scale = source.data() + 17 * row_bytes(type, 256) + (type == SourceType::kQ6_K ? 208 : 0);
    scale[0] = 1;
    scale[1] = 0x7c;  // NaN
    for (const WeightFormat target : {lossless_format(type), WeightFormat::kF32}) {
      EXPECT_EQ(refusal(target, type, source, 18, 256),
                "pack: row 17: expected finite values, got one that is not")
          << source_info(type).name;
    }
  }
}

TEST(Pack, RefusesValuesTooLargeForTheTarget) {
  std::vector<float> w(2 * 32, 0.0f);
  w[40] = 1e7f;
  for (const WeightFormat target : {WeightFormat::kF16, WeightFormat::kInt4}) {
    EXPECT_EQ(refusal(target, SourceType::kF32, f32_source(w), 2, 32),
              "pack: row 1: expected values that the packed format can hold, got one that is too large");
  }
}

TEST(Pack, RefusesPartialGroupsWrongTargetsAndRowsOutside) {
  const Bytes source = f32_source(std::vector<float>(2 * 48, 1.0f));
  EXPECT_EQ(refusal(WeightFormat::kInt8, SourceType::kF32, source, 2, 48),
            "pack: in_features: expected a multiple of 32, got 48");
  EXPECT_NE(
      refusal(WeightFormat::kInt4Min, SourceType::kF32, source, 2, 32).find("target: expected int4, int8"),
      std::string::npos);
  const int32_t rows[] = {0, 2};
  EXPECT_EQ(refusal(WeightFormat::kF32, SourceType::kF32, source, 2, 48, rows),
            "pack: row 1: expected a source row within the matrix, got one outside");
}

}  // namespace
}  // namespace motet
