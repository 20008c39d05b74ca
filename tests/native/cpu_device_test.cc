// Attention of a step on the CPU: however it is cut into tasks and whatever sequences have in common, each row's bits are
// those that its sequence gets alone on one thread.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "device.h"
#include "reference.h"

namespace motet {
namespace {

using reference::random_floats;

constexpr int kHeads = 6, kKvHeads = 2, kHeadDim = 32, kWidth = kHeads * kHeadDim, kKvWidth = kKvHeads * kHeadDim;

// A sequence's pages, and its rows of this step.
struct Sequence {
  std::vector<int32_t> blocks;
  int first_position, num_rows;
};

// All sequences' keys and values lie in one arena; page contents depend on the page's number alone.
class Attention {
 public:
  Attention(KvType type, int num_pages, int num_threads) : side_(kv_side_bytes(type, kKvHeads, kHeadDim)), type_(type), num_pages_(num_pages) {
    device_ = make_cpu_device(num_pages * 2 * side_, num_threads, false);
    const std::vector<float> rows = random_floats(static_cast<size_t>(num_pages + 1) * kBlockTokens * kKvWidth, 7);
    for (int page = 0; page < num_pages; ++page)
      for (int t = 0; t < kBlockTokens; ++t) {
        const float* row = &rows[(page * kBlockTokens + t) * kKvWidth];
        kernels().kv_write(layer(), page, t, row, row + kKvWidth);
      }
  }

  void copy_page(int from, int to) { std::memcpy(device_->arena() + to * 2 * side_, device_->arena() + from * 2 * side_, 2 * side_); }

  // Row r of sequence s has the query number s · 1000 + r, wherever it stands in the batch.
  std::vector<float> run(const std::vector<Sequence>& sequences, const std::vector<int>& names, int window) {
    std::vector<int32_t> positions, starts{0}, block_starts{0}, blocks;
    std::vector<float> q;
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (int r = 0; r < sequences[s].num_rows; ++r) {
        positions.push_back(sequences[s].first_position + r);
        const std::vector<float> row = random_floats(kWidth, names[s] * 1000 + r + 1);
        q.insert(q.end(), row.begin(), row.end());
      }
      starts.push_back(static_cast<int>(positions.size()));
      blocks.insert(blocks.end(), sequences[s].blocks.begin(), sequences[s].blocks.end());
      block_starts.push_back(static_cast<int>(blocks.size()));
    }
    const std::vector<int32_t> tokens(positions.size());
    Batch batch;
    batch.token_ids = tokens, batch.positions = positions, batch.sequence_starts = starts;
    batch.block_starts = block_starts, batch.block_ids = blocks;
    std::vector<float> out(q.size(), NAN);
    device_->begin(batch, num_pages_);
    device_->attention(layer(), batch, q.data(), kWidth, out.data(), kWidth, kHeads, window, 0.2f);
    return out;
  }

 private:
  KvLayer layer() const { return {device_->arena(), 2 * side_, 0, side_, type_, kKvHeads, kHeadDim}; }

  size_t side_;
  KvType type_;
  int num_pages_;
  std::unique_ptr<Device> device_;
};

std::vector<float> each_alone(KvType type, int num_pages, const std::vector<Sequence>& sequences, int window) {
  Attention one(type, num_pages, 1);
  std::vector<float> all;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const std::vector<float> out = one.run({sequences[s]}, {static_cast<int>(s)}, window);
    all.insert(all.end(), out.begin(), out.end());
  }
  return all;
}

std::vector<int> numbers(size_t count) {
  std::vector<int> all;
  for (size_t i = 0; i < count; ++i) all.push_back(static_cast<int>(i));
  return all;
}

void expect_same_as_alone(const std::vector<Sequence>& sequences, int num_pages) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kInt8}) {
    for (const int window : {0, 100, 700}) {
      const std::vector<float> expected = each_alone(type, num_pages, sequences, window);
      for (const float value : expected) ASSERT_TRUE(std::isfinite(value));
      for (const int num_threads : {1, 2, 3, 8}) {
        Attention attention(type, num_pages, num_threads);
        const std::vector<float> out = attention.run(sequences, numbers(sequences.size()), window);
        ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0)
            << num_threads << " threads, window " << window << ", type " << static_cast<int>(type);
      }
    }
  }
}

std::vector<int32_t> pages(int first, int count) {
  std::vector<int32_t> all;
  for (int i = 0; i < count; ++i) all.push_back(first + i);
  return all;
}

std::vector<int32_t> joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST(CpuDeviceAttention, OfOneLongSequenceIsTheSameOnAnyNumberOfThreads) {
  expect_same_as_alone({{pages(0, 130), 130 * 16 - 1, 1}}, 130);
  expect_same_as_alone({{pages(0, 130), 130 * 16 - 40, 40}}, 130);
}

TEST(CpuDeviceAttention, OfShortAndLongSequencesIsThatOfEachAlone) {
  expect_same_as_alone({{pages(0, 3), 40, 1}, {pages(3, 70), 1100, 1}, {pages(73, 20), 250, 60}, {pages(93, 1), 0, 16}}, 94);
}

// Prefixes of 40 pages that all share, then of 20 more that some share; ends on and off a partition; a sequence of other
// pages, and one that is all prefix but its last page.
TEST(CpuDeviceAttention, OverSharedPrefixesIsThatOfEachAlone) {
  const std::vector<int32_t> prefix = pages(0, 40), longer = joined(prefix, pages(40, 20));
  const std::vector<Sequence> sequences = {
      {joined(prefix, pages(60, 3)), 40 * 16 + 40, 1},  {joined(longer, pages(63, 17)), 60 * 16 + 200, 1},
      {joined(longer, pages(80, 1)), 60 * 16, 3},       {pages(81, 30), 450, 1},
      {joined(prefix, pages(111, 1)), 40 * 16 + 3, 1},  {joined(longer, pages(112, 5)), 60 * 16 + 70, 2},
      {joined(prefix, pages(117, 8)), 40 * 16 + 1, 90},
  };
  expect_same_as_alone(sequences, 125);
}

// The bytes of the shared pages copied into pages of each sequence's own: nothing to share, and no bit differs.
TEST(CpuDeviceAttention, OverASharedPrefixIsThatOverCopiesOfIt) {
  constexpr int kSequences = 5, kPrefix = 35, kOwn = 4;
  for (const KvType type : {KvType::kF16, KvType::kInt8}) {
    Attention attention(type, kPrefix + kSequences * (kPrefix + kOwn), 3);
    std::vector<Sequence> shared, copies;
    for (int s = 0; s < kSequences; ++s) {
      const int first = kPrefix + s * (kPrefix + kOwn);
      for (int page = 0; page < kPrefix; ++page) attention.copy_page(page, first + page);
      const int position = (kPrefix + kOwn) * kBlockTokens - 1 - s;
      shared.push_back({joined(pages(0, kPrefix), pages(first + kPrefix, kOwn)), position, 1});
      copies.push_back({pages(first, kPrefix + kOwn), position, 1});
    }
    const std::vector<float> once = attention.run(shared, numbers(kSequences), 0);
    const std::vector<float> each = attention.run(copies, numbers(kSequences), 0);
    EXPECT_EQ(std::memcmp(once.data(), each.data(), once.size() * sizeof(float)), 0);
  }
}

}  // namespace
}  // namespace motet
