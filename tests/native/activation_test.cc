// silu_mul, gelu_mul and add against double precision over the whole range of f32, and across instruction sets.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/kernels.h"
#include "reference.h"

namespace motet {
namespace {

using reference::available_kernels;
using reference::random_floats;

double silu(double x) { return x / (1 + std::exp(-x)); }

// As PyTorch's approximate="tanh".
double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

using Activate = decltype(Kernels::silu_mul);

std::vector<float> activate(Activate kernel, const std::vector<float>& gate) {
  const int n = static_cast<int>(gate.size());
  const std::vector<float> up(n, 1.0f);
  std::vector<float> out(n);
  kernel(out.data(), n, gate.data(), n, up.data(), n, 1, n);
  return out;
}

std::vector<float> grid(float from, float to, int n) {
  std::vector<float> values(n);
  for (int i = 0; i < n; ++i) values[i] = from + (to - from) * i / (n - 1);
  return values;
}

TEST(Activation, SiluIsRightToOneInAMillion) {
  const std::vector<float> gate = grid(-87, 100, 20011);
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> out = activate(k->silu_mul, gate);
    for (size_t i = 0; i < gate.size(); ++i)
      ASSERT_NEAR(out[i], silu(gate[i]), 1e-6 * std::abs(silu(gate[i]))) << k->name << " x " << gate[i];
  }
}

TEST(Activation, GeluIsTheTanhApproximationToOneInAMillionOfItsInput) {
  const std::vector<float> gate = grid(-12, 12, 20011);
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> out = activate(k->gelu_mul, gate);
    for (size_t i = 0; i < gate.size(); ++i) {
      // In the far left tail the result is a tiny fraction of x, and cancels in PyTorch's form; so of x, not of it.
      ASSERT_NEAR(out[i], gelu_tanh(gate[i]), 1e-6 * std::abs(gate[i])) << k->name << " x " << gate[i];
      if (gate[i] > -2) {
        ASSERT_NEAR(out[i], gelu_tanh(gate[i]), 2e-6 * std::abs(gelu_tanh(gate[i]))) << k->name << " x " << gate[i];
      }
    }
  }
}

TEST(Activation, LargeInputsGiveTheirLimitsNotNaN) {
  const std::vector<float> gate = {1e4f, 1e20f, 3e38f, INFINITY, -1e4f, -1e20f, -3e38f, 0.0f};
  const std::vector<float> expected = {1e4f, 1e20f, 3e38f, INFINITY, 0.0f, 0.0f, 0.0f, 0.0f};
  for (const Kernels* k : available_kernels()) {
    EXPECT_EQ(activate(k->silu_mul, gate), expected) << k->name;
    EXPECT_EQ(activate(k->gelu_mul, gate), expected) << k->name;
  }
}

TEST(Activation, GivesTheSameBitsOnEveryInstructionSetForAnyNumberOfRows) {
  constexpr int kRows = 3;
  for (const int n : {1, 15, 16, 17, 100, 1536}) {
    const int64_t ldg = n + 1, ldu = n + 2, ldo = n + 3;
    const std::vector<float> gate = random_floats(kRows * ldg, n, 8), up = random_floats(kRows * ldu, n + 1);
    for (const Activate Kernels::* kernel : {&Kernels::silu_mul, &Kernels::gelu_mul}) {
      std::vector<float> alone(kRows * ldo, -1.0f);
      for (int r = 0; r < kRows; ++r) {
        (kernels_by_name("scalar")->*kernel)(&alone[r * ldo], ldo, &gate[r * ldg], ldg, &up[r * ldu], ldu, 1, n);
      }
      for (const Kernels* k : available_kernels()) {
        std::vector<float> together(kRows * ldo, -1.0f);
        (k->*kernel)(together.data(), ldo, gate.data(), ldg, up.data(), ldu, kRows, n);
        EXPECT_EQ(std::memcmp(together.data(), alone.data(), alone.size() * 4), 0) << k->name << " n " << n;
      }
    }
  }
}

TEST(Activation, MultipliesByTheOtherBranch) {
  const std::vector<float> gate = random_floats(33, 1), up = random_floats(33, 2);
  for (const Kernels* k : available_kernels()) {
    std::vector<float> out(33);
    k->silu_mul(out.data(), 33, gate.data(), 33, up.data(), 33, 1, 33);
    for (int i = 0; i < 33; ++i) ASSERT_NEAR(out[i], silu(gate[i]) * up[i], 1e-6 * std::abs(silu(gate[i]) * up[i]));
  }
}

TEST(Activation, AddIsTheExactSum) {
  for (const int n : {0, 1, 16, 31, 576}) {
    const std::vector<float> x = random_floats(n + 1, 1), before = random_floats(n + 1, 2);
    for (const Kernels* k : available_kernels()) {
      std::vector<float> y = before;
      k->add(y.data(), x.data(), n);
      for (int i = 0; i < n; ++i) ASSERT_EQ(y[i], before[i] + x[i]) << k->name;
      EXPECT_EQ(y[n], before[n]) << "beyond n";
    }
  }
}

}  // namespace
}  // namespace motet
