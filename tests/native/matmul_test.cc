// matmul_q, matmul_f and unpack_row against the sums written out, over every format and odd sizes.
#include <algorithm>

#include "reference.h"

namespace motet {
namespace {

using namespace reference;

class MatmulTest : public KernelTest {};
MOTET_TEST_ALL_KERNELS(MatmulTest);

struct Shape {
  int rows, n, k;
};

// y[r][n] by the contract's chain, which every variant must follow to the bit.
float chain_q(const Matrix& w, const Rows& x, int r, int n) {
  const FormatInfo f = format_info(w.format);
  float y = 0;
  for (int g = 0; g < w.groups(); ++g) {
    int dot = 0, sum = 0;
    for (int i = 0; i < f.group_size; ++i) {
      const int feature = g * f.group_size + i;
      dot += w.q[size_t(n) * w.k + feature] * x.integer(r, feature);
      sum += x.integer(r, feature);
    }
    const float scale_x = x.scale[x.at(r, g * f.group_size)];
    const size_t group = size_t(n) * w.groups() + g;
    y = std::fma(static_cast<float>(dot - f.zero * sum), w.scale[group] * scale_x, y);
    if (f.has_min) y = std::fma(w.min[group], scale_x * static_cast<float>(sum), y);
  }
  return y;
}

PackedMatrix view(const Matrix& w, const AlignedVector<uint8_t>& bytes) {
  return {w.format, w.n, w.k, bytes.data()};
}

std::vector<WeightFormat> all_formats() {
  std::vector<WeightFormat> out;
  for (int i = 0; i < kNumWeightFormats; ++i) out.push_back(static_cast<WeightFormat>(i));
  return out;
}

constexpr float kUntouched = 12345;

TEST_P(MatmulTest, IntegerProductIsTheContractsChain) {
  Random random(1);
  for (WeightFormat format : all_formats()) {
    if (!is_quantized(format)) continue;
    for (const Shape s : {Shape{1, 16, 32},
                          {1, 1, 64},
                          {2, 17, 96},
                          {3, 48, 576},
                          {4, 33, 32},
                          {5, 16, 160},
                          {6, 64, 64},
                          {7, 80, 128},
                          {8, 31, 96},
                          {13, 49, 224},
                          {13, 48, 96},
                          {16, 32, 416},
                          {17, 96, 320},
                          {21, 80, 288},
                          {24, 17, 64},
                          {31, 32, 64},
                          {33, 112, 64},
                          {39, 64, 800}}) {
      SCOPED_TRACE(testing::Message()
                   << "format " << int(format) << " rows " << s.rows << " n " << s.n << " k " << s.k);
      const Matrix w = random_matrix(random, format, s.n, s.k);
      const AlignedVector<uint8_t> bytes = pack(w);
      std::vector<float> features = random.normals(size_t(s.rows) * s.k);
      // Some groups have a peak far beyond their other values.
      for (size_t i = 5; i < features.size(); i += 97) features[i] *= 300;
      Rows x = quantize(features, s.rows, s.k, kernels_.q_bytes);
      const int tiles = static_cast<int>(num_tiles(s.n)), ldy = tiles * kTileColumns + 3;
      std::vector<float> y(size_t(s.rows) * ldy, kUntouched), expected = y;
      for (int r = 0; r < s.rows; ++r) {
        for (int n = 0; n < tiles * kTileColumns; ++n)
          expected[size_t(r) * ldy + n] = n < s.n ? chain_q(w, x, r, n) : 0;
      }
      kernels_.matmul_q(y.data(), ldy, view(w, bytes), x.view(), 0, tiles, nullptr, 0);
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, expected));
    }
  }
}

// The largest products there are: no intermediate may saturate.
TEST_P(MatmulTest, IntegerProductIsExactAtTheExtremes) {
  for (WeightFormat format : all_formats()) {
    if (!is_quantized(format)) continue;
    for (const int sign : {-1, 1}) {
      Matrix w{format, 16, 64, {}, {}, {}, {}};
      w.q.assign(16 * 64, static_cast<uint8_t>((1 << format_info(format).bits) - 1));
      w.scale.assign(size_t(16) * w.groups(), 1.0f);
      w.min.assign(size_t(16) * w.groups(), format_info(format).has_min ? 2.0f : 0.0f);
      const AlignedVector<uint8_t> bytes = pack(w);
      // As one row, and as one of many.
      for (const int rows : {1, 17}) {
        Rows x(rows, 64, kernels_.q_bytes);
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < 64; ++i) x.low(r, i) = static_cast<int8_t>(127 * sign);
          x.scale[x.at(r, 0)] = x.scale[x.at(r, 32)] = 1.0f;
          // The widest peak, in the first half of one group and in the second half of the other.
          x.set_peak(r, 7, 127 * sign);
          x.set_peak(r, 60, 127 * sign);
        }
        std::vector<float> y(size_t(rows) * 16), expected(y.size());
        for (int r = 0; r < rows; ++r)
          for (int n = 0; n < 16; ++n) expected[size_t(r) * 16 + n] = chain_q(w, x, r, n);
        kernels_.matmul_q(y.data(), 16, view(w, bytes), x.view(), 0, 1, nullptr, 0);
        ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, expected, "format " + std::to_string(int(format))));
      }
    }
  }
}

TEST_P(MatmulTest, IntegerProductIsCloseToTheRealOne) {
  Random random(2);
  const int k = 576, n = 32;
  for (WeightFormat format : all_formats()) {
    if (!is_quantized(format)) continue;
    const Matrix w = random_matrix(random, format, n, k);
    const AlignedVector<uint8_t> bytes = pack(w);
    const std::vector<float> x = random.normals(k);
    Rows rows(1, k, kernels_.q_bytes);
    kernels_.quantize_rows(rows.view(), x.data(), k, 0, 1, 0, k / kActivationGroup);
    std::vector<float> y(n);
    kernels_.matmul_q(y.data(), n, view(w, bytes), rows.view(), 0, n / kTileColumns, nullptr, 0);
    double error = 0, total = 0;
    for (int c = 0; c < n; ++c) {
      double exact = 0;
      for (int i = 0; i < k; ++i) exact += double(w.weight(c, i)) * x[i];
      error += (y[c] - exact) * (y[c] - exact);
      total += exact * exact;
    }
    // Rounding to 1/127 of a group's largest value: an error near 0.6 % of the product's size.
    EXPECT_LT(std::sqrt(error / total), 0.02) << "format " << int(format);
    EXPECT_GT(error, 0) << "format " << int(format);
  }
}

TEST_P(MatmulTest, FloatProductIsTheContractsChain) {
  Random random(3);
  for (WeightFormat format : all_formats()) {
    for (const Shape s : {Shape{1, 16, 32},
                          {1, 40, 96},
                          {2, 17, 64},
                          {5, 33, 160},
                          {8, 16, 128},
                          {9, 48, 192},
                          {17, 31, 96}}) {
      SCOPED_TRACE(testing::Message()
                   << "format " << int(format) << " rows " << s.rows << " n " << s.n << " k " << s.k);
      const Matrix w = random_matrix(random, format, s.n, s.k);
      const AlignedVector<uint8_t> bytes = pack(w);
      const int ldx = s.k + 5;
      const std::vector<float> x = random.normals(size_t(s.rows) * ldx);
      const int tiles = static_cast<int>(num_tiles(s.n)), ldy = tiles * kTileColumns;
      std::vector<float> y(size_t(s.rows) * ldy, kUntouched), expected = y;
      for (int r = 0; r < s.rows; ++r) {
        for (int n = 0; n < ldy; ++n) {
          float sum = 0;
          for (int i = 0; i < s.k && n < s.n; ++i)
            sum = std::fma(w.weight(n, i), x[size_t(r) * ldx + i], sum);
          expected[size_t(r) * ldy + n] = sum;
        }
      }
      kernels_.matmul_f(y.data(), ldy, view(w, bytes), x.data(), ldx, s.rows, 0, tiles);
      for (size_t i = 0; i < y.size(); ++i) ASSERT_EQ(y[i], expected[i]) << "at " << i;
    }
  }
}

// Float formats need no multiple of 32 features.
TEST_P(MatmulTest, FloatFormatsTakeAnyNumberOfFeatures) {
  Random random(4);
  for (WeightFormat format : {WeightFormat::kF32, WeightFormat::kF16, WeightFormat::kBF16}) {
    for (int k : {1, 7, 63, 65, 130}) {
      const Matrix w = random_matrix(random, format, 16, k);
      const AlignedVector<uint8_t> bytes = pack(w);
      const std::vector<float> x = random.normals(k);
      std::vector<float> y(16);
      kernels_.matmul_f(y.data(), 16, view(w, bytes), x.data(), k, 1, 0, 1);
      for (int n = 0; n < 16; ++n) {
        float sum = 0;
        for (int i = 0; i < k; ++i) sum = std::fma(w.weight(n, i), x[i], sum);
        ASSERT_EQ(y[n], sum) << "format " << int(format) << " k " << k << " n " << n;
      }
    }
  }
}

// However rows and tiles are split over calls, a row's result is the same.
TEST_P(MatmulTest, SplittingRowsAndTilesChangesNothing) {
  Random random(5);
  const int rows = 23, n = 112, k = 128, tiles = n / kTileColumns;
  for (WeightFormat format : all_formats()) {
    const Matrix w = random_matrix(random, format, n, k);
    const AlignedVector<uint8_t> bytes = pack(w);
    const std::vector<float> x = random.normals(size_t(rows) * k);
    const auto product = [&](float* y, int row, int num_rows, int tile_begin, int tile_end) {
      if (!is_quantized(format))
        return kernels_.matmul_f(y + row * n, n, view(w, bytes), x.data() + row * k, k, num_rows, tile_begin,
                                 tile_end);
      Rows part = quantize({x.begin() + row * k, x.begin() + (row + num_rows) * k}, num_rows, k, kernels_.q_bytes);
      kernels_.matmul_q(y + row * n, n, view(w, bytes), part.view(), tile_begin, tile_end, nullptr, 0);
    };
    std::vector<float> whole(size_t(rows) * n), parts(size_t(rows) * n, kUntouched);
    product(whole.data(), 0, rows, 0, tiles);
    for (int row = 0; row < rows;) {
      const int num_rows = std::min(random.integer(1, 9), rows - row);
      for (int tile = 0; tile < tiles;) {
        const int end = std::min(tile + random.integer(1, 4), tiles);
        product(parts.data(), row, num_rows, tile, end);
        tile = end;
      }
      row += num_rows;
    }
    ASSERT_NO_FATAL_FAILURE(expect_same_bits(parts, whole, "format " + std::to_string(int(format))));
  }
}

// Pieces of any size, more of them than there are turns and fewer.
TEST_P(MatmulTest, WhatIsAskedForAheadChangesNoBits) {
  Random random(9);
  const int n = 80, k = 160;
  const AlignedVector<uint8_t> memory(4096);
  std::vector<Ahead> ahead;
  for (int i = 0; i < 50; ++i) {
    const int begin = random.integer(0, 4000), length = random.integer(1, 4096 - begin);
    ahead.push_back({memory.data() + begin, memory.data() + begin + length});
  }
  for (WeightFormat format : all_formats()) {
    if (!is_quantized(format)) continue;
    const AlignedVector<uint8_t> bytes = pack(random_matrix(random, format, n, k));
    const PackedMatrix w{format, n, k, bytes.data()};
    for (const int rows : {1, 2, 7, 12, 13, 40}) {
      Rows x = quantize(random.normals(size_t(rows) * k), rows, k, kernels_.q_bytes);
      std::vector<float> without(size_t(rows) * n), with = without;
      kernels_.matmul_q(without.data(), n, w, x.view(), 0, n / kTileColumns, nullptr, 0);
      for (const int count : {1, 50}) {
        kernels_.matmul_q(with.data(), n, w, x.view(), 0, n / kTileColumns, ahead.data(), count);
        ASSERT_NO_FATAL_FAILURE(expect_same_bits(with, without, "format " + std::to_string(int(format)) + ", rows " + std::to_string(rows)));
      }
    }
  }
}

// The ways through a product go by its number of rows: a row's bits do not. K takes several chunks, the last of them odd.
TEST_P(MatmulTest, EveryNumberOfRowsGivesTheSameBits) {
  Random random(8);
  const int most = 40, n = 48, k = 288;
  for (WeightFormat format : all_formats()) {
    if (!is_quantized(format)) continue;
    const Matrix w = random_matrix(random, format, n, k);
    const AlignedVector<uint8_t> bytes = pack(w);
    std::vector<float> x = random.normals(size_t(most) * k);
    for (int i = 0; i < most; i += 3) x[size_t(i) * k + random.integer(0, k - 1)] *= 100;  // a peak
    const auto product = [&](const std::vector<float>& rows) {
      const int num_rows = static_cast<int>(rows.size()) / k;
      Rows quantized = quantize(rows, num_rows, k, kernels_.q_bytes);
      std::vector<float> y(size_t(num_rows) * n);
      kernels_.matmul_q(y.data(), n, view(w, bytes), quantized.view(), 0, n / kTileColumns, nullptr, 0);
      return y;
    };
    std::vector<float> alone;
    for (int row = 0; row < most; ++row) {
      const std::vector<float> y = product({x.begin() + row * k, x.begin() + (row + 1) * k});
      alone.insert(alone.end(), y.begin(), y.end());
    }
    for (int rows = 2; rows <= most; ++rows) {
      const std::vector<float> y = product({x.begin(), x.begin() + rows * k});
      const std::vector<float> expected(alone.begin(), alone.begin() + rows * n);
      const std::string what = "format " + std::to_string(int(format)) + " rows " + std::to_string(rows);
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, expected, what));
    }
  }
}

TEST_P(MatmulTest, NothingOutsideTheTilesIsWritten) {
  Random random(6);
  const int rows = 7, n = 64, k = 64;
  const Matrix w = random_matrix(random, WeightFormat::kInt4, n, k);
  const AlignedVector<uint8_t> bytes = pack(w);
  const std::vector<float> x = random.normals(size_t(rows) * k);
  Rows quantized = quantize(x, rows, k, kernels_.q_bytes);
  std::vector<float> q(size_t(rows) * n, kUntouched), f = q;
  kernels_.matmul_q(q.data(), n, view(w, bytes), quantized.view(), 1, 3, nullptr, 0);
  kernels_.matmul_f(f.data(), n, view(w, bytes), x.data(), k, rows, 1, 3);
  for (int i = 0; i < rows * n; ++i) {
    const bool inside = i % n >= 16 && i % n < 48;
    ASSERT_EQ(q[i] != kUntouched, inside) << i;
    ASSERT_EQ(f[i] != kUntouched, inside) << i;
  }
}

TEST_P(MatmulTest, UnpackedRowsAreTheWeights) {
  Random random(7);
  for (WeightFormat format : all_formats()) {
    const int n = 37, k = 96;
    const Matrix w = random_matrix(random, format, n, k);
    const AlignedVector<uint8_t> bytes = pack(w);
    for (int row = 0; row < n; ++row) {
      std::vector<float> out(k + 1, kUntouched);
      kernels_.unpack_row(out.data(), view(w, bytes), row);
      for (int i = 0; i < k; ++i)
        ASSERT_EQ(out[i], w.weight(row, i)) << "format " << int(format) << " row " << row << " feature " << i;
      ASSERT_EQ(out[k], kUntouched);
    }
  }
}

// Every f16 there is, denormals, infinities and NaN included.
TEST_P(MatmulTest, EveryHalfIsWidenedExactly) {
  for (uint32_t high = 0; high < 65536; high += 4096) {
    AlignedVector<uint8_t> bytes(packed_bytes(WeightFormat::kF16, 16, 4096));
    for (uint32_t i = 0; i < 4096; ++i) {
      const uint16_t half = static_cast<uint16_t>(high + i);
      std::memcpy(bytes.data() + size_t(i) * kTileColumns * 2, &half, 2);
    }
    std::vector<float> out(4096);
    kernels_.unpack_row(out.data(), {WeightFormat::kF16, 16, 4096, bytes.data()}, 0);
    for (uint32_t i = 0; i < 4096; ++i) {
      const float expected = f16_to_f32(static_cast<uint16_t>(high + i));
      if (std::isnan(expected))
        ASSERT_TRUE(std::isnan(out[i])) << high + i;
      else
        ASSERT_EQ(std::memcmp(&out[i], &expected, 4), 0)
            << high + i << ": " << out[i] << ", expected " << expected;
    }
  }
}

}  // namespace
}  // namespace motet
