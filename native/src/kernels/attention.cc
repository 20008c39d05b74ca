// Paged attention with an online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022), for prefill and decode alike.
//
// The (row, head) pairs of a job are cut into groups of at most kAttentionRows; each key and value vector is loaded
// once for a whole group. Keys go by in steps of kStepKeys positions, aligned at position 0. What a pair computes
// depends on its own query and position alone:
//   - a score is one chain of fused multiply-adds over d;
//   - the running maximum, the correction and the sum change once per aligned step that the pair sees at all;
//   - an output feature is one chain over the positions that the pair sees, in order.
// So groups, chunks and loop tiles may be cut in any way without changing a bit. Positions that a pair does not see
// are never multiplied by its weights: whatever bytes lie there contribute nothing.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

namespace {

constexpr int kStepBlocks = 4;
constexpr int kStepKeys = kStepBlocks * kBlockTokens;
static_assert(kBlockTokens == 16, "the scores of a block are one vector");

// Pairs of a tile, and accumulators that stay in registers: of 32 with AVX-512, of 16 that take two a value with AVX2.
#if defined(MOTET_ISA_avx512)
constexpr int kTilePairs = 12;
constexpr int kTileVectors = 24;
#elif defined(MOTET_ISA_avx2)
constexpr int kTilePairs = 6;
constexpr int kTileVectors = 6;
#else
constexpr int kTilePairs = 4;
constexpr int kTileVectors = 4;
#endif

struct F32 {
  using Element = float;
  MOTET_INLINE static f32x16 load16(const float* p) { return load(p); }
  MOTET_INLINE static void store16(float* p, f32x16 v) { store(p, v); }
};
struct F16 {
  using Element = uint16_t;
  MOTET_INLINE static f32x16 load16(const uint16_t* p) { return load_f16(p); }
  // Saturates: one infinity would make every later token of the sequence NaN.
  MOTET_INLINE static void store16(uint16_t* p, f32x16 v) {
    const f32x16 largest = f32_set1(65504.0f);
    store_f16(p, min(largest, max(neg(largest), v)));  // in this order NaN stays NaN
  }
};
struct BF16 {
  using Element = uint16_t;
  MOTET_INLINE static f32x16 load16(const uint16_t* p) { return load_bf16(p); }
  MOTET_INLINE static void store16(uint16_t* p, f32x16 v) { store_bf16(p, v); }
};

// One step's view of the cache. Pages lie anywhere, so the processor cannot guess the next: values are prefetched while
// the scores are computed, and the next step's keys while the values are added. Blocks of keys and values are equally
// large, so that place for place the one loop walks over what the other will read. Into the second level of cache:
// prefetching into the first takes fill buffers from the loads (12 instead of 17 GB/s out of memory on Zen 4).
template <class Type>
struct Step {
  const typename Type::Element* keys[kStepBlocks];       // [D, kBlockTokens] each
  const typename Type::Element* values[kStepBlocks];     // [kBlockTokens, D] each
  const typename Type::Element* next_keys[kStepBlocks];  // of the step that follows, to prefetch
};

// Positions [begin, end).
struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
};

// What a group of pairs carries from step to step, in the job's scratch.
struct Group {
  float* q;       // [D, kAttentionRows]  queries times scale · log₂e, pairs innermost
  float* acc;     // [kAttentionRows, D]  Σ weight · value
  float* scores;  // [kAttentionRows, kStepKeys]  of the current step; then its weights
  float* sums;    // [kAttentionRows, 16]  Σ weight, by lane
  float max[kAttentionRows];
};

// 2^x for x <= 0 within 3 ulp: exactly 1 at 0, 0 below −126.5, a polynomial fitted to 2^f for |f| <= ½.
MOTET_INLINE f32x16 exp2_nonpositive(f32x16 x) {
  x = max(f32_set1(-127.0f), x);  // in this order NaN stays NaN
  const f32x16 n = round_even(x);
  const f32x16 f = x - n;
  f32x16 p = f32_set1(1.326472498e-3f);
  p = fma(p, f, f32_set1(9.671512991e-3f));
  p = fma(p, f, f32_set1(5.550733581e-2f));
  p = fma(p, f, f32_set1(2.402224243e-1f));
  p = fma(p, f, f32_set1(6.931470037e-1f));
  p = fma(p, f, f32_set1(1.0f));
  return p * as_f32(shift_left<23>(to_i32(n) + i32_set1(127)));
}

// scores[p][16·b ..] = q[p] · keys[b], for kPairs pairs and kBlocks blocks.
template <class Type, int kPairs, int kBlocks>
void score_tile(float* scores, const float* q, const typename Type::Element* const* keys,
                const typename Type::Element* const* values, int head_dim) {
  f32x16 acc[kPairs][kBlocks];
  for (int p = 0; p < kPairs; ++p)
    for (int b = 0; b < kBlocks; ++b) acc[p][b] = f32_zero();
  for (int d = 0; d < head_dim; ++d) {
    f32x16 key[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      key[b] = Type::load16(keys[b] + d * kBlockTokens);
      prefetch_l2(values[b] + d * kBlockTokens);
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      const f32x16 query = f32_set1(q[d * kAttentionRows + p]);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) acc[p][b] = fma(query, key[b], acc[p][b]);
    }
  }
  for (int p = 0; p < kPairs; ++p)
    for (int b = 0; b < kBlocks; ++b) store(scores + p * kStepKeys + b * kBlockTokens, acc[p][b]);
}

// acc[p][0 .. 16·kVectors) += Σ_t weights[p][t] · values[t][offset ..], over the positions of the range.
template <class Type, int kPairs, int kVectors>
void value_tile(float* acc, const float* weights, const Step<Type>& step, int offset, Range range, int head_dim) {
  f32x16 sum[kPairs][kVectors];
  for (int p = 0; p < kPairs; ++p)
    for (int v = 0; v < kVectors; ++v) sum[p][v] = load(acc + p * head_dim + 16 * v);
  for (int t = range.begin; t < range.end;) {
    const int block_end = (t / kBlockTokens + 1) * kBlockTokens;
    const int end = block_end < range.end ? block_end : range.end;
    const int in_block = (t % kBlockTokens) * head_dim + offset;
    const typename Type::Element* row = step.values[t / kBlockTokens] + in_block;
    const typename Type::Element* next = step.next_keys[t / kBlockTokens] + in_block;
    for (; t < end; ++t, row += head_dim, next += head_dim) {
      f32x16 value[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        value[v] = Type::load16(row + 16 * v);
        prefetch_l2(next + 16 * v);
      }
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        const f32x16 weight = f32_set1(weights[p * kStepKeys + t]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[p][v] = fma(weight, value[v], sum[p][v]);
      }
    }
  }
  for (int p = 0; p < kPairs; ++p)
    for (int v = 0; v < kVectors; ++v) store(acc + p * head_dim + 16 * v, sum[p][v]);
}

constexpr int power_of_two_below(int n) {
  int power = 1;
  while (power * 2 <= n) power *= 2;
  return power;
}

// The scores of kPairs pairs against the blocks [block_begin, block_end) of the step. Blocks are taken kBlocks at a
// time to have enough independent chains. Where some of those are missing, many pairs take the rest one by one; few
// pairs, whose chains would be too few, repeat a block instead, and its scores are masked afterwards.
template <class Type, int kPairs>
void scores_of(float* scores, const float* q, const Step<Type>& step, int block_begin, int block_end, int head_dim) {
  constexpr int kFit = power_of_two_below(kTileVectors / kPairs);
  constexpr int kBlocks = kFit < kStepBlocks ? kFit : kStepBlocks;
  for (int b = block_begin / kBlocks * kBlocks; b < block_end; b += kBlocks) {
    const int begin = b < block_begin ? block_begin : b;
    const int end = b + kBlocks < block_end ? b + kBlocks : block_end;
    if constexpr (kPairs >= 4 && kBlocks > 1) {
      if (end - begin < kBlocks) {
        for (int i = begin; i < end; ++i)
          score_tile<Type, kPairs, 1>(scores + i * kBlockTokens, q, step.keys + i, step.values + i, head_dim);
        continue;
      }
    }
    const typename Type::Element* keys[kBlocks];
    const typename Type::Element* values[kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      const bool exists = b + i >= begin && b + i < end;
      keys[i] = step.keys[exists ? b + i : begin];
      values[i] = step.values[exists ? b + i : begin];
    }
    score_tile<Type, kPairs, kBlocks>(scores + b * kBlockTokens, q, keys, values, head_dim);
  }
}

// acc[p] += Σ_t weights[p][t] · values[t], as many features at a time as fit registers.
template <class Type, int kPairs, int kVectors = power_of_two_below(kTileVectors / kPairs)>
void values_of(float* acc, const float* weights, const Step<Type>& step, Range range, int head_dim, int offset = 0) {
  for (; offset + 16 * kVectors <= head_dim; offset += 16 * kVectors)
    value_tile<Type, kPairs, kVectors>(acc + offset, weights, step, offset, range, head_dim);
  if constexpr (kVectors > 1) {
    if (offset < head_dim) values_of<Type, kPairs, kVectors / 2>(acc, weights, step, range, head_dim, offset);
  }
}

// Calls function.operator()<n>() for n = num_pairs, 1 <= n <= kPairs.
template <int kPairs = kTilePairs, class Function>
MOTET_INLINE void with_pairs(int num_pairs, const Function& function) {
  if constexpr (kPairs == 1) {
    function.template operator()<1>();
  } else if (num_pairs == kPairs) {
    function.template operator()<kPairs>();
  } else {
    with_pairs<kPairs - 1>(num_pairs, function);
  }
}

// Calls function.operator()<n>(p) for the tiles of n pairs from p on that the group is cut into, of nearly equal size.
template <class Function>
MOTET_INLINE void over_tiles(int num_pairs, const Function& function) {
  const int num_tiles = (num_pairs + kTilePairs - 1) / kTilePairs;
  const int tile_pairs = (num_pairs + num_tiles - 1) / num_tiles;
  for (int p = 0; p < num_pairs; p += tile_pairs) {
    const int count = num_pairs - p < tile_pairs ? num_pairs - p : tile_pairs;
    with_pairs(count, [&]<int kPairs>() { function.template operator()<kPairs>(p); });
  }
}

// From a pair's scores of this step to its weights 2^(score − max), in place; positions out of range get none.
// Rescales what the pair has gathered when the maximum rises.
void softmax_step(const Group& group, int pair, float& running_max, Range range, int head_dim) {
  float* scores = group.scores + pair * kStepKeys;
  for (int t = 0; t < range.begin; ++t) scores[t] = -__builtin_inff();
  for (int t = range.end; t < kStepKeys; ++t) scores[t] = -__builtin_inff();
  f32x16 s[kStepBlocks];
  for (int b = 0; b < kStepBlocks; ++b) s[b] = load(scores + 16 * b);
  const float step_max = reduce_max(max(max(s[0], s[1]), max(s[2], s[3])));
  const float new_max = step_max > running_max ? step_max : running_max;
  float* sums = group.sums + 16 * pair;
  if (new_max > running_max) {
    const f32x16 correction = exp2_nonpositive(f32_set1(running_max - new_max));
    float* acc = group.acc + pair * head_dim;
    for (int d = 0; d < head_dim; d += 16) store(acc + d, load(acc + d) * correction);
    store(sums, load(sums) * correction);
  }
  for (int b = 0; b < kStepBlocks; ++b) {
    s[b] = exp2_nonpositive(s[b] - f32_set1(new_max));
    store(scores + 16 * b, s[b]);
  }
  store(sums, load(sums) + ((s[0] + s[1]) + (s[2] + s[3])));
  running_max = new_max;
}

// Adds the step's weighted values. Positions that all pairs see go through tiles, the few others pair by pair.
template <class Type>
void add_values(const Group& group, const Step<Type>& step, const Range* ranges, int num_pairs, int head_dim) {
  Range common = ranges[0];
  for (int p = 1; p < num_pairs; ++p) {
    if (ranges[p].begin > common.begin) common.begin = ranges[p].begin;
    if (ranges[p].end < common.end) common.end = ranges[p].end;
  }
  const auto alone = [&](int p, int begin, int end) {
    if (begin >= end) return;
    values_of<Type, 1>(group.acc + p * head_dim, group.scores + p * kStepKeys, step, {begin, end}, head_dim);
  };
  if (common.empty()) {
    for (int p = 0; p < num_pairs; ++p) alone(p, ranges[p].begin, ranges[p].end);
    return;
  }
  for (int p = 0; p < num_pairs; ++p) alone(p, ranges[p].begin, common.begin);
  over_tiles(num_pairs, [&]<int kPairs>(int p) {
    values_of<Type, kPairs>(group.acc + p * head_dim, group.scores + p * kStepKeys, step, common, head_dim);
  });
  for (int p = 0; p < num_pairs; ++p) alone(p, common.end, ranges[p].end);
}

int clamp_to_step(int position) { return position < 0 ? 0 : position > kStepKeys ? kStepKeys : position; }

template <class Type>
void attend_group(const KvLayer& kv, const AttentionJob& job, Group& group, int pair_begin, int num_pairs) {
  using Element = typename Type::Element;
  const int head_dim = kv.head_dim;
  const auto head_at = [&](int position, size_t side_offset) {
    const size_t page = static_cast<size_t>(job.blocks[position / kBlockTokens]) * kv.page_bytes;
    const Element* side = reinterpret_cast<const Element*>(kv.arena + page + side_offset);
    return side + static_cast<int64_t>(job.kv_head) * head_dim * kBlockTokens;
  };

  const float scale = job.scale * 1.44269504088896341f;  // weights are powers of two

  Range visible[kAttentionRows];  // positions of the sequence
  int begin = INT32_MAX, end = 0;
  for (int p = 0; p < num_pairs; ++p) {
    const int row = (pair_begin + p) / job.heads_per_kv, head = (pair_begin + p) % job.heads_per_kv;
    const float* q = job.q + row * job.ldq + static_cast<int64_t>(head) * head_dim;
    for (int d = 0; d < head_dim; ++d) group.q[d * kAttentionRows + p] = q[d] * scale;
    for (int d = 0; d < head_dim; d += 16) store(group.acc + p * head_dim + d, f32_zero());
    store(group.sums + 16 * p, f32_zero());
    group.max[p] = -__builtin_inff();
    const int position = job.first_position + row;
    visible[p] = {job.window > 0 && position >= job.window ? position - job.window + 1 : 0, position + 1};
    if (visible[p].begin < begin) begin = visible[p].begin;
    if (visible[p].end > end) end = visible[p].end;
  }

  for (int start = begin / kStepKeys * kStepKeys; start < end; start += kStepKeys) {
    const int block_begin = clamp_to_step(begin - start) / kBlockTokens;
    const int block_end = (clamp_to_step(end - start) + kBlockTokens - 1) / kBlockTokens;
    Step<Type> step = {};
    for (int b = block_begin; b < block_end; ++b) {
      const int position = start + b * kBlockTokens;
      step.keys[b] = head_at(position, kv.k_offset);
      step.values[b] = head_at(position, kv.v_offset);
      step.next_keys[b] = position + kStepKeys < end ? head_at(position + kStepKeys, kv.k_offset) : step.values[b];
    }
    over_tiles(num_pairs, [&]<int kPairs>(int p) {
      scores_of<Type, kPairs>(group.scores + p * kStepKeys, group.q + p, step, block_begin, block_end, head_dim);
    });
    Range ranges[kAttentionRows];  // positions of the step
    for (int p = 0; p < num_pairs; ++p) {
      ranges[p] = {clamp_to_step(visible[p].begin - start), clamp_to_step(visible[p].end - start)};
      if (!ranges[p].empty()) softmax_step(group, p, group.max[p], ranges[p], head_dim);
    }
    add_values(group, step, ranges, num_pairs, head_dim);
  }

  for (int p = 0; p < num_pairs; ++p) {
    const int row = (pair_begin + p) / job.heads_per_kv, head = (pair_begin + p) % job.heads_per_kv;
    float* out = job.out + row * job.ldo + static_cast<int64_t>(head) * head_dim;
    const f32x16 factor = f32_set1(1.0f / reduce_add(load(group.sums + 16 * p)));
    for (int d = 0; d < head_dim; d += 16) store(out + d, load(group.acc + p * head_dim + d) * factor);
  }
}

template <class Type>
void attend(const KvLayer& kv, const AttentionJob& job) {
  Group group = {};
  group.q = job.scratch + (64 - reinterpret_cast<uintptr_t>(job.scratch) % 64) % 64 / sizeof(float);
  group.acc = group.q + kAttentionRows * kv.head_dim;
  group.scores = group.acc + kAttentionRows * kv.head_dim;
  group.sums = group.scores + kAttentionRows * kStepKeys;
  const int num_pairs = job.num_rows * job.heads_per_kv;
  const int num_groups = (num_pairs + kAttentionRows - 1) / kAttentionRows;
  for (int g = 0, begin = 0; g < num_groups; ++g) {  // of nearly equal size: 16 pairs are 8 and 8
    const int count = (num_pairs - begin + num_groups - g - 1) / (num_groups - g);
    attend_group<Type>(kv, job, group, begin, count);
    begin += count;
  }
}

template <class Type>
void write(const KvLayer& kv, int32_t page, int32_t position, const float* k, const float* v) {
  using Element = typename Type::Element;
  uint8_t* base = kv.arena + static_cast<size_t>(page) * kv.page_bytes;
  Element* keys = reinterpret_cast<Element*>(base + kv.k_offset);
  Element* values = reinterpret_cast<Element*>(base + kv.v_offset);
  const int slot = position % kBlockTokens;
  for (int h = 0; h < kv.num_kv_heads; ++h) {
    for (int d = 0; d < kv.head_dim; d += 16) {
      const int64_t feature = static_cast<int64_t>(h) * kv.head_dim + d;
      Element lanes[16];
      Type::store16(lanes, load(k + feature));
      for (int i = 0; i < 16; ++i) keys[(feature + i) * kBlockTokens + slot] = lanes[i];
      const int64_t row = static_cast<int64_t>(h) * kBlockTokens + slot;
      Type::store16(values + row * kv.head_dim + d, load(v + feature));
    }
  }
}

}  // namespace

void kv_write(const KvLayer& kv, int32_t page, int32_t position, const float* k, const float* v) {
  switch (kv.type) {
    case ElementType::kF32: return write<F32>(kv, page, position, k, v);
    case ElementType::kF16: return write<F16>(kv, page, position, k, v);
    case ElementType::kBF16: return write<BF16>(kv, page, position, k, v);
  }
}

void attention(const KvLayer& kv, const AttentionJob& job) {
  switch (kv.type) {
    case ElementType::kF32: return attend<F32>(kv, job);
    case ElementType::kF16: return attend<F16>(kv, job);
    case ElementType::kBF16: return attend<BF16>(kv, job);
  }
}

}  // namespace motet::MOTET_ISA
