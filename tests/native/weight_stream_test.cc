// Which layers stay, and the ring through which the others come: order, files that are cut short, steps that end early.
#include "weight_stream.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <numeric>

namespace motet {
namespace {

std::vector<int> streamed(const WeightPlan& plan) {
  std::vector<int> layers;
  for (size_t l = 0; l < plan.is_resident.size(); ++l)
    if (!plan.is_resident[l]) layers.push_back(static_cast<int>(l));
  return layers;
}

TEST(WeightPlan, SpreadsTheResidentsEvenly) {
  const std::vector<size_t> layers(8, 100);
  EXPECT_EQ(streamed(plan_weights(50, layers, 50 + 6 * 100)), (std::vector<int>{0, 2, 4, 6}));
  EXPECT_EQ(streamed(plan_weights(50, layers, 50 + 5 * 100 + 99)), (std::vector<int>{0, 1, 3, 4, 6}));
  EXPECT_EQ(streamed(plan_weights(50, layers, 50 + 2 * 100)).size(), 8u);
}

TEST(WeightPlan, KeepsWithinTheBudgetAndUsesIt) {
  std::vector<size_t> layers;
  for (size_t l = 0; l < 30; ++l) layers.push_back(l % 7 == 0 ? 170 : 120);
  const size_t all = std::accumulate(layers.begin(), layers.end(), size_t{0});
  size_t num_before = 30;
  for (size_t budget = 1000 + 2 * 170; budget < 1000 + all; budget += 10) {
    const WeightPlan plan = plan_weights(1000, layers, budget);
    size_t resident = 1000;
    for (size_t l = 0; l < layers.size(); ++l) {
      resident += plan.is_resident[l] ? layers[l] : 0;
      EXPECT_TRUE(plan.is_resident[l] || layers[l] <= plan.slot_bytes);
    }
    EXPECT_EQ(plan.resident_bytes, resident);
    EXPECT_LE(resident + kNumWeightSlots * plan.slot_bytes, budget);
    EXPECT_LE(streamed(plan).size(), num_before);
    EXPECT_GT(plan.resident_bytes + (kNumWeightSlots + 2) * 170, budget);  // no room that another layer would find
    num_before = streamed(plan).size();
  }
}

TEST(WeightPlan, NamesTheLeastBudget) {
  try {
    plan_weights(50, std::vector<size_t>{100, 130, 100, 100}, 309);
    FAIL() << "two slots fit";
  } catch (const RuntimeError& e) {
    EXPECT_STREQ(e.what(), "weight memory: expected at least 310 bytes, 50 of them for what is always resident and two times 130 for layers on their way, got 309");
  }
  EXPECT_EQ(streamed(plan_weights(50, std::vector<size_t>{100, 130, 100, 100}, 310)).size(), 4u);
}

constexpr int kLayers = 6;
constexpr int64_t kFloats = 6000;  // of a matrix: a layer is not a whole number of blocks

// A file of a vector and two matrices a layer, the second ones in another order; every float tells its place. Read directly where the file
// system can, and through the page cache.
class Ring : public testing::TestWithParam<bool> {
 protected:
  Ring() {
    add("norm", -1, true, 16);
    for (int l = 0; l < kLayers; ++l) {
      add("norm", l, true, 16);
      add("a", l, false, kFloats);
    }
    for (int l = kLayers; l-- > 0;) add("b", l, false, kFloats);
    path_ = testing::TempDir() + "motet-" + std::to_string(getpid()) + "-ring";
    write();
  }
  ~Ring() override { std::remove(path_.c_str()); }

  void write() const {
    std::FILE* file = std::fopen(path_.c_str(), "wb");
    EXPECT_EQ(std::fwrite(bytes_.data(), 1, bytes_.size(), file), bytes_.size());
    std::fclose(file);
  }
  std::unique_ptr<WeightStream> open(size_t budget) {
    return std::make_unique<WeightStream>(FileDescriptor(::open(path_.c_str(), O_RDONLY)), path_, tensors_, kLayers, budget, *device_, GetParam());
  }
  // Least: nothing but what must be resident.
  size_t least() {
    size_t bytes = 0;
    try {
      open(1);
    } catch (const RuntimeError& e) {
      EXPECT_EQ(std::sscanf(e.what(), "weight memory: expected at least %zu", &bytes), 1);
    }
    return bytes;
  }
  bool is_tensor(size_t index, const uint8_t* at) const {
    return std::memcmp(at, bytes_.data() + tensors_[index].offset_bytes, static_cast<size_t>(tensors_[index].size_bytes)) == 0;
  }
  // All that a layer streams is where it should be.
  void expect_layer(const WeightStream& stream, int layer, const uint8_t* slot) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].layer != layer || tensors_[i].is_vector) continue;
      EXPECT_TRUE(is_tensor(i, slot + stream.slot_offset(i))) << "layer " << layer;
    }
  }
  void run_step(WeightStream& stream, int num_layers = kLayers) const {
    stream.begin_step();
    for (int l = 0; l < num_layers; ++l) {
      if (!stream.is_streamed(l)) continue;
      const uint8_t* const slot = stream.await(l);
      EXPECT_EQ(stream.peek(l), slot);
      expect_layer(stream, l, slot);
      stream.release(l);
      EXPECT_NE(stream.peek(l), slot);
    }
  }

  std::unique_ptr<Device> device_ = make_cpu_device(4096, 1, false);
  std::string path_;
  std::vector<PackedTensorSpec> tensors_;
  std::vector<uint8_t> bytes_;

 private:
  void add(const char* role, int layer, bool is_vector, int64_t count) {
    bytes_.resize((bytes_.size() + 63) / 64 * 64);
    tensors_.push_back({role, layer, is_vector, WeightFormat::kF32, 1, count, static_cast<int64_t>(bytes_.size()), 4 * count});
    std::vector<float> values(static_cast<size_t>(count));
    for (auto& v : values) v = next_++;
    const auto* const from = reinterpret_cast<const uint8_t*>(values.data());
    bytes_.insert(bytes_.end(), from, from + 4 * values.size());
  }
  float next_ = 1;
};

TEST_P(Ring, BringsEachLayerInEachStep) {
  for (const size_t more : {0, 60'000, 120'000, 170'000}) {
    const auto stream = open(least() + more);
    EXPECT_LE(stream->is_direct(), GetParam());
    size_t num_resident = 0;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const bool is_resident = tensors_[i].is_vector || !stream->is_streamed(tensors_[i].layer);
      EXPECT_EQ(stream->resident(i) != nullptr, is_resident);
      EXPECT_TRUE(is_tensor(i, is_resident ? stream->resident(i) : stream->read_copy(i).get()));
      num_resident += is_resident && !tensors_[i].is_vector;
    }
    EXPECT_EQ(num_resident, 2 * (more / 56'000));  // 48,000 bytes in whole blocks
    for (int step = 0; step < 50; ++step) run_step(*stream);
    EXPECT_GE(stream->bytes_read(), 50 * stream->bytes_per_step());
  }
}

TEST_P(Ring, BeginsWithTheFirstLayerAfterAStepThatEndedEarly) {
  const auto stream = open(least());
  for (int num_layers = 0; num_layers < kLayers; ++num_layers) {
    run_step(*stream, num_layers);
    stream->rewind();
    run_step(*stream);
  }
}

TEST_P(Ring, FailsTheStepThatNeedsWhatIsGoneAndNotThoseAfterIt) {
  const auto stream = open(least());
  run_step(*stream);
  // The second matrices lie at the end, those of the last layer before the others: layer 5 is there, and 0 to 4 are not whole.
  ASSERT_EQ(truncate(path_.c_str(), tensors_[2 + 2 * kLayers].offset_bytes), 0);
  for (int i = 0; i < 3; ++i) {
    try {
      for (int step = 0; step < 3; ++step) run_step(*stream);  // what was read ahead is whole
      FAIL() << "a file that was cut short is read";
    } catch (const IoError& e) {
      EXPECT_NE(std::string(e.what()).find(path_), std::string::npos);
      EXPECT_NE(std::string(e.what()).find("cut short"), std::string::npos) << e.what();
    }
    stream->rewind();
  }
  EXPECT_THROW(stream->read_copy(tensors_.size() - 1), IoError);
  write();
  for (int step = 0; step < 3; ++step) run_step(*stream);
}

TEST_P(Ring, EndsWhileNobodyTakesWhatItBrings) {
  for (int i = 0; i < 20; ++i) open(least());
}

INSTANTIATE_TEST_SUITE_P(, Ring, testing::Bool(), [](const auto& info) { return info.param ? "direct" : "cached"; });

}  // namespace
}  // namespace motet
