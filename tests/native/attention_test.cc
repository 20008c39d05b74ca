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
  ElementType type = ElementType::kF16;
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
    const size_t side = static_cast<size_t>(s.kv_width()) * kBlockTokens * element_bytes(s.type);
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
  std::vector<float> q, k, v;  // [num_rows, q_width], [num_positions, kv_width]

  explicit Problem(const Shape& s)
      : shape(s), q(random_floats(static_cast<size_t>(s.num_rows) * s.q_width(), 1)),
        k(random_floats(static_cast<size_t>(s.num_positions()) * s.kv_width(), 2)),
        v(random_floats(static_cast<size_t>(s.num_positions()) * s.kv_width(), 3)) {}
};

// Runs the rows in calls of rows_per_call.
std::vector<float> attend(const Kernels& kernels, const Problem& problem, const Cache& cache, int rows_per_call) {
  const Shape& s = problem.shape;
  std::vector<float> out(problem.q.size(), NAN);
  std::vector<float> scratch(attention_scratch_floats(s.heads_per_kv, s.head_dim), NAN);
  for (int row = 0; row < s.num_rows; row += rows_per_call) {
    for (int kv_head = 0; kv_head < s.num_kv_heads; ++kv_head) {
      const size_t at = static_cast<size_t>(row) * s.q_width() + kv_head * s.heads_per_kv * s.head_dim;
      kernels.attention(cache.layer, {.q = &problem.q[at], .ldq = s.q_width(), .out = &out[at], .ldo = s.q_width(),
                                      .num_rows = std::min(rows_per_call, s.num_rows - row),
                                      .first_position = s.first_position + row, .heads_per_kv = s.heads_per_kv,
                                      .kv_head = kv_head, .blocks = cache.blocks.data(), .window = s.window,
                                      .scale = s.scale(), .scratch = scratch.data()});
    }
  }
  return out;
}

float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// What is left of a value of ordinary size after a trip through the cache.
double stored(float value, ElementType type) {
  if (type == ElementType::kF32) return value;
  if (type == ElementType::kF16) return static_cast<double>(static_cast<_Float16>(value));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

std::vector<double> plain_softmax(const Problem& problem) {
  const Shape& s = problem.shape;
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
        for (int d = 0; d < s.head_dim; ++d)
          score += problem.q[at + d] * stored(problem.k[t * s.kv_width() + kv_at + d], s.type);
        weights.push_back(score * s.scale());
        largest = std::max(largest, weights.back());
      }
      for (double& w : weights) sum += w = std::exp(w - largest);
      for (int t = begin; t <= position; ++t) {
        for (int d = 0; d < s.head_dim; ++d)
          out[at + d] += weights[t - begin] / sum * stored(problem.v[t * s.kv_width() + kv_at + d], s.type);
      }
    }
  }
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Every corner of steps and blocks, then random shapes.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
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
  for (size_t i = 0; i < all.size(); ++i) all[i].type = static_cast<ElementType>(i % 3);
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
      for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 4e-6) << k->name << " " << shape.name();
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
    }
  }
}

TEST(Attention, RowsDoNotSeeLaterTokensOfTheSameCall) {
  for (const int window : {0, 30}) {
    Problem problem({.first_position = 40, .num_rows = 40, .window = window});
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
  const Problem problem({.type = ElementType::kF32});
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> out = attend(*k, problem, Cache(*k, problem.shape, problem.k, problem.v, 1), 1);
    for (int head = 0; head < 6; ++head) {
      for (int d = 0; d < 64; ++d) ASSERT_EQ(out[head * 64 + d], problem.v[head / 3 * 64 + d]) << k->name;
    }
  }
}

TEST(Attention, SurvivesScoresThatOverflowAnExponential) {
  Problem problem({.type = ElementType::kF32, .first_position = 150});
  for (float& q : problem.q) q *= 1000;
  const std::vector<double> expected = plain_softmax(problem);
  for (const Kernels* k : available_kernels()) {
    const std::vector<float> out = attend(*k, problem, Cache(*k, problem.shape, problem.k, problem.v, 1), 1);
    // Scores of thousands carry an error of about 1e-3, which moves the weights by that much.
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 2e-2) << k->name;
  }
}

TEST(KvWrite, PutsKeysTransposedAndValuesInRows) {
  const Shape s = {.head_dim = 32, .type = ElementType::kF32, .first_position = 20};
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
  const Shape s = {.type = ElementType::kF16, .first_position = 2};  // positions 0, 1, 2 of one block
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
  const Shape s = {.head_dim = 16, .num_kv_heads = 1, .type = ElementType::kF16};
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

}  // namespace
}  // namespace motet
