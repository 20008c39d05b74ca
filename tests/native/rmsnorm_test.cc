// rmsnorm against a double-precision reference, and its two laws: rows stand alone, and instruction sets agree.
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

const int kWidths[] = {1, 15, 16, 17, 63, 64, 65, 80, 127, 576, 1000, 4096};

TEST(Rmsnorm, MatchesTheFormulaInDoublePrecision) {
  for (const Kernels* k : available_kernels()) {
    for (const int n : kWidths) {
      const std::vector<float> x = random_floats(n, n), weight = random_floats(n, n + 1);
      std::vector<float> y(n);
      k->rmsnorm(y.data(), n, x.data(), n, weight.data(), 1, n, 1e-5f);
      double squares = 0;
      for (const float v : x) squares += static_cast<double>(v) * v;
      const double factor = 1 / std::sqrt(squares / n + 1e-5);
      for (int i = 0; i < n; ++i) {
        const double expected = x[i] * factor * weight[i];
        // A few roundings of 2^-24 each; the sum's error shrinks with the root.
        ASSERT_NEAR(y[i], expected, 1e-6 * std::abs(expected)) << k->name << " n " << n << " i " << i;
      }
    }
  }
}

TEST(Rmsnorm, GivesTheSameBitsOnEveryInstructionSetForAnyNumberOfRows) {
  constexpr int kRows = 5;
  for (const int n : kWidths) {
    const int64_t ld = n + 3;
    const std::vector<float> x = random_floats(kRows * ld, n), weight = random_floats(n, n + 1);
    std::vector<float> alone(kRows * ld, -1.0f);
    for (int r = 0; r < kRows; ++r)
      kernels_by_name("scalar")->rmsnorm(&alone[r * ld], ld, &x[r * ld], ld, weight.data(), 1, n, 1e-6f);
    for (const Kernels* k : available_kernels()) {
      std::vector<float> together(kRows * ld, -1.0f);
      k->rmsnorm(together.data(), ld, x.data(), ld, weight.data(), kRows, n, 1e-6f);
      // Equal everywhere, so the gap between two rows is untouched as well.
      EXPECT_EQ(std::memcmp(together.data(), alone.data(), alone.size() * 4), 0) << k->name << " n " << n;
    }
  }
}

TEST(Rmsnorm, WorksInPlace) {
  constexpr int kN = 70;
  for (const Kernels* k : available_kernels()) {
    std::vector<float> x = random_floats(kN, 1), y(kN);
    const std::vector<float> weight = random_floats(kN, 2);
    k->rmsnorm(y.data(), kN, x.data(), kN, weight.data(), 1, kN, 1e-5f);
    k->rmsnorm(x.data(), kN, x.data(), kN, weight.data(), 1, kN, 1e-5f);
    EXPECT_EQ(x, y) << k->name;
  }
}

TEST(Rmsnorm, OfZerosIsZeros) {
  const std::vector<float> weight(20, 3.0f);
  for (const Kernels* k : available_kernels()) {
    std::vector<float> x(20, 0.0f);
    k->rmsnorm(x.data(), 20, x.data(), 20, weight.data(), 1, 20, 1e-5f);
    EXPECT_EQ(x, std::vector<float>(20, 0.0f)) << k->name;
  }
}

}  // namespace
}  // namespace motet
