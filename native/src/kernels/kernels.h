// The arithmetic of one step, as a table of functions per instruction set. Each is written once over simd.h and
// compiled per instruction set; `kernels()` picks the best this processor has.
//
// Two rules hold for every function here:
// 1. A row's result does not depend on which other rows are in the call, on how rows or tiles are split over
//    calls, or on the thread. So a batch gives token for token what its sequences give alone.
// 2. Every variant performs the same operations in the same order (fused multiply-adds written out, no
//    contraction by the compiler), so scalar, AVX2 and AVX-512 agree bit for bit.
//
// Dimension letters: R rows (tokens), K input features, N output features, H heads, D head dimension.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../weights.h"

namespace motet {

// Rows quantised to int8 per group of kActivationGroup input features: x ≈ scale · n, n an integer. One value of a group,
// its greatest, may have an integer of up to 14 bits, so that an outlier does not cost its 31 neighbours their precision:
//   n = q for all but the peak;  n = q + 128 · h for the peak, h from −127 to 127.
// On SmolLM2-135M this brings the divergence from f32 activations down from 0.0037 to 0.0005 nats.
//
// h is kept in two bytes: 128 · h = 16 · m + 2048 · t, m from −64 to 56. Four-bit weights times 16 fit a byte, so that the
// middle part m is one more integer product; t is 0 unless the peak is more than seven times the second greatest value.
//
// Rows lie in blocks of kRowBlock (the last one has the rest), group by group: what a product with a tile of weights
// reads together is together, whatever K is. Every array has kRowBlock places more than it needs, which are read and mean
// nothing; those of peak_chunks hold 0 to 7.
inline constexpr int kRowBlock = 16;
struct QuantizedRows {
  // At `at(row, group)`, [R, K/32] each, with …
  int8_t* q;             // … [q_bytes]  the low parts q [32]; where q_bytes is 64, then m at the peak's place and 0 elsewhere [32]
  float* scale;          // … []
  float* offsets;        // … []   scale · f32(Σ n over the group): what a weight's min is multiplied by
  int32_t* sums8;        // … []   −8 · Σ n over the group: a zero point of 8 adds that, one of 128 sixteen times as much
  int32_t* first_sums8;  // … []   the same over its first 16 input features
  int32_t* peak_chunks;  // … []   which four input features of the group the peak is among, 0 to 7
  int32_t* peak_middles; // … []   m as a byte at the peak's place among those four, the others 0
  int32_t* peak_highs;   // … []   t in the same way
  int32_t k;             // K, a multiple of 32
  int32_t num_rows;      // R
  int32_t q_bytes;       // as the kernels want it (Kernels::q_bytes)

  int block_rows(int64_t row) const {  // rows of the block that `row` is in
    const int64_t left = num_rows - row / kRowBlock * kRowBlock;
    return static_cast<int>(left < kRowBlock ? left : kRowBlock);
  }
  int64_t at(int64_t row, int64_t group) const {
    return row / kRowBlock * kRowBlock * (k / kActivationGroup) + group * block_rows(row) + row % kRowBlock;
  }
};
// Rows that go together over the weights of a product with many rows: as many as the second-level cache holds, so that all
// tiles find them there. Each pass unpacks the weights again. Whole blocks.
inline constexpr int kMinPassRows = 4 * kRowBlock, kMaxPassRows = 256;
constexpr int pass_rows(int64_t k, int q_bytes) {
  constexpr int64_t kPassBytes = 768 << 10;
  const int64_t bytes_of_group = q_bytes + 7 * sizeof(int32_t);
  const int64_t fit = kPassBytes / (k / kActivationGroup * bytes_of_group) / kRowBlock * kRowBlock;
  return static_cast<int>(fit < kMinPassRows ? kMinPassRows : fit < kMaxPassRows ? fit : kMaxPassRows);
}
// The rows [row_begin, row_end) alone; row_begin is the first of a block.
inline QuantizedRows rows_of(const QuantizedRows& x, int row_begin, int row_end) {
  const int64_t at = static_cast<int64_t>(row_begin) * (x.k / kActivationGroup);
  return {x.q + at * x.q_bytes, x.scale + at, x.offsets + at, x.sums8 + at, x.first_sums8 + at, x.peak_chunks + at,
          x.peak_middles + at, x.peak_highs + at, x.k, row_end - row_begin, x.q_bytes};
}
inline constexpr int kHighShift = 7;               // h counts 128ths
inline constexpr int kPeakShift = 4;               // m counts 16ths
inline constexpr int kWideShift = 11;              // t counts 2048ths
inline constexpr float kPeakMax = 127 * 128 + 63;  // the greatest |n| of a peak

// Bytes that a thread reads later than what it does now.
struct Ahead {
  const uint8_t* at = nullptr;
  const uint8_t* end = nullptr;
};

// What KV blocks hold. kF32: for reference. kF16: saturated to ±65504. kInt8: per position and head n · scale, n from −127 to
// 127 and the scale in f16, rounded up; keys rotated by a Hadamard matrix, which queries are too. On SmolLM2-135M the rotation
// brings the divergence from f32 down from 0.0026 to 0.0012 nats; f16 is at 0.0007.
enum class KvType : int32_t { kF32, kF16, kInt8 };

// The keys and values of one layer in the device arena. A block is one page: kBlockTokens positions, all layers.
//   keys   at page + k_offset: [numKvHeads, D, kBlockTokens]   (positions innermost: scores of a block in one vector)
//   values at page + v_offset: [numKvHeads, kBlockTokens, D]
// kInt8: keys u8 [numKvHeads, D/4, kBlockTokens, 4] with 128 added; values s8; after each, scales f16 [numKvHeads, kBlockTokens].
inline constexpr int kBlockTokens = 16;
struct KvLayer {
  uint8_t* arena;
  size_t page_bytes;
  size_t k_offset, v_offset;  // of this layer, in a page
  KvType type;
  int32_t num_kv_heads, head_dim;
};
inline constexpr int kMaxHeadDim = 1024;
inline constexpr int kMaxHeadDimInt8 = 512;  // a score's integer stays below 2^31

// The keys, or the values, of one layer in one page.
constexpr size_t kv_side_bytes(KvType type, int num_kv_heads, int head_dim) {
  const size_t elements = size_t{1} * num_kv_heads * head_dim * kBlockTokens;
  if (type != KvType::kInt8) return elements * (type == KvType::kF32 ? 4 : 2);
  return elements + (size_t{2} * num_kv_heads * kBlockTokens + 63) / 64 * 64;
}

// Keys are attended to in partitions of this many positions, aligned at position 0. Each begins anew and gives a partial
// result; those of a row are folded in ascending order. So partitions may be computed apart, by anybody, in any order.
inline constexpr int kPartitionTokens = 256;
inline constexpr int kPartialExtra = 16;  // floats of a partial beside its D: maximum, sum, and what fills a cache line

// Where the partial results of one row go: [H, count, D + kPartialExtra] f32, of partitions first, first + 1, …
struct AttentionPartials {
  float* data;
  int32_t first, count;
};

// Attention of some rows over keys that they have in common, for one KV head and its query heads.
//   out[r][h] = softmax(scale · q[r][h] · K[0..p]ᵀ) · V[0..p],   p = positions[r]
// Keys at positions ≤ p − window are left out when window > 0.
struct AttentionJob {
  const float* q;            // row r, head h at q + r·ldq + h·D
  int64_t ldq;
  float* out;                // same shape as q, stride ldo
  int64_t ldo;
  const int32_t* rows;       // [num_rows] indices r
  int32_t num_rows;
  const int32_t* positions;  // of row r at [r]
  int32_t heads_per_kv;      // query heads that share the KV head
  int32_t kv_head;
  const int32_t* blocks;     // page ids, in order: of the rows' one sequence, or those that their sequences begin with
  int32_t window;            // 0: all
  float scale;
  int32_t first_partition, end_partition;  // of the keys; all that the rows see, unless there are partials
  const AttentionPartials* partials;       // of row r at [r]; null: results go to out, or are carried
  // Of row r at [r], null: none. The job's partitions are folded into each head's first partial, which has those before
  // them if the row sees any: so a row's partitions may be attended to by several jobs, one after the other.
  const AttentionPartials* carried;
  float* scratch;            // attention_scratch_floats(D) floats of this thread
};
inline constexpr int kAttentionRows = 12;  // (row, head) pairs computed together at most
constexpr size_t attention_scratch_floats(int head_dim) {
  return static_cast<size_t>(kAttentionRows) * (3 * head_dim + 128);  // queries, sums, folded; scores of 64 positions; alignment
}

// How a module's weights lie. An element of A or Bᵀ is what the name says, but in two layouts of our own:
//   kBF16: of every 32 elements in a row, element i and element i + 16 are the low and the high half of word i, so that a
//          shift and a mask bring them to f32 sixteen at a time. Rows are filled up with zeros to a multiple of 32.
//   kInt8: whole numbers from −127 to 127. Those of A stand for themselves: their scale, one for each row, is part of B's.
enum class LoraFormat : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kInt8 = 3 };
constexpr size_t lora_element_bytes(LoraFormat format) { return format == LoraFormat::kF32 ? 4 : format == LoraFormat::kInt8 ? 1 : 2; }

// One module of one adapter, in arena pages. A is [rank, K], a pointer per row. Bᵀ lies in tiles of
// kLoraTileColumns output features, [rank, kLoraTileColumns] each, so that a tile is one stream and fits a page; before an
// int8 tile lie its scales, f32 [rank]. Pieces start at multiples of kLoraAlignment bytes.
inline constexpr int kLoraTileColumns = 64, kLoraAlignment = 64;
struct LoraModule {
  int32_t rank = 0;         // 0: this adapter leaves the module alone
  float scaling = 0;        // alpha / r, or alpha / √r
  LoraFormat format = LoraFormat::kF32;
  const void* const* a_rows = nullptr;     // [rank]
  const void* const* b_tiles = nullptr;    // [ceil(N / 64)]; columns beyond N are zero
  const float* const* gain_tiles = nullptr;  // DoRA: magnitude / ‖W + scaling·BA‖ per output feature, f32 [64] a tile; null: none
  const float* const* bias_tiles = nullptr;  // lora_B's own bias, f32 [64] a tile; null: none
};
// Bytes from the start of an int8 tile to its weights.
constexpr size_t lora_scale_bytes(int rank) { return (static_cast<size_t>(rank) * 4 + kLoraAlignment - 1) / kLoraAlignment * kLoraAlignment; }
constexpr size_t lora_a_row_bytes(LoraFormat format, int64_t k) {
  return (static_cast<size_t>(k) * lora_element_bytes(format) + kLoraAlignment - 1) / kLoraAlignment * kLoraAlignment;
}
constexpr size_t lora_b_tile_bytes(LoraFormat format, int rank) {
  return (format == LoraFormat::kInt8 ? lora_scale_bytes(rank) : 0) + static_cast<size_t>(rank) * kLoraTileColumns * lora_element_bytes(format);
}

// How many streams of weights are read side by side.
inline constexpr int kLoraStreams = 4;
// The rows of a step that one module changes. No row is in two jobs of a wave.
struct LoraJob {
  const LoraModule* module;
  const int32_t* rows;      // [numRows] of x and y
  const float* weights;     // [numRows]
  float* s;                 // [numRows, lds]: what shrink writes and expand reads
  int64_t lds;
  int32_t num_rows;
};

struct SampleParams {
  float temperature;         // 0: greedy
  int32_t top_k;             // 0: all
  float top_p, min_p;        // 1 and 0: off
  float repetition_penalty;  // 1: off; over prompt and output (Keskar et al., 2019)
  float presence_penalty, frequency_penalty;  // 0: off; over output only (OpenAI)
  uint64_t seed;             // the draw depends on (seed, position) alone, so it is the same in any batch
  int32_t position;
  const int32_t* prompt_tokens; int32_t num_prompt_tokens;   // given only when a penalty is on
  const int32_t* output_tokens; int32_t num_output_tokens;
  const int32_t* bias_ids; const float* bias_values; int32_t num_bias;
  const uint32_t* allowed;   // [ceil(vocab/32)] bit mask of the tokens that a grammar allows; null: all
  int32_t num_top;           // how many of the likeliest tokens to report
};
struct SampleResult {
  int32_t token;
  float logprob;             // of the token, under softmax(raw logits)
};

struct Kernels {
  const char* name;  // one of kInstructionSets
  int q_bytes;       // of a group in QuantizedRows::q

  // The groups [group_begin, group_end) of rows [row_begin, row_end) of x [R, K] (stride ldx) to int8. The peak is the first value of greatest magnitude.
  //   scale = max(second greatest |x| / 127, greatest |x| / kPeakMax), n = round-half-even(x · (1 / scale)), h = ⌊(n + 64) / 128⌋
  // A group that is too small to divide by has scale 0; one with a value that is not finite has scale NaN.
  void (*quantize_rows)(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end, int group_begin,
                        int group_end);

  // y[r][n] = Σ_k x[r][k] · w[n][k] for the tiles [tile_begin, tile_end), integer dot products per group:
  //   y = fma chain over groups, in order, from 0:  y ← fma(f32(Σ q_w·n_x − zero·Σ n_x), scale_w·scale_x, y), then
  //   y ← fma(min, scale_x·f32(Σ n_x), y) where the format has a min.
  // y has room for whole tiles (ldy ≥ 16·numTiles). Quantised formats only. On the way it asks for the num_ahead pieces `ahead`, none
  // of them empty, a few lines at a time, so that they are in the second level of cache when it is done.
  void (*matmul_q)(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int tile_begin, int tile_end, const Ahead* ahead,
                   int num_ahead);

  // The same with f32 activations, any format: w dequantised as fma(f32(q − zero), scale, min), y ← fma(w, x, y) over k in order.
  void (*matmul_f)(float* y, int64_t ldy, const PackedMatrix& w, const float* x, int64_t ldx, int num_rows, int tile_begin, int tile_end);

  // out[k] = w[n][k], dequantised: an embedding row.
  void (*unpack_row)(float* out, const PackedMatrix& w, int32_t n);

  // y[r] = x[r] / √(mean(x[r]²) + eps) · weight;  [R, n], strides ldx, ldy; y may be x.
  void (*rmsnorm)(float* y, int64_t ldy, const float* x, int64_t ldx, const float* weight, int num_rows, int n, float eps);

  // Rotates pairs (i, i + D/2) of each head (the rotate-half form) by the angles of the row's position, in place.
  //   cos, sin: [maxPositions, D/2]
  void (*rope)(float* x, int64_t ldx, int num_heads, int head_dim, const int32_t* positions, int num_rows, const float* cos, const float* sin);

  // out[r][i] = act(gate[r][i]) · up[r][i];  silu, or gelu with the tanh approximation.
  void (*silu_mul)(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu, int num_rows, int n);
  void (*gelu_mul)(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu, int num_rows, int n);

  // y[i] += x[i]
  void (*add)(float* y, const float* x, int64_t n);

  // Writes one row's keys and values ([numKvHeads · D] each, f32) into its block at position % kBlockTokens.
  void (*kv_write)(const KvLayer& kv, int32_t page, int32_t position, const float* k, const float* v);

  void (*attention)(const KvLayer& kv, const AttentionJob& job);

  // out[h] = the result of a row's head h from its partials [num_heads, num_partitions, D + kPartialExtra].
  void (*attention_fold)(float* out, const float* partials, int num_heads, int num_partitions, int head_dim);

  // s[i][j] = x[rows[i]] · A[j]  for each job's rows i in [row_begin, row_end) and rank rows j in [j_begin, j_end).
  // kLoraStreams jobs of one row each, of the same rank and format, are read side by side.
  void (*lora_shrink)(const LoraJob* jobs, int num_jobs, const float* x, int64_t ldx, int k, int row_begin, int row_end, int j_begin, int j_end);

  // For the output tiles [tile_begin, tile_end) of 64 columns, the jobs in their order, and i in a job's rows:
  //   delta = scaling · (s[i] · Bᵀ + bias);  gain g:  delta = g · delta + (g − 1) · base[rows[i]]
  //   y[rows[i]] += weights[i] · delta
  // base is the projection before any adapter (may be y itself only when no row is in two jobs: read before it is
  // written); n is N. Columns beyond n are not touched.
  void (*lora_expand)(float* y, int64_t ldy, const float* base, int64_t ldb, const LoraJob* jobs, int num_jobs, int n, int tile_begin, int tile_end);

  // Turns raw logits [vocab] into one token. `logits` stays raw; what is not finite in it is made so. The num_top
  // likeliest tokens of the raw distribution and their logprobs, likeliest first, go to top_ids, top_logprobs; beyond
  // the vocabulary −1 and −∞. scratch: [vocab] of 8 bytes.
  SampleResult (*sample)(float* logits, int vocab, const SampleParams& params, int32_t* top_ids, float* top_logprobs, void* scratch);
};

// Best first. "amx" is "avx512" and "avxvnni" is "avx2" with another matmul_q.
inline constexpr const char* kInstructionSets[] = {"amx", "avx512", "avxvnni", "avx2", "scalar"};

// The table for this processor; MOTET_ISA names another (an instruction set that is absent is an error).
const Kernels& kernels();
// One by name, or null when this processor cannot run it: for tests.
const Kernels* kernels_by_name(const char* name);

}  // namespace motet
