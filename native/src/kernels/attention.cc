// Paged attention with an online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022), for prefill and decode alike.
//
// The (row, head) pairs of a job are cut into groups of at most kAttentionRows; each key and value vector is loaded
// once for a whole group. Keys go by in partitions of kPartitionTokens positions, and within one in steps of kStepKeys,
// both aligned at position 0. What a pair computes depends on its own query and position alone:
//   - a score is one chain of fused multiply-adds over d, or an exact sum of integers;
//   - the running maximum, the correction and the sum change once per step that the pair sees at all;
//   - an output feature is one chain over the positions of a partition that the pair sees, in order;
//   - every partition begins anew, and its result is folded into those before it, in order (as in FlashDecoding: Dao et
//     al., 2023; but the cuts never move).
// So groups, chunks and loop tiles may be cut in any way, and partitions computed by anybody in any order, without
// changing a bit. Positions that a pair does not see are never multiplied by its weights: whatever bytes lie there
// contribute nothing.
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

// Within f16's range: one infinity would make every later token of the sequence NaN.
MOTET_INLINE f32x16 saturate_f16(f32x16 v) {
  const f32x16 largest = f32_set1(65504.0f);
  return min(largest, max(neg(largest), v));  // in this order NaN stays NaN
}

// What KV blocks hold: how to read sixteen elements, and to write them.
struct F32 {
  using Element = float;
  static constexpr bool kIsInteger = false;
  MOTET_INLINE static f32x16 load16(const float* p) { return load(p); }
  MOTET_INLINE static void store16(float* p, f32x16 v) { store(p, v); }
};
struct F16 {
  using Element = uint16_t;
  static constexpr bool kIsInteger = false;
  MOTET_INLINE static f32x16 load16(const uint16_t* p) { return load_f16(p); }
  MOTET_INLINE static void store16(uint16_t* p, f32x16 v) { store_f16(p, saturate_f16(v)); }
};
struct Int8 {
  using Element = uint8_t;  // of values: their two's complement
  static constexpr bool kIsInteger = true;
  MOTET_INLINE static f32x16 load16(const uint8_t* p) { return to_f32(load_s8(p)); }
};

// One step's view of the cache. Pages lie anywhere, so the processor cannot guess the next: values are prefetched while
// the scores are computed, and the next step's keys while the values are added. Blocks of keys and values are equally
// large, so that place for place the one loop walks over what the other will read. Into the second level of cache:
// prefetching into the first takes fill buffers from the loads (12 instead of 17 GB/s out of memory on Zen 4).
template <class Type>
struct Step {
  const typename Type::Element* keys[kStepBlocks];       // [D, kBlockTokens] each; integers [D/4, kBlockTokens, 4]
  const typename Type::Element* values[kStepBlocks];     // [kBlockTokens, D] each
  const typename Type::Element* next_keys[kStepBlocks];  // of the step that follows, to prefetch
  const uint16_t* key_scales[kStepBlocks];               // f16 [kBlockTokens] each; of integers only
  const uint16_t* value_scales[kStepBlocks];
};

// Positions [begin, end).
struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
};

// What a group of pairs carries from step to step, in the job's scratch.
struct Group {
  float* q;       // [D, kAttentionRows]  queries times scale · log₂e, pairs innermost
  float* acc;     // [kAttentionRows, D]  Σ weight · value of the current partition
  float* scores;  // [kAttentionRows, kStepKeys]  of the current step; then its weights
  float* sums;    // [kAttentionRows, 16]  Σ weight of the current partition, by lane
  float* folded;  // [kAttentionRows, D + kPartialExtra]  the partitions before
  float max[kAttentionRows];
  // Over integer keys queries are integers of 15 bits, 128 · high + low, and q is this scale times those.
  int32_t* high;  // [D/4, kAttentionRows]  four features a word
  int32_t* low;
  float q_scale[kAttentionRows];
  int32_t offset[kAttentionRows];  // keys lie with 128 added: 128 · Σ q
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

// scores[p][16·b ..] = q[p] · keys[b], for kPairs pairs and kBlocks blocks. q: the group's, of the first pair on.
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

// The same over integers: exact sums, then one scale. high, low: the group's, of the first pair on.
template <int kPairs, int kBlocks>
void integer_score_tile(float* scores, const int32_t* high, const int32_t* low, const float* q_scale,
                        const int32_t* offset, const uint8_t* const* keys, const uint16_t* const* key_scales,
                        const uint8_t* const* values, int head_dim) {
  i32x16 acc_high[kPairs][kBlocks], acc_low[kPairs][kBlocks];
  for (int p = 0; p < kPairs; ++p)
    for (int b = 0; b < kBlocks; ++b) acc_high[p][b] = acc_low[p][b] = i32_zero();
  for (int d = 0; d < head_dim / 4; ++d) {
    u8x64 key[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      key[b] = load_bytes(keys[b] + d * 64);
      prefetch_l2(values[b] + d * 64);
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      const u8x64 query_high = bytes_word(high + d * kAttentionRows + p);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) acc_high[p][b] = dot4(acc_high[p][b], key[b], query_high);
      const u8x64 query_low = bytes_word(low + d * kAttentionRows + p);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) acc_low[p][b] = dot4(acc_low[p][b], key[b], query_low);
    }
  }
  for (int p = 0; p < kPairs; ++p) {
    for (int b = 0; b < kBlocks; ++b) {
      const i32x16 sum = shift_left<7>(acc_high[p][b]) + acc_low[p][b] - i32_set1(offset[p]);
      const f32x16 scale = f32_set1(q_scale[p]) * load_f16(key_scales[b]);
      store(scores + p * kStepKeys + b * kBlockTokens, to_f32(sum) * scale);
    }
  }
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
        if (v * 16 * sizeof(typename Type::Element) % 64 == 0) prefetch_l2(next + 16 * v);
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
void scores_of(const Group& group, int pair, const Step<Type>& step, int block_begin, int block_end, int head_dim) {
  constexpr int kAccumulators = Type::kIsInteger ? 2 * kPairs : kPairs;
  constexpr int kFit = power_of_two_below(kTileVectors / kAccumulators);
  constexpr int kBlocks = kFit < 1 ? 1 : kFit < kStepBlocks ? kFit : kStepBlocks;
  float* scores = group.scores + pair * kStepKeys;
  const auto tile = [&]<int kCount>(int b, const typename Type::Element* const* keys,
                                    const typename Type::Element* const* values, const uint16_t* const* scales) {
    float* out = scores + b * kBlockTokens;
    if constexpr (Type::kIsInteger) {
      integer_score_tile<kPairs, kCount>(out, group.high + pair, group.low + pair, group.q_scale + pair,
                                         group.offset + pair, keys, scales, values, head_dim);
    } else {
      score_tile<Type, kPairs, kCount>(out, group.q + pair, keys, values, head_dim);
    }
  };
  for (int b = block_begin / kBlocks * kBlocks; b < block_end; b += kBlocks) {
    const int begin = b < block_begin ? block_begin : b;
    const int end = b + kBlocks < block_end ? b + kBlocks : block_end;
    if constexpr (kPairs >= 4 && kBlocks > 1) {
      if (end - begin < kBlocks) {
        for (int i = begin; i < end; ++i)
          tile.template operator()<1>(i, step.keys + i, step.values + i, step.key_scales + i);
        continue;
      }
    }
    const typename Type::Element* keys[kBlocks];
    const typename Type::Element* values[kBlocks];
    const uint16_t* scales[kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      const int source = b + i >= begin && b + i < end ? b + i : begin;
      keys[i] = step.keys[source];
      values[i] = step.values[source];
      scales[i] = step.key_scales[source];
    }
    tile.template operator()<kBlocks>(b, keys, values, scales);
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
template <class Type>
void softmax_step(const Group& group, int pair, float& running_max, const Step<Type>& step, Range range, int head_dim) {
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
  if constexpr (Type::kIsInteger) {  // a value's scale goes to its weight
    for (int b = range.begin / kBlockTokens; b * kBlockTokens < range.end; ++b)
      store(scores + 16 * b, s[b] * load_f16(step.value_scales[b]));
  }
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
int least(int a, int b) { return a < b ? a : b; }
int greatest(int a, int b) { return a > b ? a : b; }

// The first lane of a vector computed by the same instructions as sixteen.
MOTET_INLINE float first_lane(f32x16 v) {
  float lanes[16];
  store(lanes, v);
  return lanes[0];
}

// Folds the result of the partition after those in `into`. Both are a partial: [D] Σ weight · value, maximum, Σ weight.
void fold(float* into, const float* partial, int head_dim) {
  const float old_max = into[head_dim], max = partial[head_dim];
  const bool rises = max > old_max;
  const f32x16 factor = exp2_nonpositive(f32_set1(rises ? old_max - max : max - old_max));
  const float* scaled = rises ? into : partial;  // the one with the lower maximum
  const float* kept = rises ? partial : into;
  for (int d = 0; d < head_dim; d += 16) store(into + d, fma(load(scaled + d), factor, load(kept + d)));
  const float sum = first_lane(fma(f32_set1(scaled[head_dim + 1]), factor, f32_set1(kept[head_dim + 1])));
  into[head_dim] = kept[head_dim];
  into[head_dim + 1] = sum;
}

void finish(float* out, const float* partial, int head_dim) {
  const f32x16 factor = f32_set1(1.0f / partial[head_dim + 1]);
  for (int d = 0; d < head_dim; d += 16) store(out + d, load(partial + d) * factor);
}

// A Hadamard matrix over the lanes of a vector, symmetric: the sign of [i][j] is the parity of i & j.
struct LaneHadamard {
  alignas(64) float sign[16][16];
  constexpr LaneHadamard() : sign() {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) sign[i][j] = __builtin_parity(static_cast<unsigned>(i & j)) ? -1.0f : 1.0f;
  }
};
constexpr LaneHadamard kLaneHadamard;

// out = x · scale rotated by a Hadamard matrix over each run of as many features as a power of two allows. Queries and keys
// that are rotated alike have the products that they had; but a channel that is far greater than the others, as keys have
// them, is spread over all, and no longer takes the others' precision (Ashkboos et al., 2024).
void rotate(float* out, const float* x, float scale, int head_dim) {
  const int num_vectors = head_dim / 16, run = num_vectors & -num_vectors;
  const f32x16 factor = f32_set1(scale) / sqrt(f32_set1(static_cast<float>(16 * run)));
  for (int v = 0; v < num_vectors; ++v) {
    f32x16 sum = f32_zero();
    for (int j = 0; j < 16; ++j) sum = fma(f32_set1(x[16 * v + j]), load(kLaneHadamard.sign[j]), sum);
    store(out + 16 * v, sum * factor);
  }
  for (int half = 1; half < run; half *= 2) {
    for (int v = 0; v < num_vectors; ++v) {
      if (v & half) continue;
      const f32x16 a = load(out + 16 * v), b = load(out + 16 * (v + half));
      store(out + 16 * v, a + b);
      store(out + 16 * (v + half), a - b);
    }
  }
}

// One query to what scores are computed from.
template <class Type>
void take_query(Group& group, int pair, const float* q, float scale, int head_dim) {
  if constexpr (!Type::kIsInteger) {
    for (int d = 0; d < head_dim; ++d) group.q[d * kAttentionRows + pair] = q[d] * scale;
  } else {
    constexpr float kLargest = 127 * 128 + 63, kLeastNormal = 1.17549435e-38f;
    float rotated[kMaxHeadDimInt8];
    rotate(rotated, q, scale, head_dim);
    f32x16 largest = f32_zero();
    bool is_finite = true;
    for (int d = 0; d < head_dim; d += 16) {
      const f32x16 magnitude = abs(load(rotated + d));
      is_finite = is_finite && bits(magnitude < f32_set1(__builtin_inff())) == 0xffff;
      largest = max(largest, magnitude);
    }
    const float exact = reduce_max(largest) / kLargest;
    const float unit = is_finite && exact >= kLeastNormal ? exact : 0.0f;
    const f32x16 units = f32_set1(unit > 0 ? unit : 1.0f);
    int32_t sum = 0;
    for (int d = 0; d < head_dim; d += 16) {
      const i32x16 n = unit > 0 ? to_i32(load(rotated + d) / units) : i32_zero();
      const i32x16 high = shift_right<7>(n + i32_set1(64));
      sum += reduce_add(n);
      int32_t words[2][4];
      store_s8(words[0], high);
      store_s8(words[1], n - shift_left<7>(high));
      for (int i = 0; i < 4; ++i) {
        group.high[(d / 4 + i) * kAttentionRows + pair] = words[0][i];
        group.low[(d / 4 + i) * kAttentionRows + pair] = words[1][i];
      }
    }
    group.offset[pair] = 128 * sum;
    group.q_scale[pair] = is_finite ? unit : __builtin_nanf("");
  }
}

// The blocks of a step for one KV head.
template <class Type>
Step<Type> step_of(const KvLayer& kv, const AttentionJob& job, int start, int block_begin, int block_end, int end) {
  using Element = typename Type::Element;
  const int64_t head_elements = int64_t{kv.head_dim} * kBlockTokens;
  const auto side = [&](int position, size_t side_offset) {
    return kv.arena + static_cast<size_t>(job.blocks[position / kBlockTokens]) * kv.page_bytes + side_offset;
  };
  const auto head = [&](const uint8_t* side) {
    return reinterpret_cast<const Element*>(side) + job.kv_head * head_elements;
  };
  const auto scales = [&](const uint8_t* side) {
    return reinterpret_cast<const uint16_t*>(side + kv.num_kv_heads * head_elements) + job.kv_head * kBlockTokens;
  };
  Step<Type> step = {};
  for (int b = block_begin; b < block_end; ++b) {
    const int position = start + b * kBlockTokens;
    const uint8_t* keys = side(position, kv.k_offset);
    const uint8_t* values = side(position, kv.v_offset);
    step.keys[b] = head(keys);
    step.values[b] = head(values);
    step.next_keys[b] = position + kStepKeys < end ? head(side(position + kStepKeys, kv.k_offset)) : step.values[b];
    if constexpr (Type::kIsInteger) {
      step.key_scales[b] = scales(keys);
      step.value_scales[b] = scales(values);
    }
  }
  return step;
}

template <class Type>
void attend_group(const KvLayer& kv, const AttentionJob& job, Group& group, int pair_begin, int num_pairs) {
  const int head_dim = kv.head_dim, partial_floats = head_dim + kPartialExtra;
  const float scale = job.scale * 1.44269504088896341f;  // weights are powers of two

  struct Pair {
    int row, head;  // of the batch; the head among all query heads
    Range visible;  // positions of the sequence, of the job's partitions
    bool has_folded;
    float* carried;  // null: nothing is
  } pairs[kAttentionRows];
  int begin = INT32_MAX, end = 0;
  for (int p = 0; p < num_pairs; ++p) {
    const int row = job.rows[(pair_begin + p) / job.heads_per_kv];
    const int head = job.kv_head * job.heads_per_kv + (pair_begin + p) % job.heads_per_kv;
    const int position = job.positions[row];
    const int first = job.window > 0 && position >= job.window ? position - job.window + 1 : 0;
    pairs[p] = {row, head, {greatest(first, job.first_partition * kPartitionTokens),
                            least(position + 1, job.end_partition * kPartitionTokens)}, false, nullptr};
    if (job.carried != nullptr) {
      const AttentionPartials& carried = job.carried[row];
      pairs[p].carried = carried.data + int64_t{head} * carried.count * partial_floats;
      pairs[p].has_folded = first / kPartitionTokens < job.first_partition;
      if (pairs[p].has_folded) __builtin_memcpy(group.folded + p * partial_floats, pairs[p].carried, (head_dim + 2) * sizeof(float));
    }
    take_query<Type>(group, p, job.q + row * job.ldq + static_cast<int64_t>(head) * head_dim, scale, head_dim);
    if (pairs[p].visible.empty()) continue;
    begin = least(begin, pairs[p].visible.begin);
    end = greatest(end, pairs[p].visible.end);
  }

  for (int partition = begin / kPartitionTokens; partition * kPartitionTokens < end; ++partition) {
    const int partition_begin = greatest(begin, partition * kPartitionTokens);
    const int partition_end = least(end, (partition + 1) * kPartitionTokens);
    for (int p = 0; p < num_pairs; ++p) {
      for (int d = 0; d < head_dim; d += 16) store(group.acc + p * head_dim + d, f32_zero());
      store(group.sums + 16 * p, f32_zero());
      group.max[p] = -__builtin_inff();
    }
    for (int start = partition_begin / kStepKeys * kStepKeys; start < partition_end; start += kStepKeys) {
      const int block_begin = clamp_to_step(partition_begin - start) / kBlockTokens;
      const int block_end = (clamp_to_step(partition_end - start) + kBlockTokens - 1) / kBlockTokens;
      const Step<Type> step = step_of<Type>(kv, job, start, block_begin, block_end, end);
      over_tiles(num_pairs, [&]<int kPairs>(int p) {
        scores_of<Type, kPairs>(group, p, step, block_begin, block_end, head_dim);
      });
      Range ranges[kAttentionRows];  // positions of the step
      for (int p = 0; p < num_pairs; ++p) {
        ranges[p] = {clamp_to_step(pairs[p].visible.begin - start), clamp_to_step(pairs[p].visible.end - start)};
        if (!ranges[p].empty()) softmax_step(group, p, group.max[p], step, ranges[p], head_dim);
      }
      add_values(group, step, ranges, num_pairs, head_dim);
    }
    for (int p = 0; p < num_pairs; ++p) {
      const Pair& pair = pairs[p];
      if (pair.visible.end <= partition_begin || pair.visible.begin >= partition_end) continue;
      float* target = group.folded + p * partial_floats;
      float other[kMaxHeadDim + kPartialExtra];
      if (job.partials != nullptr) {
        const AttentionPartials& partials = job.partials[pair.row];
        target = partials.data + (int64_t{pair.head} * partials.count + partition - partials.first) * partial_floats;
      } else if (pair.has_folded) {
        target = other;
      }
      for (int d = 0; d < head_dim; d += 16) store(target + d, load(group.acc + p * head_dim + d));
      target[head_dim] = group.max[p];
      target[head_dim + 1] = reduce_add(load(group.sums + 16 * p));
      if (target == other) fold(group.folded + p * partial_floats, other, head_dim);
      pairs[p].has_folded = true;
    }
  }

  if (job.partials != nullptr) return;
  if (job.carried != nullptr) {
    for (int p = 0; p < num_pairs; ++p)
      if (pairs[p].has_folded) __builtin_memcpy(pairs[p].carried, group.folded + p * partial_floats, (head_dim + 2) * sizeof(float));
    return;
  }
  for (int p = 0; p < num_pairs; ++p) {
    float* out = job.out + pairs[p].row * job.ldo + static_cast<int64_t>(pairs[p].head) * head_dim;
    finish(out, group.folded + p * partial_floats, head_dim);
  }
}

template <class Type>
void attend(const KvLayer& kv, const AttentionJob& job) {
  const int head_dim = kv.head_dim;
  Group group = {};
  group.q = job.scratch + (64 - reinterpret_cast<uintptr_t>(job.scratch) % 64) % 64 / sizeof(float);
  group.high = reinterpret_cast<int32_t*>(group.q);
  group.low = group.high + kAttentionRows * head_dim / 4;
  group.acc = group.q + kAttentionRows * head_dim;
  group.scores = group.acc + kAttentionRows * head_dim;
  group.sums = group.scores + kAttentionRows * kStepKeys;
  group.folded = group.sums + kAttentionRows * 16;
  const int num_pairs = job.num_rows * job.heads_per_kv;
  const int num_groups = (num_pairs + kAttentionRows - 1) / kAttentionRows;
  for (int g = 0, begin = 0; g < num_groups; ++g) {  // of nearly equal size: 16 pairs are 8 and 8
    const int count = (num_pairs - begin + num_groups - g - 1) / (num_groups - g);
    attend_group<Type>(kv, job, group, begin, count);
    begin += count;
  }
}

template <class Type>
void write(const KvLayer& kv, uint8_t* k_side, uint8_t* v_side, int slot, const float* k, const float* v) {
  using Element = typename Type::Element;
  Element* keys = reinterpret_cast<Element*>(k_side);
  Element* values = reinterpret_cast<Element*>(v_side);
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

// The scale of one head's vector, in f16: rounded up, so that 127 of it reach the greatest element.
uint16_t int8_scale(const float* x, int head_dim) {
  f32x16 largest = f32_zero();
  bool has_nan = false;
  for (int d = 0; d < head_dim; d += 16) {
    const f32x16 v = load(x + d);
    has_nan = has_nan || bits(v == v) != 0xffff;
    largest = max(largest, abs(v));
  }
  if (has_nan) return 0x7e00;
  const float exact = reduce_max(largest) / 127.0f;
  uint16_t lanes[16];
  store_f16(lanes, f32_set1(exact));
  return f16_to_f32(lanes[0]) < exact ? lanes[0] + 1 : lanes[0];
}

MOTET_INLINE i32x16 to_int8(f32x16 v, float scale) {
  if (!(scale > 0)) return i32_zero();  // nothing but zeros, or a NaN that the scale carries
  return to_i32(v / f32_set1(scale));
}

void write_int8(const KvLayer& kv, uint8_t* k_side, uint8_t* v_side, int slot, const float* k, const float* v) {
  const int64_t side_elements = int64_t{kv.num_kv_heads} * kv.head_dim * kBlockTokens;
  uint16_t* key_scales = reinterpret_cast<uint16_t*>(k_side + side_elements);
  uint16_t* value_scales = reinterpret_cast<uint16_t*>(v_side + side_elements);
  for (int h = 0; h < kv.num_kv_heads; ++h) {
    float key[kMaxHeadDimInt8], value[kMaxHeadDimInt8];
    for (int d = 0; d < kv.head_dim; d += 16) {
      const int64_t feature = static_cast<int64_t>(h) * kv.head_dim + d;
      store(key + d, saturate_f16(load(k + feature)));
      store(value + d, saturate_f16(load(v + feature)));
    }
    rotate(key, key, 1, kv.head_dim);
    const uint16_t key_scale = int8_scale(key, kv.head_dim), value_scale = int8_scale(value, kv.head_dim);
    key_scales[h * kBlockTokens + slot] = key_scale;
    value_scales[h * kBlockTokens + slot] = value_scale;
    uint8_t* keys = k_side + static_cast<int64_t>(h) * kv.head_dim * kBlockTokens;
    uint8_t* values = v_side + (static_cast<int64_t>(h) * kBlockTokens + slot) * kv.head_dim;
    for (int d = 0; d < kv.head_dim; d += 16) {
      uint32_t words[4];
      store_s8(words, to_int8(load(key + d), f16_to_f32(key_scale)));
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i] ^ 0x80808080u;  // 128 more, as the dot product wants one side unsigned
        __builtin_memcpy(keys + ((d / 4 + i) * kBlockTokens + slot) * 4, &word, 4);
      }
      store_s8(values + d, to_int8(load(value + d), f16_to_f32(value_scale)));
    }
  }
}

}  // namespace

void kv_write(const KvLayer& kv, int32_t page, int32_t position, const float* k, const float* v) {
  uint8_t* base = kv.arena + static_cast<size_t>(page) * kv.page_bytes;
  const int slot = position % kBlockTokens;
  switch (kv.type) {
    case KvType::kF32: return write<F32>(kv, base + kv.k_offset, base + kv.v_offset, slot, k, v);
    case KvType::kF16: return write<F16>(kv, base + kv.k_offset, base + kv.v_offset, slot, k, v);
    case KvType::kInt8: return write_int8(kv, base + kv.k_offset, base + kv.v_offset, slot, k, v);
  }
}

void attention(const KvLayer& kv, const AttentionJob& job) {
  switch (kv.type) {
    case KvType::kF32: return attend<F32>(kv, job);
    case KvType::kF16: return attend<F16>(kv, job);
    case KvType::kInt8: return attend<Int8>(kv, job);
  }
}

void attention_fold(float* out, const float* partials, int num_heads, int num_partitions, int head_dim) {
  const int64_t partial_floats = head_dim + kPartialExtra;
  float folded[kMaxHeadDim + kPartialExtra];
  for (int h = 0; h < num_heads; ++h) {
    const float* of_head = partials + h * num_partitions * partial_floats;
    __builtin_memcpy(folded, of_head, (head_dim + 2) * sizeof(float));
    for (int p = 1; p < num_partitions; ++p) fold(folded, of_head + p * partial_floats, head_dim);
    finish(out + static_cast<int64_t>(h) * head_dim, folded, head_dim);
  }
}

}  // namespace motet::MOTET_ISA
