// Attention over keys of which some lie in the host arena: whatever lies where and however small the staging area is, each
// row's bits are those that it gets with all of them in the device arena.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "device.h"
#include "reference.h"

namespace motet {
namespace {

using reference::random_floats;

constexpr int kHeads = 6, kKvHeads = 2, kHeadDim = 32, kWidth = kHeads * kHeadDim, kKvWidth = kKvHeads * kHeadDim;
constexpr int kNumBlocks = 410, kStagingPages = 80, kLayers = 3;

// A sequence's blocks, by their content, and its rows of this step.
struct Sequence {
  std::vector<int> blocks;
  int first_position, num_rows;
};

// Block b of the content lies in page b of the device arena, or in the page of the host arena that says `places`. Pages of
// kLayers layers, of which two are used.
class Attention {
 public:
  Attention(KvType type, int num_threads) : side_(kv_side_bytes(type, kKvHeads, kHeadDim)), type_(type) {
    device_ = make_cpu_device(kNumPages * page_bytes(), num_threads, false, kNumBlocks * page_bytes());
    const std::vector<float> rows = random_floats(static_cast<size_t>(kNumBlocks + 1) * kBlockTokens * kKvWidth, 7);
    std::memset(device_->arena(), 0xff, kNumPages * page_bytes());  // NaN
    for (int block = 0; block < kNumBlocks; ++block) {
      for (int t = 0; t < kBlockTokens; ++t) {
        const float* row = &rows[(block * kBlockTokens + t) * kKvWidth];
        for (const int l : {0, 2}) kernels().kv_write(layer(l), block, t, row + l, row + kKvWidth - l);
      }
    }
  }

  StagingShape shape() const { return staging_shape(page_bytes(), side_); }
  int64_t staged_bytes() const { return device_->staged_bytes(); }
  size_t slice_bytes() const { return 2 * side_; }

  // Block b moves to the host arena, and its page is NaN.
  void move_to_host(int block) {
    std::memcpy(device_->host_arena() + host_page(block) * page_bytes(), device_->arena() + block * page_bytes(), page_bytes());
    std::memset(device_->arena() + block * page_bytes(), 0xff, page_bytes());
    on_host_.insert(block);
  }

  // Both layers' results, one after the other. Row r of a sequence has a query of its own.
  std::vector<float> run(const std::vector<Sequence>& sequences, const std::vector<int>& windows, int num_staging_pages, bool fetches_ahead) {
    std::vector<int32_t> positions, starts{0}, block_starts{0}, blocks, staging;
    std::vector<float> q;
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (int r = 0; r < sequences[s].num_rows; ++r) {
        positions.push_back(sequences[s].first_position + r);
        const std::vector<float> row = random_floats(kWidth, s * 1000 + r + 1);
        q.insert(q.end(), row.begin(), row.end());
      }
      starts.push_back(static_cast<int>(positions.size()));
      for (const int block : sequences[s].blocks) blocks.push_back(on_host_.count(block) ? kNumPages + host_page(block) : block);
      block_starts.push_back(static_cast<int>(blocks.size()));
    }
    for (int i = 0; i < num_staging_pages; ++i) staging.push_back(kNumPages - 1 - i);
    const std::vector<int32_t> tokens(positions.size());
    Batch batch;
    batch.token_ids = tokens, batch.positions = positions, batch.sequence_starts = starts;
    batch.block_starts = block_starts, batch.block_ids = blocks, batch.staging_pages = staging;
    std::vector<float> out(2 * q.size(), NAN);
    device_->begin(batch, kNumPages);
    for (int i = 0; i < 2; ++i) {
      if (fetches_ahead) device_->fetch_ahead(layer(2 * i), batch, windows[i]);
      device_->attention(layer(2 * i), batch, q.data(), kWidth, out.data() + i * q.size(), kWidth, kHeads, windows[i], 0.2f);
    }
    device_->synchronize();
    return out;
  }

 private:
  static constexpr int kNumPages = kNumBlocks + kStagingPages;
  static int host_page(int block) { return block * 7 % kNumBlocks; }
  size_t page_bytes() const { return kLayers * 2 * side_; }
  KvLayer layer(int l) const { return {device_->arena(), page_bytes(), 2 * l * side_, (2 * l + 1) * side_, type_, kKvHeads, kHeadDim}; }

  size_t side_;
  KvType type_;
  std::set<int> on_host_;
  std::unique_ptr<Device> device_;
};

std::vector<int> blocks(int first, int count) {
  std::vector<int> all;
  for (int i = 0; i < count; ++i) all.push_back(first + i);
  return all;
}

// Sequences of a random step: some begin alike, some decode, some are in the middle of a prompt.
std::vector<Sequence> random_sequences(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  std::vector<Sequence> sequences;
  int next = 60;  // blocks before that are what some begin with
  const int count = 1 + below(4);
  for (int s = 0; s < count; ++s) {
    std::vector<int> table = below(2) ? blocks(0, below(60)) : std::vector<int>();
    for (int n = 1 + below(40); n > 0; --n) table.push_back(next++);
    const int capacity = static_cast<int>(table.size()) * kBlockTokens, rows = std::min({capacity, 16, 1 + below(3) * below(60)});
    const int behind = std::min(below(16), capacity - rows);  // of the last block
    sequences.push_back({table, capacity - rows - behind, rows});
  }
  if (below(4) == 0 && sequences[0].first_position > 200) {  // a chunk that is longer than a partition
    sequences[0].num_rows += sequences[0].first_position / 2;
    sequences[0].first_position -= sequences[0].first_position / 2;
  }
  return sequences;
}

// Blocks that no sequence writes: those that may be on the host.
std::vector<int> full_blocks(const std::vector<Sequence>& sequences) {
  std::set<int> full, written;
  for (const Sequence& s : sequences)
    for (int i = 0; i < static_cast<int>(s.blocks.size()); ++i) (i < s.first_position / kBlockTokens ? full : written).insert(s.blocks[i]);
  std::vector<int> all;
  for (const int block : full)
    if (!written.count(block)) all.push_back(block);
  return all;
}

TEST(Staging, GivesTheBitsOfTheDeviceArenaForAnyBlocksThere) {
  for (int seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    const std::vector<Sequence> sequences = random_sequences(random);
    const KvType type = static_cast<KvType>(seed % 3);
    const int window_choices[] = {0, 0, 40, 300, 700};
    const std::vector<int> windows = {window_choices[below(5)], window_choices[below(5)]};
    const std::vector<float> expected = Attention(type, 1).run(sequences, windows, 0, false);
    for (const float value : expected) ASSERT_TRUE(std::isfinite(value)) << "seed " << seed;

    Attention attention(type, 1 + below(4));
    const int odds = below(3);  // all of them, half, or few
    bool has_any = false;
    for (const int block : full_blocks(sequences))
      if (odds == 0 || below(odds == 1 ? 2 : 12) == 0) attention.move_to_host(block), has_any = true;
    const int least = static_cast<int>(attention.shape().min_pages());
    for (const int num_staging : {least, least + 1 + below(kStagingPages - least)}) {
      const std::vector<float> out = attention.run(sequences, windows, has_any ? num_staging : 0, below(2));
      ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0)
          << "seed " << seed << ", " << num_staging << " staging pages, windows " << windows[0] << " and " << windows[1];
    }
  }
}

// So many rows and positions that there is no memory for a partial result of each: they go through one place. 6,060 rows with
// up to 24 partitions of 6 heads · 48 floats are 23 million, and there is memory for 16.8; under a window there is.
TEST(Staging, GivesTheBitsOfTheDeviceArenaForMoreRowsThanHavePartials) {
  constexpr int kFirst = 500, kRows = kNumBlocks * kBlockTokens - kFirst;
  for (const int window : {0, 1500}) {
    const std::vector<Sequence> sequences = {{blocks(0, kNumBlocks), kFirst, kRows}};
    const std::vector<float> expected = Attention(KvType::kF16, 2).run(sequences, {window, 40}, 0, false);
    Attention attention(KvType::kF16, 3);
    for (int block = 0; block < kFirst / kBlockTokens; block += 1 + block % 2) attention.move_to_host(block);
    const std::vector<float> out = attention.run(sequences, {window, 40}, static_cast<int>(attention.shape().min_pages()), true);
    ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0) << "window " << window;
  }
}

TEST(Staging, CopiesABlockOnceALayerForAllThatHaveIt) {
  Attention attention(KvType::kF16, 2);
  const std::vector<int> prefix = blocks(0, 48);
  std::vector<Sequence> sequences;
  for (int s = 0; s < 3; ++s) {
    std::vector<int> table = prefix;
    table.push_back(60 + s);
    sequences.push_back({table, 48 * kBlockTokens + s, 1});
  }
  for (const int block : prefix) attention.move_to_host(block);
  attention.run(sequences, {0, 0}, kStagingPages, true);
  EXPECT_EQ(attention.staged_bytes(), static_cast<int64_t>(2 * 48 * attention.slice_bytes()));
}

// What a window hides is not copied: one partition of the three.
TEST(Staging, CopiesOnlyWhatAWindowShows) {
  Attention attention(KvType::kF16, 2);
  for (const int block : blocks(0, 48)) attention.move_to_host(block);
  attention.run({{blocks(0, 50), 49 * kBlockTokens, 1}}, {60, 60}, kStagingPages, true);
  EXPECT_EQ(attention.staged_bytes(), static_cast<int64_t>(2 * 16 * attention.slice_bytes()));
}

TEST(Staging, TakesAsManySlotsOfAPageAsFit) {
  // Pages of 30 layers of 12 KiB each.
  const StagingShape shape = staging_shape(30 * 12288, 6144);
  EXPECT_EQ(shape.slots_per_page, 30);
  EXPECT_EQ(shape.min_pages(), 2);
  EXPECT_EQ(shape.partitions_per_half(2), 1);
  EXPECT_EQ(shape.partitions_per_half(5), 4);
  // A page is at least as big as a slot, whatever it is rounded to.
  EXPECT_EQ(staging_shape(8192, 2560).slots_per_page, 1);
  EXPECT_EQ(staging_shape(8192, 2560).min_pages(), 32);
}

}  // namespace
}  // namespace motet
