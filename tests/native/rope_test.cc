// rope against the rotation written as in Hugging Face's Llama, for any head dimension, batch and instruction set.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "reference.h"

namespace motet {
namespace {

using reference::available_kernels;
using reference::random_floats;

constexpr int kMaxPositions = 40;

struct Tables {
  std::vector<float> cos, sin;  // [kMaxPositions, D/2]
};

Tables tables(int head_dim) {
  Tables t;
  for (int p = 0; p < kMaxPositions; ++p) {
    for (int i = 0; i < head_dim / 2; ++i) {
      const double angle = p * std::pow(10000.0, -2.0 * i / head_dim);
      t.cos.push_back(static_cast<float>(std::cos(angle)));
      t.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return t;
}

const int kHeadDims[] = {2, 16, 30, 32, 48, 64, 80, 96, 128, 256};

TEST(Rope, RotatesEachPairOfHalvesByItsPosition) {
  constexpr int kHeads = 3;
  const std::vector<int32_t> positions = {7, 0, 39};
  for (const Kernels* k : available_kernels()) {
    for (const int head_dim : kHeadDims) {
      const Tables t = tables(head_dim);
      const int64_t ld = kHeads * head_dim + 5;
      const std::vector<float> before = random_floats(positions.size() * ld, head_dim);
      std::vector<float> x = before;
      k->rope(x.data(), ld, kHeads, head_dim, positions.data(), 3, t.cos.data(), t.sin.data());
      for (size_t r = 0; r < positions.size(); ++r) {
        for (int c = 0; c < ld; ++c) {
          const size_t at = r * ld + c;
          if (c >= kHeads * head_dim) {
            ASSERT_EQ(x[at], before[at]) << "beyond the heads";
            continue;
          }
          const int d = c % head_dim, half = head_dim / 2;
          const int i = positions[r] * half + d % half;
          const double rotated = d < half ? -before[at + half] : before[at - half];  // rotate_half(x)
          const double expected = static_cast<double>(before[at]) * t.cos[i] + rotated * t.sin[i];
          // Two products and a sum of values up to about 4, each rounded to 2^-24.
          ASSERT_NEAR(x[at], expected, 1e-6) << k->name << " D " << head_dim << " row " << r << " column " << c;
        }
      }
    }
  }
}

TEST(Rope, LeavesPositionZeroAsItIs) {
  const Tables t = tables(64);
  const int32_t position = 0;
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> before = random_floats(64, 3);
    std::vector<float> x = before;
    k->rope(x.data(), 64, 1, 64, &position, 1, t.cos.data(), t.sin.data());
    EXPECT_EQ(x, before) << k->name;
  }
}

TEST(Rope, GivesTheSameBitsOnEveryInstructionSetForAnyNumberOfRows) {
  constexpr int kHeads = 2, kRows = 4;
  const std::vector<int32_t> positions = {3, 4, 5, 38};
  for (const int head_dim : kHeadDims) {
    const Tables t = tables(head_dim);
    const int64_t ld = kHeads * head_dim;
    const std::vector<float> before = random_floats(kRows * ld, head_dim);
    std::vector<float> alone = before;
    for (int r = 0; r < kRows; ++r) {
      kernels_by_name("scalar")->rope(&alone[r * ld], ld, kHeads, head_dim, &positions[r], 1, t.cos.data(),
                                      t.sin.data());
    }
    for (const Kernels* k : available_kernels()) {
      std::vector<float> together = before;
      k->rope(together.data(), ld, kHeads, head_dim, positions.data(), kRows, t.cos.data(), t.sin.data());
      EXPECT_EQ(std::memcmp(together.data(), alone.data(), alone.size() * 4), 0) << k->name << " D " << head_dim;
    }
  }
}

}  // namespace
}  // namespace motet
