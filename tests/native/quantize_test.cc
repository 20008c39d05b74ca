// Rows to int8 groups: the exact rounding of the contract, and what happens at its edges.
#include "reference.h"

namespace motet {
namespace {

using namespace reference;

class QuantizeTest : public KernelTest {
 protected:
  Rows run(const std::vector<float>& x, int num_rows, int k, int ldx) {
    Rows out(num_rows, k, kernels_.q_bytes);
    // In parts, as threads do it: of the rows of one block, or whole blocks.
    const int groups = k / kActivationGroup, cut = num_rows < kRowBlock ? num_rows / 2 : num_rows / kRowBlock / 2 * kRowBlock;
    for (const auto& [row_begin, row_end] : {std::pair{0, cut}, {cut, num_rows}})
      for (const auto& [begin, end] : {std::pair{groups / 3, groups}, {0, groups / 3}})
        kernels_.quantize_rows(out.view(), x.data(), ldx, row_begin, row_end, begin, end);
    return out;
  }
};
MOTET_TEST_ALL_KERNELS(QuantizeTest);

TEST_P(QuantizeTest, MatchesTheContractExactly) {
  Random random(11);
  for (const int num_rows : {1, 3, 16, 21, 40}) {
    for (const int k : {32, 64, 96, 576, 1632}) {
      std::vector<float> x = random.normals(size_t(num_rows) * k);
      for (float& v : x) v *= std::exp2(static_cast<float>(random.integer(-20, 20)));
      const Rows actual = run(x, num_rows, k, k), expected = quantize(x, num_rows, k, kernels_.q_bytes);
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.q, expected.q, "q"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.scale, expected.scale, "scale"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.sums8, expected.sums8, "sums"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.first_sums8, expected.first_sums8, "first sums"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.offsets, expected.offsets, "offsets"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.peak_highs, expected.peak_highs, "peak highs"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.peak_middles, expected.peak_middles, "peak middles"));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(actual.peak_chunks, expected.peak_chunks, "peak chunks"));
    }
  }
}

TEST_P(QuantizeTest, RowsMayLieApart) {
  Random random(12);
  const int k = 64, ldx = 71, num_rows = 4;
  const std::vector<float> x = random.normals(size_t(num_rows) * ldx);
  std::vector<float> dense;
  for (int r = 0; r < num_rows; ++r) dense.insert(dense.end(), x.begin() + r * ldx, x.begin() + r * ldx + k);
  expect_same_bits(run(x, num_rows, k, ldx).q, quantize(dense, num_rows, k, kernels_.q_bytes).q);
}

TEST_P(QuantizeTest, TiesRoundToEven) {
  std::vector<float> x(32, 0.0f);
  x[0] = x[31] = 127;  // scale 1
  const float ties[] = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f};
  const int8_t expected[] = {0, 2, 2, 0, -2, -2, 126};
  for (int i = 0; i < 7; ++i) x[i + 1] = ties[i];
  const Rows out = run(x, 1, 32, 32);
  EXPECT_EQ(out.scale[0], 1.0f);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(out.integer(0, i + 1), expected[i]) << ties[i];
}

// One value a hundred times the others would leave them one bit each; as the peak it leaves them seven.
TEST_P(QuantizeTest, AnOutlierDoesNotCostItsGroupItsPrecision) {
  for (const float outlier : {100.0f, -100.0f}) {
    for (const int place : {0, 5, 16, 31}) {
      std::vector<float> x(32);
      for (int i = 0; i < 32; ++i) x[i] = static_cast<float>(i + 1) / 32;
      x[place] = outlier;
      const Rows out = run(x, 1, 32, 32);
      const float second = place == 31 ? 31.0f / 32 : 1.0f;
      EXPECT_EQ(out.scale[0], second / 127);
      for (int i = 0; i < 32; ++i)
        EXPECT_NEAR(out.scale[0] * out.integer(0, i), x[i], second / 127 / 2 * 1.0001f) << place << " " << i;
    }
  }
}

// Beyond 128 times its neighbours the peak sets the scale.
TEST_P(QuantizeTest, APeakTooWideForItsIntegerSetsTheScale) {
  std::vector<float> x(32, 1.0f);
  x[9] = 16319.0f * 4;
  const Rows out = run(x, 1, 32, 32);
  EXPECT_EQ(out.scale[0], 4.0f);
  EXPECT_EQ(out.integer(0, 9), 16319);
  EXPECT_EQ(out.integer(0, 0), 0);
}

TEST_P(QuantizeTest, ZerosHaveScaleZero) {
  const Rows out = run(std::vector<float>(32, -0.0f), 1, 32, 32);
  EXPECT_EQ(out.scale[0], 0.0f);
  for (int8_t q : out.q) EXPECT_EQ(q, 0);
  EXPECT_EQ(out.sums8[0], 0);
  EXPECT_EQ(out.first_sums8[0], 0);
}

// The quotient of denormals is too coarse to be trusted to stay within ±127.
TEST_P(QuantizeTest, ValuesTooSmallToDivideByAreZero) {
  const Rows out = run(std::vector<float>(32, 1e-44f), 1, 32, 32);
  EXPECT_EQ(out.scale[0], 0.0f);
  for (int8_t q : out.q) EXPECT_EQ(q, 0);
}

TEST_P(QuantizeTest, AValueThatIsNotFiniteShowsInTheScaleOfItsGroupOnly) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const int place : {0, 15, 16, 31}) {
      std::vector<float> x(96, 1.0f);
      x[32 + place] = bad;
      const Rows out = run(x, 1, 96, 96);
      EXPECT_EQ(out.scale[0], 1.0f / 127);
      EXPECT_TRUE(std::isnan(out.scale[1])) << bad << " at " << place;
      EXPECT_EQ(out.scale[2], 1.0f / 127);
      EXPECT_EQ(out.sums8[0], -8 * 32 * 127);
      EXPECT_EQ(out.first_sums8[0], -8 * 16 * 127);
      EXPECT_EQ(out.sums8[1], 0);
    }
  }
}

TEST_P(QuantizeTest, TheLargestFloatSurvives) {
  std::vector<float> x(32, 0.0f);
  x[3] = std::numeric_limits<float>::max();
  x[4] = -x[3];
  const Rows out = run(x, 1, 32, 32);
  EXPECT_EQ(out.integer(0, 3), 127);
  EXPECT_EQ(out.integer(0, 4), -127);
  EXPECT_EQ(out.sums8[0], 0);
}

// The rows of a block go together; each is what it is alone.
TEST_P(QuantizeTest, RowsOfABlockHaveTheBitsOfOneAlone) {
  Random random(13);
  constexpr int kGroups = 2, kK = 32 * kGroups;
  const float specials[] = {NAN, INFINITY, -INFINITY, 0.0f, 1e-44f, -std::numeric_limits<float>::max(), 1e6f, -300.0f, 126.0f};
  for (int turn = 0; turn < 50; ++turn) {
    std::vector<float> x = random.normals(kRowBlock * kK);
    for (int r = 0; r < kRowBlock; ++r) {
      const float special = specials[random.integer(0, 8)];
      float* const group = x.data() + r * kK + 32 * random.integer(0, kGroups - 1);
      const int count = random.integer(0, 2) == 0 ? 32 : random.integer(0, 3);
      for (int i = 0; i < count; ++i) group[count == 32 ? i : random.integer(0, 31)] = special;
    }
    const Rows block = run(x, kRowBlock, kK, kK);
    for (int r = 0; r < kRowBlock; ++r) {
      const Rows one = run({x.begin() + r * kK, x.begin() + (r + 1) * kK}, 1, kK, kK);
      for (int g = 0; g < kGroups; ++g) {
        const size_t at = block.at(r, 32 * g);
        const auto same = [&](const auto& a, const auto& b, size_t width) { return std::memcmp(&a[at * width], &b[g * width], width * sizeof a[0]) == 0; };
        EXPECT_TRUE(same(block.q, one.q, one.q_bytes)) << "row " << r << " group " << g;
        EXPECT_TRUE(same(block.scale, one.scale, 1) && same(block.offsets, one.offsets, 1) && same(block.sums8, one.sums8, 1) &&
                    same(block.first_sums8, one.first_sums8, 1) && same(block.peak_chunks, one.peak_chunks, 1) &&
                    same(block.peak_middles, one.peak_middles, 1) && same(block.peak_highs, one.peak_highs, 1))
            << "row " << r << " group " << g;
      }
    }
  }
}

}  // namespace
}  // namespace motet
