// The functions that simd.h builds itself, against f64, in the plain variant; that the others give the same
// bits is what every kernel's test asserts.
#define MOTET_ISA scalar
#define MOTET_ISA_scalar 1
#include "kernels/simd.h"

#include "reference.h"

namespace motet::scalar {
namespace {

// Error in units of the last place of the exact value's f32.
double ulps(float actual, double exact) {
  const float nearest = std::fabs(static_cast<float>(exact));
  return std::fabs(actual - exact) / (static_cast<double>(std::nextafter(nearest, INFINITY)) - nearest);
}

// Calls check(x) for f32 values spread over all bit patterns.
template <typename Check>
void over_all_floats(Check&& check) {
  for (uint64_t pattern = 0; pattern < uint64_t{1} << 32; pattern += 9973) {
    check(bits_float(static_cast<uint32_t>(pattern)));
  }
}

float lane0(f32x16 v) { return v.v[0]; }

TEST(SimdTest, ExpIsWithinOneAndAHalfUlps) {
  over_all_floats([](float x) {
    const double exact = std::exp(static_cast<double>(x));
    if (std::isnan(x) || exact < std::numeric_limits<float>::min() ||
        exact > std::numeric_limits<float>::max())
      return;
    ASSERT_LE(ulps(lane0(exp(f32_set1(x))), exact), 1.5) << x;
  });
}

TEST(SimdTest, ExpAtItsEnds) {
  EXPECT_EQ(lane0(exp(f32_set1(-INFINITY))), 0.0f);
  EXPECT_EQ(lane0(exp(f32_set1(-1e30f))), 0.0f);
  EXPECT_EQ(lane0(exp(f32_set1(-104.0f))), 0.0f);
  EXPECT_GT(lane0(exp(f32_set1(-100.0f))), 0.0f);  // a denormal
  EXPECT_EQ(lane0(exp(f32_set1(0.0f))), 1.0f);
  EXPECT_EQ(lane0(exp(f32_set1(-0.0f))), 1.0f);
  EXPECT_TRUE(std::isfinite(lane0(exp(f32_set1(88.72f)))));
  EXPECT_EQ(lane0(exp(f32_set1(88.73f))), INFINITY);
  EXPECT_EQ(lane0(exp(f32_set1(INFINITY))), INFINITY);
  EXPECT_TRUE(std::isnan(lane0(exp(f32_set1(NAN)))));
}

TEST(SimdTest, TanhIsWithinTwoUlps) {
  over_all_floats([](float x) {
    if (std::isnan(x) || std::fabs(x) < std::numeric_limits<float>::min()) return;
    ASSERT_LE(ulps(lane0(tanh(f32_set1(x))), std::tanh(static_cast<double>(x))), 2.0) << x;
  });
}

TEST(SimdTest, TanhAtItsEnds) {
  EXPECT_EQ(lane0(tanh(f32_set1(INFINITY))), 1.0f);
  EXPECT_EQ(lane0(tanh(f32_set1(-INFINITY))), -1.0f);
  EXPECT_TRUE(std::signbit(lane0(tanh(f32_set1(-0.0f)))));
  EXPECT_TRUE(std::isnan(lane0(tanh(f32_set1(NAN)))));
}

TEST(SimdTest, HalvesRoundToNearestEven) {
  over_all_floats([](float x) {
    if (!std::isfinite(x)) return;
    uint16_t half[16], brain[16];
    store_f16(half, f32_set1(x));
    store_bf16(brain, f32_set1(x));
    ASSERT_EQ(half[0], reference::f32_to_f16(x)) << x;
    ASSERT_EQ(brain[15], reference::f32_to_bf16(x)) << x;
  });
}

TEST(SimdTest, ConversionToIntegersMarksWhatDoesNotFit) {
  EXPECT_EQ(to_i32(f32_set1(2.5f)).v[0], 2);
  EXPECT_EQ(to_i32(f32_set1(-3.5f)).v[0], -4);
  EXPECT_EQ(to_i32(f32_set1(2147483648.0f)).v[0], INT32_MIN);
  EXPECT_EQ(to_i32(f32_set1(-2147483648.0f)).v[0], INT32_MIN);
  EXPECT_EQ(to_i32(f32_set1(NAN)).v[0], INT32_MIN);
}

TEST(SimdTest, ReductionsAddHalvesOntoEachOther) {
  f32x16 v;
  for (int i = 0; i < 16; ++i) v.v[i] = i < 8 ? 1e8f : (i == 8 ? -1e8f : 1.0f);
  float expected[8];
  for (int i = 0; i < 8; ++i) expected[i] = v.v[i] + v.v[i + 8];
  for (int i = 0; i < 4; ++i) expected[i] = expected[i] + expected[i + 4];
  EXPECT_EQ(reduce_add(v), (expected[0] + expected[2]) + (expected[1] + expected[3]));
  EXPECT_EQ(reduce_max(v), 1e8f);
}

TEST(SimdTest, AddFoursPutsTheEvenAndTheOddSumsInOrder) {
  i32x16 v[8], even, odd;
  for (int i = 0; i < 128; ++i) v[i / 16].v[i % 16] = i * i;
  add_fours(even, odd, v);
  const auto sum = [](int first) { return first * first + (first + 1) * (first + 1) + (first + 2) * (first + 2) + (first + 3) * (first + 3); };
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(even.v[i], sum(8 * i)) << i;
    EXPECT_EQ(odd.v[i], sum(8 * i + 4)) << i;
  }
}

TEST(SimdTest, SaturatedBytesStopAtTheirEnds) {
  i32x16 v[4];
  for (int i = 0; i < 64; ++i) v[i / 16].v[i % 16] = 10 * i - 320;
  v[3].v[15] = INT32_MIN;
  int8_t bytes[64];
  store_bytes(bytes, saturate_s8(v[0], v[1], v[2], v[3]));
  for (int i = 0; i < 63; ++i) EXPECT_EQ(bytes[i], std::clamp(10 * i - 320, -128, 127)) << i;
  EXPECT_EQ(bytes[63], -128);
}

}  // namespace
}  // namespace motet::scalar
