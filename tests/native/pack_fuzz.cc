// Seeded: random bytes, of any bit pattern, through every dequantiser and packer. Buffers are exactly as
// large as the sizes that are passed, so the sanitizers see any step outside. MOTET_FUZZ_ITERATIONS sets the
// budget.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "pack.h"

namespace motet {
namespace {

TEST(PackFuzz, RandomBytesArePackedOrRefused) {
  const char* setting = std::getenv("MOTET_FUZZ_ITERATIONS");
  const long iterations = setting ? std::atol(setting) : 20000;
  int packed_count = 0, refused_count = 0;
  for (long i = 0; i < iterations; i++) {
    std::mt19937 random(static_cast<uint32_t>(i));
    const SourceType type = static_cast<SourceType>(random() % kNumSourceTypes);
    const WeightFormat target = static_cast<WeightFormat>(random() % kNumWeightFormats);
    const SourceInfo& info = source_info(type);
    const int64_t in_features = std::max(32, info.block_elements) * (1 + random() % 2);
    const int64_t out_features = 1 + random() % 20;
    const int64_t row_bytes = in_features / info.block_elements * info.block_bytes;
    const bool finite = random() % 2 == 0;

    std::vector<uint8_t> source(out_features * row_bytes);
    for (uint8_t& byte : source) byte = static_cast<uint8_t>(finite ? random() & 0x33 : random());
    std::vector<float> values(in_features);
    dequantize_row(values.data(), type, source.data(), in_features);
    if (finite) {
      for (const float value : values) ASSERT_TRUE(std::isfinite(value)) << "seed " << i;
    }

    std::vector<int32_t> rows(out_features);
    for (int32_t& row : rows)
      row = static_cast<int32_t>(random() % out_features) + (random() % 100 == 0 ? 20 : 0);
    std::vector<uint8_t> packed(packed_bytes(target, out_features, in_features));
    try {
      pack_tiles(packed.data(), target, type, source.data(), row_bytes, out_features, in_features,
                 random() % 2 ? rows.data() : nullptr, random() % 4 ? 0.0f : 1.0f, 0,
                 num_tiles(out_features));
      packed_count++;
    } catch (const std::runtime_error&) {
      refused_count++;
    }
  }
  // Both ends are reached, or the fuzzing is of no use.
  EXPECT_GT(packed_count, iterations / 20);
  EXPECT_GT(refused_count, iterations / 20);
}

}  // namespace
}  // namespace motet
