// Attention and kv_write: against plain softmax in double precision, and the laws that batching rests on: a row's bits
// depend neither on the rows beside it, nor on chunks, pages or instruction set, nor on bytes that it may not see.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "reference.h"

namespace motet {
namespace {

using reference::available_kernels;
using reference::random_floats;

struct Shape {
  int head_dim = 64;
  int heads_per_kv = 3;
  int num_kv_heads = 2;
  KvType type = KvType::kF16;
  int first_position = 0;
  int num_rows = 1;
  int window = 0;

  int num_positions() const { return first_position + num_rows; }
  int num_blocks() const { return (num_positions() + kBlockTokens - 1) / kBlockTokens; }
  int q_width() const { return num_kv_heads * heads_per_kv * head_dim; }
  int kv_width() const { return num_kv_heads * head_dim; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }
  std::string name() const {
    return "D " + std::to_string(head_dim) + " heads " + std::to_string(heads_per_kv) + " type " +
           std::to_string(static_cast<int>(type)) + " first " + std::to_string(first_position) + " rows " +
           std::to_string(num_rows) + " window " + std::to_string(window);
  }
};

// A sequence's cache in pages of two layers; the layer in use is the second. All bytes start as NaN.
struct Cache {
  KvLayer layer;
  std::vector<uint8_t> arena;
  std::vector<int32_t> blocks;

  Cache(const Kernels& kernels, const Shape& s, const std::vector<float>& k, const std::vector<float>& v,
        uint32_t page_seed) {
    const size_t side = kv_side_bytes(s.type, s.num_kv_heads, s.head_dim);
    const int num_pages = s.num_blocks() + 3;
    arena.assign(num_pages * 4 * side, 0xff);
    layer = {.arena = arena.data(), .page_bytes = 4 * side, .k_offset = 2 * side, .v_offset = 3 * side,
             .type = s.type, .num_kv_heads = s.num_kv_heads, .head_dim = s.head_dim};
    blocks.resize(num_pages);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (page_seed != 0) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(page_seed));
    blocks.resize(s.num_blocks());
    for (int p = 0; p < s.num_positions(); ++p)
      kernels.kv_write(layer, blocks[p / kBlockTokens], p, &k[p * s.kv_width()], &v[p * s.kv_width()]);
  }
};

struct Problem {
  Shape shape;
  std::vector<float> q, k, v;            // [num_rows, q_width], [num_positions, kv_width]
  std::vector<int32_t> rows, positions;  // 0, 1, 2, … and their positions

  explicit Problem(const Shape& s)
      : shape(s), q(random_floats(static_cast<size_t>(s.num_rows) * s.q_width(), 1)),
        k(random_floats(static_cast<size_t>(s.num_positions()) * s.kv_width(), 2)),
        v(random_floats(static_cast<size_t>(s.num_positions()) * s.kv_width(), 3)), rows(s.num_rows),
        positions(s.num_rows) {
    std::iota(rows.begin(), rows.end(), 0);
    std::iota(positions.begin(), positions.end(), s.first_position);
  }
};

// All rows and partitions, for one KV head.
AttentionJob job_of(const Problem& problem, const Cache& cache, int kv_head, std::vector<float>& scratch) {
  const Shape& s = problem.shape;
  return {.q = problem.q.data(), .ldq = s.q_width(), .out = nullptr, .ldo = s.q_width(),
          .rows = problem.rows.data(), .num_rows = s.num_rows, .positions = problem.positions.data(),
          .heads_per_kv = s.heads_per_kv, .kv_head = kv_head, .blocks = cache.blocks.data(), .window = s.window,
          .scale = s.scale(), .first_partition = 0, .end_partition = (s.num_positions() - 1) / kPartitionTokens + 1,
          .partials = nullptr, .carried = nullptr, .scratch = scratch.data()};
}

// Runs the rows in calls of rows_per_call.
std::vector<float> attend(const Kernels& kernels, const Problem& problem, const Cache& cache, int rows_per_call) {
  const Shape& s = problem.shape;
  std::vector<float> out(problem.q.size(), NAN);
  std::vector<float> scratch(attention_scratch_floats(s.head_dim), NAN);
  for (int row = 0; row < s.num_rows; row += rows_per_call) {
    for (int kv_head = 0; kv_head < s.num_kv_heads; ++kv_head) {
      AttentionJob job = job_of(problem, cache, kv_head, scratch);
      job.out = out.data();
      job.rows += row;
      job.num_rows = std::min(rows_per_call, s.num_rows - row);
      kernels.attention(cache.layer, job);
    }
  }
  return out;
}

// The same, each partition for itself, the last first; then folded.
std::vector<float> attend_apart(const Kernels& kernels, const Problem& problem, const Cache& cache) {
  const Shape& s = problem.shape;
  const int num_heads = s.num_kv_heads * s.heads_per_kv;
  std::vector<float> out(problem.q.size(), NAN);
  std::vector<float> scratch(attention_scratch_floats(s.head_dim), NAN);
  std::vector<std::vector<float>> memory;
  std::vector<AttentionPartials> partials;
  for (const int position : problem.positions) {
    const int first = s.window > 0 ? std::max(0, position - s.window + 1) / kPartitionTokens : 0;
    const int count = position / kPartitionTokens + 1 - first;
    memory.emplace_back(static_cast<size_t>(count) * num_heads * (s.head_dim + kPartialExtra), NAN);
    partials.push_back({memory.back().data(), first, count});
  }
  for (int partition = (s.num_positions() - 1) / kPartitionTokens; partition >= 0; --partition) {
    for (int kv_head = s.num_kv_heads - 1; kv_head >= 0; --kv_head) {
      AttentionJob job = job_of(problem, cache, kv_head, scratch);
      job.first_partition = partition;
      job.end_partition = partition + 1;
      job.partials = partials.data();
      kernels.attention(cache.layer, job);
    }
  }
  for (int row = 0; row < s.num_rows; ++row)
    kernels.attention_fold(&out[row * s.q_width()], partials[row].data, num_heads, partials[row].count, s.head_dim);
  return out;
}

// The least f16 that is not below x.
float f16_above(float x) {
  _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  bits += static_cast<float>(half) < x;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

// Int8 keys are stored rotated: by the kernel's operations in the kernel's order, since a bit may decide what an element is
// rounded to.
void rotate(float* x, int head_dim) {
  const int num_vectors = head_dim / 16, run = num_vectors & -num_vectors;
  const float factor = 1 / std::sqrt(static_cast<float>(16 * run));
  for (int v = 0; v < num_vectors; ++v) {
    float sums[16] = {};
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) sums[i] = std::fma(x[16 * v + j], __builtin_parity(i & j) ? -1.0f : 1.0f, sums[i]);
    for (int i = 0; i < 16; ++i) x[16 * v + i] = sums[i] * factor;
  }
  for (int half = 1; half < run; half *= 2) {
    for (int i = 0; i < head_dim; ++i) {
      if (i / 16 & half) continue;
      const float a = x[i], b = x[i + 16 * half];
      x[i] = a + b;
      x[i + 16 * half] = a - b;
    }
  }
}
std::vector<float> rotated(std::vector<float> x, int head_dim) {
  for (size_t head = 0; head < x.size(); head += head_dim) rotate(&x[head], head_dim);
  return x;
}

// What is left of values of ordinary size, [positions, kv_width], after a trip through the cache.
std::vector<double> stored(const std::vector<float>& values, const Shape& s) {
  std::vector<double> out(values.begin(), values.end());
  if (s.type == KvType::kF16)
    for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<double>(static_cast<_Float16>(values[i]));
  if (s.type != KvType::kInt8) return out;
  for (size_t head = 0; head < values.size(); head += s.head_dim) {
    float greatest = 0;
    for (int d = 0; d < s.head_dim; ++d) greatest = std::max(greatest, std::fabs(values[head + d]));
    const float scale = f16_above(greatest / 127);
    for (int d = 0; d < s.head_dim; ++d) out[head + d] = std::nearbyint(values[head + d] / scale) * double{scale};
  }
  return out;
}

std::vector<double> plain_softmax(const Problem& problem) {
  const Shape& s = problem.shape;
  const bool is_rotated = s.type == KvType::kInt8;
  const std::vector<double> k = stored(is_rotated ? rotated(problem.k, s.head_dim) : problem.k, s);
  const std::vector<double> v = stored(problem.v, s);
  const std::vector<float> q = is_rotated ? rotated(problem.q, s.head_dim) : problem.q;
  std::vector<double> out(problem.q.size());
  for (int row = 0; row < s.num_rows; ++row) {
    const int position = s.first_position + row;
    const int begin = s.window > 0 ? std::max(0, position - s.window + 1) : 0;
    for (int head = 0; head < s.num_kv_heads * s.heads_per_kv; ++head) {
      const size_t at = static_cast<size_t>(row) * s.q_width() + head * s.head_dim;
      const int kv_at = head / s.heads_per_kv * s.head_dim;
      std::vector<double> weights;
      double largest = -INFINITY, sum = 0;
      for (int t = begin; t <= position; ++t) {
        double score = 0;
        for (int d = 0; d < s.head_dim; ++d) score += q[at + d] * k[t * s.kv_width() + kv_at + d];
        weights.push_back(score * s.scale());
        largest = std::max(largest, weights.back());
      }
      for (double& w : weights) sum += w = std::exp(w - largest);
      for (int t = begin; t <= position; ++t) {
        for (int d = 0; d < s.head_dim; ++d) out[at + d] += weights[t - begin] / sum * v[t * s.kv_width() + kv_at + d];
      }
    }
  }
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Every corner of steps, blocks and partitions, then random shapes.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int first : {235, 255, 256, 257, 500, 700})
    for (const int window : {0, 30, 256, 300}) all.push_back({.first_position = first, .num_rows = 1 + first % 25, .window = window});
  for (const int first : {0, 15, 16, 17, 63, 64, 65, 300}) {
    for (const int window : {0, 1, 20, 64, 100}) {
      all.push_back({.first_position = first, .num_rows = 1, .window = window});
      all.push_back({.first_position = first, .num_rows = 21, .window = window});
    }
  }
  for (int head_dim = 16; head_dim <= 256; head_dim += 16)
    all.push_back({.head_dim = head_dim, .heads_per_kv = 2, .first_position = 60, .num_rows = 9});
  for (int heads = 1; heads <= 10; ++heads) all.push_back({.heads_per_kv = heads, .first_position = 70, .num_rows = 3});
  std::mt19937 random(20);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (int i = 0; i < 25; ++i) {
    all.push_back({.head_dim = 16 * (1 + below(16)), .heads_per_kv = 1 + below(8), .num_kv_heads = 1 + below(3),
                   .first_position = below(200), .num_rows = 1 + below(40), .window = below(2) * below(120)});
  }
  for (size_t i = 0; i < all.size(); ++i) all[i].type = static_cast<KvType>(i % 3);
  return all;
}

TEST(Attention, MatchesPlainSoftmaxInDoublePrecision) {
  for (const Shape& shape : shapes()) {
    const Problem problem(shape);
    const std::vector<double> expected = plain_softmax(problem);
    for (const Kernels* k : available_kernels()) {
      const std::vector<float> out = attend(*k, problem, Cache(*k, shape, problem.k, problem.v, 5), shape.num_rows);
      // f32 arithmetic on values of the element type: the dot product's error (about √D · 2^-24 of a score of a few
      // units) moves a weight by its relative size, and the outputs are averages of values of up to 4.
      // Over int8 keys a query has 15 bits, which moves a score by about 1e-4.
      const double tolerance = shape.type == KvType::kInt8 ? 4e-4 : 4e-6;
      for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], tolerance) << k->name << " " << shape.name();
    }
  }
}

TEST(Attention, GivesTheSameBitsForAnyChunksPagesAndInstructionSet) {
  for (const Shape& shape : shapes()) {
    const Problem problem(shape);
    const Kernels& best = kernels();
    const Cache in_order(best, shape, problem.k, problem.v, 0);
    const std::vector<float> row_by_row = attend(best, problem, in_order, 1);
    for (const float value : row_by_row) ASSERT_TRUE(std::isfinite(value)) << shape.name();
    for (const int rows_per_call : {2, 3, 7, 16, shape.num_rows})
      ASSERT_TRUE(same_bits(attend(best, problem, in_order, rows_per_call), row_by_row))
          << shape.name() << ", rows a call " << rows_per_call;
    for (const Kernels* k : available_kernels()) {
      const Cache shuffled(*k, shape, problem.k, problem.v, 7);
      ASSERT_TRUE(same_bits(attend(*k, problem, shuffled, shape.num_rows), row_by_row)) << k->name << shape.name();
      ASSERT_TRUE(same_bits(attend_apart(*k, problem, shuffled), row_by_row)) << k->name << shape.name() << " apart";
    }
  }
}

TEST(Attention, RowsDoNotSeeLaterTokensOfTheSameCall) {
  for (const auto& [window, type] : {std::pair{0, KvType::kF16}, {30, KvType::kF16}, {0, KvType::kInt8}}) {
    Problem problem({.type = type, .first_position = 40, .num_rows = 40, .window = window});
    const Shape& s = problem.shape;
    const std::vector<float> clean =
        attend(kernels(), problem, Cache(kernels(), s, problem.k, problem.v, 1), s.num_rows);
    // The last token's key and value become NaN: every row but the last stays as it was, bit for bit.
    std::fill(problem.k.end() - s.kv_width(), problem.k.end(), NAN);
    std::fill(problem.v.end() - s.kv_width(), problem.v.end(), NAN);
    for (const Kernels* k : available_kernels()) {
      std::vector<float> out = attend(*k, problem, Cache(*k, s, problem.k, problem.v, 1), s.num_rows);
      const size_t last = out.size() - s.q_width();
      EXPECT_EQ(std::memcmp(out.data(), clean.data(), last * 4), 0) << k->name << " window " << window;
      EXPECT_TRUE(std::isnan(out[last]));
    }
  }
}

TEST(Attention, AWindowNeverTouchesBlocksBeforeIt) {
  const Problem problem({.first_position = 200, .num_rows = 5, .window = 33});
  for (const Kernels* k : available_kernels()) {
    Cache cache(*k, problem.shape, problem.k, problem.v, 1);
    const std::vector<float> expected = attend(*k, problem, cache, 5);
    for (int b = 0; b < (200 - 32) / kBlockTokens; ++b) cache.blocks[b] = 1 << 30;  // far outside of the arena
    EXPECT_TRUE(same_bits(attend(*k, problem, cache, 5), expected)) << k->name;
  }
}

TEST(Attention, OfOneKeyIsItsValue) {
  const Problem problem({.type = KvType::kF32});
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> out = attend(*k, problem, Cache(*k, problem.shape, problem.k, problem.v, 1), 1);
    for (int head = 0; head < 6; ++head) {
      for (int d = 0; d < 64; ++d) ASSERT_EQ(out[head * 64 + d], problem.v[head / 3 * 64 + d]) << k->name;
    }
  }
}

TEST(Attention, SurvivesScoresThatOverflowAnExponential) {
  Problem problem({.type = KvType::kF32, .first_position = 150});
  for (float& q : problem.q) q *= 1000;
  const std::vector<double> expected = plain_softmax(problem);
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> out = attend(*k, problem, Cache(*k, problem.shape, problem.k, problem.v, 1), 1);
    // Scores of thousands carry an error of about 1e-3, which moves the weights by that much.
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 2e-2) << k->name;
  }
}

TEST(KvWrite, PutsKeysTransposedAndValuesInRows) {
  const Shape s = {.head_dim = 32, .type = KvType::kF32, .first_position = 20};
  const Problem problem(s);
  for (const Kernels* k : available_kernels()) {
    const Cache cache(*k, s, problem.k, problem.v, 9);
    for (int p = 0; p < s.num_positions(); ++p) {
      const uint8_t* page = cache.arena.data() + cache.blocks[p / 16] * cache.layer.page_bytes;
      const float* keys = reinterpret_cast<const float*>(page + cache.layer.k_offset);
      const float* values = reinterpret_cast<const float*>(page + cache.layer.v_offset);
      for (int h = 0; h < s.num_kv_heads; ++h) {
        for (int d = 0; d < 32; ++d) {
          ASSERT_EQ(keys[(h * 32 + d) * 16 + p % 16], problem.k[p * s.kv_width() + h * 32 + d]) << k->name;
          ASSERT_EQ(values[(h * 16 + p % 16) * 32 + d], problem.v[p * s.kv_width() + h * 32 + d]) << k->name;
        }
      }
    }
  }
}

TEST(KvWrite, TouchesOnlyItsOwnPositionAndLayer) {
  const Shape s = {.type = KvType::kF16, .first_position = 2};  // positions 0, 1, 2 of one block
  const Problem problem(s);
  for (const Kernels* k : available_kernels()) {
    const Cache cache(*k, s, problem.k, problem.v, 0);
    size_t written = 0;
    for (size_t i = 0; i < cache.arena.size(); i += 2) {
      const bool touched = cache.arena[i] != 0xff || cache.arena[i + 1] != 0xff;
      written += touched;
      if (touched) {
        ASSERT_GE(i, cache.layer.k_offset);
        ASSERT_LT(i, cache.layer.page_bytes);
      }
    }
    EXPECT_EQ(written, 3u * 2 * s.kv_width()) << k->name;
  }
}

TEST(KvWrite, SaturatesF16InsteadOfWritingInfinity) {
  const Shape s = {.head_dim = 16, .num_kv_heads = 1, .type = KvType::kF16};
  std::vector<float> k_row(16, 1e6f), v_row(16, -INFINITY);
  for (const Kernels* k : available_kernels()) {
    const Cache cache(*k, s, k_row, v_row, 0);
    uint16_t key, value;
    std::memcpy(&key, cache.arena.data() + cache.layer.k_offset, 2);
    std::memcpy(&value, cache.arena.data() + cache.layer.v_offset, 2);
    EXPECT_EQ(key, 0x7bff) << k->name;    // 65504
    EXPECT_EQ(value, 0xfbff) << k->name;  // −65504
  }
}

TEST(KvWrite, KeepsInt8WithinHalfAScaleOfWhatItWasGiven) {
  const Shape s = {.head_dim = 32, .type = KvType::kInt8, .first_position = 20};
  Problem problem(s);
  for (int d = 0; d < 32; ++d) problem.k[d] = 0;  // the first head of position 0
  for (int d = 0; d < 32; ++d) problem.v[d] *= 1e-7f;          // scales that f16 only has as denormals
  for (int d = 0; d < 32; ++d) problem.v[32 + d] *= 1e-3f * d;  // its second head: one scale from small to great
  const std::vector<float> k_rotated = rotated(problem.k, 32);
  const std::vector<double> k_stored = stored(k_rotated, s);
  for (const Kernels* k : available_kernels()) {
    const Cache cache(*k, s, problem.k, problem.v, 9);
    for (int p = 0; p < s.num_positions(); ++p) {
      const uint8_t* page = cache.arena.data() + cache.blocks[p / 16] * cache.layer.page_bytes;
      const uint8_t* keys = page + cache.layer.k_offset;
      const uint8_t* values = page + cache.layer.v_offset;
      for (int h = 0; h < s.num_kv_heads; ++h) {
        _Float16 scales[2];
        std::memcpy(&scales[0], keys + 16 * s.kv_width() + 2 * (h * 16 + p % 16), 2);
        std::memcpy(&scales[1], values + 16 * s.kv_width() + 2 * (h * 16 + p % 16), 2);
        for (int d = 0; d < 32; ++d) {
          const int at = p * s.kv_width() + h * 32 + d;
          const double key = (keys[h * 32 * 16 + (d / 4 * 16 + p % 16) * 4 + d % 4] - 128) * static_cast<double>(scales[0]);
          const double value = static_cast<int8_t>(values[(h * 16 + p % 16) * 32 + d]) * static_cast<double>(scales[1]);
          if (p > 0 || h > 0) {
            ASSERT_EQ(key, k_stored[at]) << k->name;
          }
          ASSERT_NEAR(key, k_rotated[at], 0.5001 * static_cast<double>(scales[0])) << k->name;
          ASSERT_NEAR(value, problem.v[at], 0.5001 * static_cast<double>(scales[1])) << k->name;
        }
      }
    }
  }
}

// A channel far above the others, as keys of real models have them: the rotation keeps what the others say.
TEST(Attention, OverInt8KeysEndureAGreatChannel) {
  Problem exact({.type = KvType::kF32, .first_position = 100}), coarse({.type = KvType::kInt8, .first_position = 100});
  for (Problem* problem : {&exact, &coarse})
    for (size_t i = 5; i < problem->k.size(); i += 64) problem->k[i] = 60;
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> a = attend(*k, exact, Cache(*k, exact.shape, exact.k, exact.v, 1), 1);
    const std::vector<float> b = attend(*k, coarse, Cache(*k, coarse.shape, coarse.k, coarse.v, 1), 1);
    double squares = 0, errors = 0;
    for (size_t i = 0; i < a.size(); ++i) squares += a[i] * a[i], errors += (a[i] - b[i]) * (a[i] - b[i]);
    EXPECT_LT(std::sqrt(errors / squares), 0.08) << k->name;  // 0.2 without it
  }
}

TEST(KvWrite, SaturatesInt8AndKeepsNanToItsOwnHead) {
  const Shape s = {.head_dim = 16, .num_kv_heads = 2, .type = KvType::kInt8};
  std::vector<float> k_row(32, 1), v_row(32, -INFINITY);
  k_row[3] = NAN;
  for (const Kernels* k : available_kernels()) {
    const Cache cache(*k, s, k_row, v_row, 0);
    _Float16 key_scales[17], value_scale;
    std::memcpy(key_scales, cache.arena.data() + cache.layer.k_offset + 32 * 16, sizeof key_scales);
    std::memcpy(&value_scale, cache.arena.data() + cache.layer.v_offset + 32 * 16, 2);
    EXPECT_TRUE(std::isnan(static_cast<float>(key_scales[0]))) << k->name;
    EXPECT_NEAR(static_cast<float>(key_scales[16]), 4 / 127.0, 1e-4) << k->name;  // sixteen ones in one channel
    EXPECT_NEAR(static_cast<float>(value_scale) * 127, 65504, 40) << k->name;
    EXPECT_EQ(static_cast<int8_t>(cache.arena[cache.layer.v_offset]), -127) << k->name;
  }
}

}  // namespace
}  // namespace motet
