// Low-rank deltas against the formula in f64, and the promises about rows: mixed, alone, and left alone.
#include <algorithm>

#include "reference.h"

namespace motet {
namespace {

using namespace reference;

class LoraTest : public KernelTest {};
MOTET_TEST_ALL_KERNELS(LoraTest);

constexpr float kUntouched = 12345;
const ElementType kTypes[] = {ElementType::kF32, ElementType::kF16, ElementType::kBF16};

// One adapter module laid out as kernels.h says, and its numbers as they are after rounding to its type.
struct Adapter {
  int rank, k, n;
  std::vector<float> a;           // [rank, k]
  std::vector<float> b;           // [n, rank]
  std::vector<float> gain, bias;  // [n], or empty
  LoraModule module;

  Adapter(Random& random, ElementType type, int rank, int k, int n, bool with_gain, bool with_bias)
      : rank(rank), k(k), n(n), a(random.normals(size_t(rank) * k)), b(random.normals(size_t(n) * rank)) {
    const int tiles = (n + kLoraTileColumns - 1) / kLoraTileColumns;
    for (float& x : a) x = round_to(type, x);
    for (float& x : b) x = round_to(type, x);
    if (with_gain) gain = random.normals(n);
    if (with_bias) bias = random.normals(n);
    for (int j = 0; j < rank; ++j) {
      a_bytes_.push_back(
          encode(type, std::vector<float>(a.begin() + size_t(j) * k, a.begin() + size_t(j + 1) * k)));
    }
    for (int tile = 0; tile < tiles; ++tile) {
      std::vector<float> columns(size_t(rank) * kLoraTileColumns), gains(kLoraTileColumns),
          biases(kLoraTileColumns);
      for (int c = 0; c < kLoraTileColumns && tile * kLoraTileColumns + c < n; ++c) {
        const int column = tile * kLoraTileColumns + c;
        for (int j = 0; j < rank; ++j)
          columns[size_t(j) * kLoraTileColumns + c] = b[size_t(column) * rank + j];
        if (with_gain) gains[c] = gain[column];
        if (with_bias) biases[c] = bias[column];
      }
      b_bytes_.push_back(encode(type, columns));
      gain_.push_back(gains);
      bias_.push_back(biases);
    }
    for (const auto& row : a_bytes_) a_rows_.push_back(row.data());
    for (const auto& tile : b_bytes_) b_tiles_.push_back(tile.data());
    for (const auto& tile : gain_) gain_tiles_.push_back(tile.data());
    for (const auto& tile : bias_) bias_tiles_.push_back(tile.data());
    module = {rank,
              0.37f,
              type,
              a_rows_.data(),
              b_tiles_.data(),
              with_gain ? gain_tiles_.data() : nullptr,
              with_bias ? bias_tiles_.data() : nullptr};
  }
  Adapter(const Adapter&) = delete;

  int tiles() const { return (n + kLoraTileColumns - 1) / kLoraTileColumns; }

 private:
  std::vector<AlignedVector<uint8_t>> a_bytes_, b_bytes_;
  std::vector<std::vector<float>> gain_, bias_;
  std::vector<const void*> a_rows_, b_tiles_;
  std::vector<const float*> gain_tiles_, bias_tiles_;
};

TEST_P(LoraTest, ShrinkIsTheDotProduct) {
  Random random(21);
  for (ElementType type : kTypes) {
    for (const int k : {1, 15, 16, 17, 63, 64, 65, 113, 576}) {
      for (const int num_rows : {1, 4, 7}) {
        const Adapter adapter(random, type, 5, k, 1, false, false);
        const int ldx = k + 3, lds = 8;
        const std::vector<float> x = random.normals(size_t(2 * num_rows) * ldx);
        std::vector<int32_t> rows;
        for (int i = 0; i < num_rows; ++i) rows.push_back(2 * (num_rows - 1 - i));
        std::vector<float> s(size_t(num_rows) * lds, kUntouched);
        kernels_.lora_shrink(s.data(), lds, x.data(), ldx, rows.data(), num_rows, k, adapter.module, 1, 4);
        for (int i = 0; i < num_rows; ++i) {
          for (int j = 0; j < lds; ++j) {
            if (j < 1 || j >= 4) {
              ASSERT_EQ(s[size_t(i) * lds + j], kUntouched);
              continue;
            }
            double exact = 0, size = 0;
            for (int f = 0; f < k; ++f) {
              const double term = double(x[size_t(rows[i]) * ldx + f]) * adapter.a[size_t(j) * k + f];
              exact += term;
              size += std::fabs(term);
            }
            // Chains of at most k / 64 + 1 roundings and six more to combine them, each 2^-24 of the terms'
            // size.
            ASSERT_NEAR(s[size_t(i) * lds + j], exact, size * (k / 64 + 7) * 0x1p-24)
                << "type " << int(type) << " k " << k << " row " << i << " j " << j;
          }
        }
      }
    }
  }
}

TEST_P(LoraTest, ExpandAddsTheWeightedDelta) {
  Random random(22);
  for (ElementType type : kTypes) {
    for (const int n : {1, 16, 63, 64, 65, 130}) {
      for (const int rank : {1, 3, 16}) {
        for (const int extras : {0, 1, 2, 3}) {
          const Adapter adapter(random, type, rank, 1, n, extras & 1, extras & 2);
          const int num_rows = 5, all_rows = 9, ldy = n + 2, lds = rank + 1;
          const std::vector<int32_t> rows = {0, 2, 3, 7, 8};
          const std::vector<float> weights = random.normals(num_rows),
                                   s = random.normals(size_t(num_rows) * lds),
                                   base = random.normals(size_t(all_rows) * ldy);
          const std::vector<float> before = random.normals(size_t(all_rows) * ldy);
          std::vector<float> y = before;
          kernels_.lora_expand(y.data(), ldy, base.data(), ldy, s.data(), lds, rows.data(), weights.data(),
                               num_rows, n, adapter.module, 0, adapter.tiles());
          std::vector<double> expected(before.begin(), before.end());
          for (int i = 0; i < num_rows; ++i) {
            for (int c = 0; c < n; ++c) {
              double delta = extras & 2 ? adapter.bias[c] : 0;
              for (int j = 0; j < rank; ++j)
                delta += double(s[size_t(i) * lds + j]) * adapter.b[size_t(c) * rank + j];
              delta *= adapter.module.scaling;
              const size_t at = size_t(rows[i]) * ldy + c;
              if (extras & 1) delta = adapter.gain[c] * delta + (adapter.gain[c] - 1.0) * base[at];
              expected[at] += weights[i] * delta;
            }
          }
          for (size_t i = 0; i < y.size(); ++i) {
            const bool is_in_rows =
                std::count(rows.begin(), rows.end(), i / ldy) != 0 && static_cast<int>(i % ldy) < n;
            // A couple of dozen roundings of values whose size is at most a few tens.
            if (is_in_rows)
              ASSERT_NEAR(y[i], expected[i], 1e-4) << "type " << int(type) << " n " << n << " rank " << rank
                                                   << " extras " << extras << " at " << i;
            else
              ASSERT_EQ(y[i], before[i]) << "column or row that is not the module's, at " << i;
          }
        }
      }
    }
  }
}

// A row's delta is the same in a batch, alone, and whatever the split of ranks and tiles over calls.
TEST_P(LoraTest, RowsAreIndependent) {
  Random random(23);
  for (ElementType type : kTypes) {
    const int rank = 9, k = 200, n = 150, num_rows = 11;
    const Adapter adapter(random, type, rank, k, n, true, true);
    const std::vector<float> x = random.normals(size_t(num_rows) * k),
                             base = random.normals(size_t(num_rows) * n);
    std::vector<int32_t> rows(num_rows);
    for (int i = 0; i < num_rows; ++i) rows[i] = i;
    const std::vector<float> weights = random.normals(num_rows);
    std::vector<float> s(size_t(num_rows) * rank), y = base, s_alone = s, y_alone = base;
    kernels_.lora_shrink(s.data(), rank, x.data(), k, rows.data(), num_rows, k, adapter.module, 0, rank);
    kernels_.lora_expand(y.data(), n, y.data(), n, s.data(), rank, rows.data(), weights.data(), num_rows, n,
                         adapter.module, 0, adapter.tiles());
    for (int i = 0; i < num_rows; ++i) {
      float* own = s_alone.data() + size_t(i) * rank;
      for (int j = 0; j < rank; j += 4)
        kernels_.lora_shrink(own, rank, x.data(), k, &rows[i], 1, k, adapter.module, j,
                             std::min(j + 4, rank));
      for (int tile = 0; tile < adapter.tiles(); ++tile) {
        kernels_.lora_expand(y_alone.data(), n, base.data(), n, own, rank, &rows[i], &weights[i], 1, n,
                             adapter.module, tile, tile + 1);
      }
    }
    ASSERT_NO_FATAL_FAILURE(expect_same_bits(s, s_alone, "shrink"));
    ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, y_alone, "expand"));
  }
}

TEST_P(LoraTest, EveryVariantAgreesWithScalarToTheBit) {
  Random random(24);
  const Kernels& scalar = *kernels_by_name("scalar");
  for (ElementType type : kTypes) {
    for (const int k : {17, 576, 1000}) {
      const int rank = 8, n = 100, num_rows = 6;
      const Adapter adapter(random, type, rank, k, n, true, true);
      const std::vector<float> x = random.normals(size_t(num_rows) * k),
                               base = random.normals(size_t(num_rows) * n),
                               weights = random.normals(num_rows);
      const std::vector<int32_t> rows = {0, 1, 2, 3, 4, 5};
      const auto delta = [&](const Kernels& kernels) {
        std::vector<float> s(size_t(num_rows) * rank), y = base;
        kernels.lora_shrink(s.data(), rank, x.data(), k, rows.data(), num_rows, k, adapter.module, 0, rank);
        kernels.lora_expand(y.data(), n, base.data(), n, s.data(), rank, rows.data(), weights.data(),
                            num_rows, n, adapter.module, 0, adapter.tiles());
        return y;
      };
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(delta(kernels_), delta(scalar)));
    }
  }
}

TEST_P(LoraTest, AZeroBChangesNothing) {
  Random random(25);
  Adapter adapter(random, ElementType::kBF16, 4, 32, 64, false, false);
  const AlignedVector<uint8_t> zeros(size_t(4) * kLoraTileColumns * 2);
  const void* tiles[] = {zeros.data()};
  adapter.module.b_tiles = tiles;
  const std::vector<float> s = random.normals(4), before = random.normals(64);
  std::vector<float> y = before;
  const int32_t row = 0;
  const float weight = 1;
  kernels_.lora_expand(y.data(), 64, y.data(), 64, s.data(), 4, &row, &weight, 1, 64, adapter.module, 0, 1);
  expect_same_bits(y, before);
}

}  // namespace
}  // namespace motet
