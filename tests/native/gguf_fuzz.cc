// Seeded, mutational: a valid file with some bytes, integers or its length changed must parse or throw
// GgufError; what parses stays inside the file. MOTET_FUZZ_ITERATIONS sets the budget. Meant to run under the
// sanitizers too.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>

#include "gguf.h"
#include "gguf_builder.h"

namespace motet {
namespace {

std::vector<uint8_t> valid_file(std::mt19937& random) {
  GgufBuilder b;
  b.header(3, 7, 2 + random() % 2)
      .text("general.architecture", "llama")
      .scalar<uint32_t>("general.alignment", 4, 32);
  b.texts("tokens", {"a", "bc", ""}).array<float>("scores", 6, {1, 2, 3}).array<uint8_t>("flags", 7, {1, 0});
  b.scalar<uint8_t>("yes", 7, 1).array<int64_t>("long", 11, {-1});
  b.tensor("embedding", {32, 4}, 2, 0).tensor("norm", {32}, 0, 96).tensor("w", {256, 2}, 12, 224);
  b.data(224 + 288);
  return b.bytes;
}

// Values at which checks tend to be off by one or to wrap.
uint64_t interesting(std::mt19937& random) {
  constexpr uint64_t kValues[] = {0,          1,          2,          3,          4,
                                  5,          7,          8,          9,          12,
                                  13,         31,         32,         255,        256,
                                  65535,      65536,      1ull << 31, 1ull << 32, (1ull << 56) - 1,
                                  1ull << 56, 1ull << 61, 1ull << 63, ~0ull - 31, ~0ull - 7,
                                  ~0ull};
  return kValues[random() % std::size(kValues)];
}

void mutate(std::vector<uint8_t>& bytes, std::mt19937& random) {
  if (bytes.empty()) return;
  const size_t at = random() % bytes.size();
  switch (random() % 6) {
    case 0:
      bytes[at] = static_cast<uint8_t>(random());
      break;
    case 1:
      bytes[at] ^= static_cast<uint8_t>(1 << random() % 8);
      break;
    case 2:
      bytes.resize(at);
      break;
    case 3:
      bytes.insert(bytes.begin() + at, random() % 16, static_cast<uint8_t>(random()));
      break;
    case 4:
      bytes.erase(bytes.begin() + at, bytes.begin() + std::min(bytes.size(), at + random() % 16));
      break;
    case 5: {
      const uint64_t value = interesting(random);
      std::memcpy(&bytes[at], &value, std::min<size_t>(random() % 2 ? 8 : 4, bytes.size() - at));
      break;
    }
  }
}

void expect_inside(const GgufFile& file, size_t size_bytes, long seed) {
  uint64_t total = 0;
  for (const GgufTensor& tensor : file.tensors) {
    ASSERT_LE(tensor.offset_bytes, size_bytes) << "seed " << seed;
    ASSERT_LE(tensor.size_bytes, size_bytes - tensor.offset_bytes) << "seed " << seed;
    ASSERT_LE(total += tensor.size_bytes, size_bytes) << "seed " << seed << ": tensors overlap";
    uint64_t elements = 1;
    for (const int64_t dim : tensor.dims) elements *= dim;
    const SourceInfo& info = source_info(tensor.type);
    ASSERT_EQ(tensor.size_bytes, elements / info.block_elements * info.block_bytes) << "seed " << seed;
  }
}

TEST(GgufFuzz, MutatedFilesParseInsideTheirBoundsOrAreRefused) {
  const char* setting = std::getenv("MOTET_FUZZ_ITERATIONS");
  const long iterations = setting ? std::atol(setting) : 20000;
  int parsed = 0, refused = 0;
  for (long seed = 0; seed < iterations; seed++) {
    std::mt19937 random(static_cast<uint32_t>(seed));
    std::vector<uint8_t> bytes = valid_file(random);
    for (int i = random() % 4; i >= 0; i--) mutate(bytes, random);
    // A buffer of exactly the file's size, so that the sanitizers see a read past its end.
    const auto exact = std::make_unique<uint8_t[]>(bytes.size());
    std::copy(bytes.begin(), bytes.end(), exact.get());
    try {
      expect_inside(parse_gguf(exact.get(), bytes.size()), bytes.size(), seed);
      parsed++;
    } catch (const GgufError& error) {
      ASSERT_NE(std::string(error.what()).find(": expected "), std::string::npos) << "seed " << seed;
      refused++;
    }
  }
  // Both ends are reached, or the fuzzing is of no use.
  EXPECT_GT(parsed, iterations / 20);
  EXPECT_GT(refused, iterations / 20);
}

}  // namespace
}  // namespace motet
