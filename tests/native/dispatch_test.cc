// Which instruction set is chosen, and that its table is whole.
#include <cstdlib>
#include <string_view>

#include "reference.h"

namespace motet {
namespace {

TEST(DispatchTest, ScalarIsAlwaysThere) {
  const Kernels* scalar = kernels_by_name("scalar");
  ASSERT_NE(scalar, nullptr);
  EXPECT_STREQ(scalar->name, "scalar");
}

TEST(DispatchTest, EachTableCarriesItsName) {
  for (const char* name : kInstructionSets) {
    const Kernels* k = kernels_by_name(name);
    if (k != nullptr) {
      EXPECT_STREQ(k->name, name);
    }
  }
}

TEST(DispatchTest, AnUnknownNameIsNull) {
  EXPECT_EQ(kernels_by_name("sse9"), nullptr);
  EXPECT_EQ(kernels_by_name(""), nullptr);
}

// Two differ from another in the integer product alone.
TEST(DispatchTest, TablesShareNoFunction) {
  const std::vector<const Kernels*> all = reference::available_kernels();
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      EXPECT_NE(all[i]->matmul_q, all[j]->matmul_q);
      if (std::string_view(all[j]->name) == "amx" && std::string_view(all[i]->name) == "avx512") continue;
      if (std::string_view(all[j]->name) == "avxvnni" && std::string_view(all[i]->name) == "avx2") continue;
      EXPECT_NE(all[i]->attention, all[j]->attention);
      EXPECT_NE(all[i]->sample, all[j]->sample);
    }
  }
}

// kernels() chooses once per process, so each choice is made in a child.
int exit_code_for(const char* isa, const char* expected) {
  setenv("MOTET_ISA", isa, 1);
  return std::string(kernels().name) == expected ? 0 : 1;
}

TEST(DispatchDeathTest, TheEnvironmentOverrides) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::exit(exit_code_for("scalar", "scalar")), testing::ExitedWithCode(0), "");
}

TEST(DispatchDeathTest, TheBestIsChosenByDefault) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const char* best = reference::available_kernels().front()->name;
  EXPECT_EXIT(std::exit(exit_code_for("", best)), testing::ExitedWithCode(0), "");
}

TEST(DispatchDeathTest, AnAbsentInstructionSetIsAnErrorThatNamesIt) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto try_absent = [] {
    setenv("MOTET_ISA", "sse9", 1);
    try {
      kernels();
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      std::exit(3);
    }
    std::exit(0);
  };
  EXPECT_EXIT(try_absent(), testing::ExitedWithCode(3), "MOTET_ISA: expected .* got sse9");
}

}  // namespace
}  // namespace motet
