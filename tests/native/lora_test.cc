// Low-rank deltas against the formula in f64, and the promises about rows: mixed, alone, and left alone.
#include <algorithm>
#include <memory>

#include "reference.h"

namespace motet {
namespace {

using namespace reference;

class LoraTest : public KernelTest {};
MOTET_TEST_ALL_KERNELS(LoraTest);

constexpr float kUntouched = 12345;
const LoraFormat kFormats[] = {LoraFormat::kF32, LoraFormat::kF16, LoraFormat::kBF16, LoraFormat::kInt8};

// One adapter module laid out as kernels.h says, and its numbers as they are after rounding to its format.
// Those of an int8 A are whole; B's scales, random here, are of any size.
struct Adapter {
  int rank, k, n;
  std::vector<float> a;           // [rank, k]
  std::vector<float> b;           // [n, rank]
  std::vector<float> gain, bias;  // [n], or empty
  LoraModule module;

  Adapter(Random& random, LoraFormat format, int rank, int k, int n, bool with_gain, bool with_bias)
      : rank(rank), k(k), n(n), a(random.normals(size_t(rank) * k)), b(random.normals(size_t(n) * rank)) {
    const int tiles = (n + kLoraTileColumns - 1) / kLoraTileColumns;
    const bool is_int8 = format == LoraFormat::kInt8;
    for (float& x : a) x = round(format, x);
    if (with_gain) gain = random.normals(n);
    if (with_bias) bias = random.normals(n);
    for (int j = 0; j < rank; ++j) {
      a_bytes_.push_back(
          lay_out(format, std::vector<float>(a.begin() + size_t(j) * k, a.begin() + size_t(j + 1) * k)));
    }
    for (int tile = 0; tile < tiles; ++tile) {
      AlignedVector<uint8_t> bytes(is_int8 ? lora_scale_bytes(rank) : 0);
      std::vector<float> gains(kLoraTileColumns), biases(kLoraTileColumns);
      const std::vector<float> scales = random.normals(rank, 0.02f);
      for (int j = 0; is_int8 && j < rank; ++j) std::memcpy(&bytes[size_t(j) * 4], &scales[j], 4);
      for (int j = 0; j < rank; ++j) {
        std::vector<float> columns(kLoraTileColumns);
        for (int c = 0; c < kLoraTileColumns && tile * kLoraTileColumns + c < n; ++c) {
          const int column = tile * kLoraTileColumns + c;
          float& value = b[size_t(column) * rank + j];
          columns[c] = value = round(format, value);
          if (is_int8) value *= scales[j];
          if (with_gain) gains[c] = gain[column];
          if (with_bias) biases[c] = bias[column];
        }
        const auto row = lay_out(format, columns);
        bytes.insert(bytes.end(), row.begin(), row.end());
      }
      b_bytes_.push_back(bytes);
      gain_.push_back(gains);
      bias_.push_back(biases);
    }
    for (const auto& row : a_bytes_) a_rows_.push_back(row.data());
    for (const auto& tile : b_bytes_) b_tiles_.push_back(tile.data());
    for (const auto& tile : gain_) gain_tiles_.push_back(tile.data());
    for (const auto& tile : bias_) bias_tiles_.push_back(tile.data());
    module = {rank,
              0.37f,
              format,
              a_rows_.data(),
              b_tiles_.data(),
              with_gain ? gain_tiles_.data() : nullptr,
              with_bias ? bias_tiles_.data() : nullptr};
  }
  Adapter(const Adapter&) = delete;

  int tiles() const { return (n + kLoraTileColumns - 1) / kLoraTileColumns; }

 private:
  static float round(LoraFormat format, float x) {
    if (format == LoraFormat::kInt8) return std::clamp(std::nearbyint(40 * x), -127.0f, 127.0f);
    return round_to(element_type(format), x);
  }
  static ElementType element_type(LoraFormat format) {
    return format == LoraFormat::kF32   ? ElementType::kF32
           : format == LoraFormat::kF16 ? ElementType::kF16
                                        : ElementType::kBF16;
  }
  // A row as kernels.h says: bf16 in pairs 16 apart, filled up; the others as they come.
  static AlignedVector<uint8_t> lay_out(LoraFormat format, std::vector<float> row) {
    if (format == LoraFormat::kInt8) {
      AlignedVector<uint8_t> bytes;
      for (const float x : row) bytes.push_back(static_cast<uint8_t>(static_cast<int8_t>(x)));
      return bytes;
    }
    if (format == LoraFormat::kBF16) {
      row.resize((row.size() + 31) / 32 * 32);
      std::vector<float> paired;
      for (size_t first = 0; first < row.size(); first += 32) {
        for (size_t i = 0; i < 16; ++i) paired.insert(paired.end(), {row[first + i], row[first + i + 16]});
      }
      row = paired;
    }
    return encode(element_type(format), row);
  }

  std::vector<AlignedVector<uint8_t>> a_bytes_, b_bytes_;
  std::vector<std::vector<float>> gain_, bias_;
  std::vector<const void*> a_rows_, b_tiles_;
  std::vector<const float*> gain_tiles_, bias_tiles_;
};

TEST_P(LoraTest, ShrinkIsTheDotProduct) {
  Random random(21);
  for (const LoraFormat format : kFormats) {
    for (const int k : {1, 15, 16, 17, 63, 64, 65, 113, 576}) {
      for (const int num_rows : {1, 4, 7}) {
        const Adapter adapter(random, format, 5, k, 1, false, false);
        const int ldx = k + 3, lds = 8;
        const std::vector<float> x = random.normals(size_t(2 * num_rows) * ldx);
        std::vector<int32_t> rows;
        for (int i = 0; i < num_rows; ++i) rows.push_back(2 * (num_rows - 1 - i));
        std::vector<float> s(size_t(num_rows) * lds, kUntouched);
        const LoraJob job{&adapter.module, rows.data(), nullptr, s.data(), lds, num_rows};
        const int skipped = num_rows / 4;  // rows of the job that another call computes
        kernels_.lora_shrink(&job, 1, x.data(), ldx, k, skipped, num_rows, 1, 4);
        for (int i = 0; i < num_rows; ++i) {
          for (int j = 0; j < lds; ++j) {
            if (i < skipped || j < 1 || j >= 4) {
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
                << "format " << int(format) << " k " << k << " row " << i << " j " << j;
          }
        }
      }
    }
  }
}

TEST_P(LoraTest, ExpandAddsTheWeightedDelta) {
  Random random(22);
  for (const LoraFormat format : kFormats) {
    for (const int n : {1, 16, 63, 64, 65, 130}) {
      for (const int rank : {1, 3, 16}) {
        for (const int extras : {0, 1, 2, 3}) {
          const Adapter adapter(random, format, rank, 1, n, extras & 1, extras & 2);
          const int num_rows = 5, all_rows = 9, ldy = n + 2, lds = rank + 1;
          const std::vector<int32_t> rows = {0, 2, 3, 7, 8};
          const std::vector<float> weights = random.normals(num_rows),
                                   s = random.normals(size_t(num_rows) * lds),
                                   base = random.normals(size_t(all_rows) * ldy);
          const std::vector<float> before = random.normals(size_t(all_rows) * ldy);
          std::vector<float> y = before;
          const LoraJob job{&adapter.module, rows.data(), weights.data(), const_cast<float*>(s.data()), lds,
                            num_rows};
          kernels_.lora_expand(y.data(), ldy, base.data(), ldy, &job, 1, n, 0, adapter.tiles());
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
              ASSERT_NEAR(y[i], expected[i], 1e-4) << "format " << int(format) << " n " << n << " rank "
                                                   << rank << " extras " << extras << " at " << i;
            else
              ASSERT_EQ(y[i], before[i]) << "column or row that is not the module's, at " << i;
          }
        }
      }
    }
  }
}

// One call with many jobs is one call for each in their order: those that are read side by side, and others.
TEST_P(LoraTest, JobsAreIndependent) {
  Random random(26);
  constexpr int kRows = 12, kColumns = 200, kFeatures = 150;
  struct Case {
    int rank, num_rows;
  };
  const Case cases[] = {{8, 1}, {8, 1},  {8, 1},  {8, 1},  {8, 1},  {1, 1},  {1, 1},  {64, 1}, {64, 1},
                        {2, 3}, {16, 7}, {16, 1}, {16, 1}, {16, 1}, {16, 1}, {16, 1}, {3, 1}};
  for (const LoraFormat format : kFormats) {
    std::vector<std::unique_ptr<Adapter>> adapters;
    std::vector<std::vector<float>> s;
    std::vector<std::vector<int32_t>> rows;
    std::vector<LoraJob> jobs;
    const std::vector<float> weights = random.normals(kRows), x = random.normals(kRows * kFeatures),
                             before = random.normals(kRows * kColumns);
    for (const Case& one : cases) {
      // Some adapters of another format: those do not go with their neighbours.
      const bool is_other = adapters.size() % 7 == 6;
      adapters.push_back(std::make_unique<Adapter>(random, is_other ? LoraFormat::kF16 : format, one.rank,
                                                   kFeatures, kColumns, one.rank == 3, one.rank == 8));
      rows.push_back({});
      const int first = random.integer(0, kRows - one.num_rows);
      for (int r = 0; r < one.num_rows; ++r) rows.back().push_back(first + r);
      s.emplace_back(size_t(one.num_rows) * one.rank);
    }
    for (size_t i = 0; i < adapters.size(); ++i)
      jobs.push_back({&adapters[i]->module, rows[i].data(), weights.data(), s[i].data(), adapters[i]->rank,
                      static_cast<int32_t>(rows[i].size())});
    const int num_jobs = static_cast<int>(jobs.size());
    for (const LoraJob& job : jobs)
      kernels_.lora_shrink(&job, 1, x.data(), kFeatures, kFeatures, 0, job.num_rows, 0, job.module->rank);
    const auto alone = s;
    for (auto& one : s) std::fill(one.begin(), one.end(), kUntouched);
    for (int first = 0;
         first < num_jobs;) {  // runs of the same rank and number of rows, as shrink wants them
      int end = first + 1;
      while (end < num_jobs && jobs[end].module->rank == jobs[first].module->rank &&
             jobs[end].num_rows == jobs[first].num_rows)
        ++end;
      kernels_.lora_shrink(&jobs[first], end - first, x.data(), kFeatures, kFeatures, 0, jobs[first].num_rows,
                           0, jobs[first].module->rank);
      first = end;
    }
    for (size_t i = 0; i < s.size(); ++i) ASSERT_NO_FATAL_FAILURE(expect_same_bits(s[i], alone[i], "shrink"));
    for (const auto& [begin, end] : {std::pair(0, 4), std::pair(1, 2), std::pair(3, 4), std::pair(2, 2)}) {
      std::vector<float> y = before, one_by_one = before;
      kernels_.lora_expand(y.data(), kColumns, before.data(), kColumns, jobs.data(), num_jobs, kColumns,
                           begin, end);
      for (const LoraJob& job : jobs)
        kernels_.lora_expand(one_by_one.data(), kColumns, before.data(), kColumns, &job, 1, kColumns, begin,
                             end);
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, one_by_one, "expand"));
    }
    std::vector<float> y = before;
    kernels_.lora_expand(y.data(), kColumns, before.data(), kColumns, jobs.data(), 0, kColumns, 0, 4);
    expect_same_bits(y, before);
  }
}

// A row's delta is the same in a batch, alone, and whatever the split of ranks and tiles over calls.
TEST_P(LoraTest, RowsAreIndependent) {
  Random random(23);
  for (const LoraFormat format : kFormats) {
    const int rank = 9, k = 200, n = 150, num_rows = 11;
    const Adapter adapter(random, format, rank, k, n, true, true);
    const std::vector<float> x = random.normals(size_t(num_rows) * k),
                             base = random.normals(size_t(num_rows) * n);
    std::vector<int32_t> rows(num_rows);
    for (int i = 0; i < num_rows; ++i) rows[i] = i;
    const std::vector<float> weights = random.normals(num_rows);
    std::vector<float> s(size_t(num_rows) * rank), y = base, s_alone = s, y_alone = base;
    const LoraJob together{&adapter.module, rows.data(), weights.data(), s.data(), rank, num_rows};
    kernels_.lora_shrink(&together, 1, x.data(), k, k, 0, num_rows, 0, rank);
    kernels_.lora_expand(y.data(), n, y.data(), n, &together, 1, n, 0, adapter.tiles());
    for (int i = 0; i < num_rows; ++i) {
      const LoraJob alone{&adapter.module, &rows[i], &weights[i], s_alone.data() + size_t(i) * rank, rank, 1};
      for (int j = 0; j < rank; j += 4)
        kernels_.lora_shrink(&alone, 1, x.data(), k, k, 0, 1, j, std::min(j + 4, rank));
      for (int tile = 0; tile < adapter.tiles(); ++tile)
        kernels_.lora_expand(y_alone.data(), n, base.data(), n, &alone, 1, n, tile, tile + 1);
    }
    ASSERT_NO_FATAL_FAILURE(expect_same_bits(s, s_alone, "shrink"));
    ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, y_alone, "expand"));
  }
}

TEST_P(LoraTest, EveryVariantAgreesWithScalarToTheBit) {
  Random random(24);
  const Kernels& scalar = *kernels_by_name("scalar");
  for (const LoraFormat format : kFormats) {
    for (const int k : {17, 576, 1000}) {
      const int rank = 8, n = 100, num_rows = 6;
      const Adapter adapter(random, format, rank, k, n, true, true);
      const std::vector<float> x = random.normals(size_t(num_rows) * k),
                               base = random.normals(size_t(num_rows) * n),
                               weights = random.normals(num_rows);
      const std::vector<int32_t> rows = {0, 1, 2, 3, 4, 5};
      const auto delta = [&](const Kernels& kernels) {
        std::vector<float> s(size_t(num_rows) * rank), y = base;
        const LoraJob job{&adapter.module, rows.data(), weights.data(), s.data(), rank, num_rows};
        kernels.lora_shrink(&job, 1, x.data(), k, k, 0, num_rows, 0, rank);
        kernels.lora_expand(y.data(), n, base.data(), n, &job, 1, n, 0, adapter.tiles());
        return y;
      };
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(delta(kernels_), delta(scalar)));
    }
  }
}

TEST_P(LoraTest, AZeroBChangesNothing) {
  Random random(25);
  Adapter adapter(random, LoraFormat::kBF16, 4, 32, 64, false, false);
  const AlignedVector<uint8_t> zeros(size_t(4) * kLoraTileColumns * 2);
  const void* tiles[] = {zeros.data()};
  adapter.module.b_tiles = tiles;
  std::vector<float> s = random.normals(4);
  const std::vector<float> before = random.normals(64);
  std::vector<float> y = before;
  const int32_t row = 0;
  const float weight = 1;
  const LoraJob job{&adapter.module, &row, &weight, s.data(), 4, 1};
  kernels_.lora_expand(y.data(), 64, y.data(), 64, &job, 1, 64, 0, 1);
  expect_same_bits(y, before);
}

}  // namespace
}  // namespace motet
