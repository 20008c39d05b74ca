// The two halves of a low-rank delta: shrink to the rank (x · Aᵀ), expand to the output features (s · Bᵀ) and
// add.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Rows computed together, so that a weight is read and widened once for them; for shrink also ranks, so that
// x is.
#if defined(MOTET_ISA_avx512)
static constexpr int kExpandRows = 4, kShrinkRows = 2, kShrinkRanks = 2;
#else
static constexpr int kExpandRows = 1, kShrinkRows = 1, kShrinkRanks = 1;
#endif

template <ElementType kType>
MOTET_INLINE f32x16 load_weights(const void* p, int64_t index) {
  if constexpr (kType == ElementType::kF32) return load(static_cast<const float*>(p) + index);
  const uint16_t* half = static_cast<const uint16_t*>(p) + index;
  return kType == ElementType::kF16 ? load_f16(half) : load_bf16(half);
}

template <ElementType kType>
MOTET_INLINE f32x16 load_weights_n(const void* p, int64_t index, int n) {
  if constexpr (kType == ElementType::kF32) return load_n(static_cast<const float*>(p) + index, n);
  const uint16_t* half = static_cast<const uint16_t*>(p) + index;
  return kType == ElementType::kF16 ? load_f16_n(half, n) : load_bf16_n(half, n);
}

// s[i][j] = x[i] · a[j] for a block of rows and ranks. Sum c takes the features 16c to 16c + 15 of every 64;
// in the end (0 + 1) + (2 + 3), reduced.
template <ElementType kType, int kRows, int kRanks>
static void shrink_block(float* s, int64_t lds, const float* const* x, const void* const* a, int64_t k) {
  constexpr int kSums = 4;
  f32x16 acc[kRows][kRanks][kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 4
      for (int c = 0; c < kSums; ++c) acc[i][j][c] = f32_zero();
    }
  }
  const auto accumulate = [&](int c, int64_t f, int n) __attribute__((always_inline)) {
    f32x16 weights[kRanks];
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) {
      weights[j] = n == 16 ? load_weights<kType>(a[j], f) : load_weights_n<kType>(a[j], f, n);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const f32x16 features = n == 16 ? load(x[i] + f) : load_n(x[i] + f, n);
#pragma GCC unroll 2
      for (int j = 0; j < kRanks; ++j) acc[i][j][c] = fma(weights[j], features, acc[i][j][c]);
    }
  };
  int64_t f = 0;
  for (; f + 16 * kSums <= k; f += 16 * kSums) {
#pragma GCC unroll 4
    for (int c = 0; c < kSums; ++c) accumulate(c, f + 16 * c, 16);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kSums; ++c) {
    const int64_t left = k - f - 16 * c;
    if (left > 0) accumulate(c, f + 16 * c, left < 16 ? static_cast<int>(left) : 16);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) {
      s[i * lds + j] = reduce_add((acc[i][j][0] + acc[i][j][1]) + (acc[i][j][2] + acc[i][j][3]));
    }
  }
}

template <ElementType kType, int kRows>
MOTET_INLINE void shrink_rows(float* s, int64_t lds, const float* x, int64_t ldx, const int32_t* rows,
                              int64_t k, const LoraModule& m, int j_begin, int j_end) {
  const float* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = x + rows[i] * ldx;
  constexpr int kRanks =
      kRows == 1 ? 1 : kShrinkRanks;  // a single row is bound by memory: one stream at a time
  int j = j_begin;
  for (; j + kRanks <= j_end; j += kRanks) {
    shrink_block<kType, kRows, kRanks>(s + j, lds, row, m.a_rows + j, k);
  }
  for (; j < j_end; ++j) shrink_block<kType, kRows, 1>(s + j, lds, row, m.a_rows + j, k);
}

// One tile of 64 columns for kRows rows: s · Bᵀ, j in order, then bias, scaling, gain, and onto y.
template <ElementType kType, int kRows>
static void expand_tile(float* y, int64_t ldy, const float* base, int64_t ldb, const float* s, int64_t lds,
                        const int32_t* rows, const float* weights, int num_columns, const LoraModule& m,
                        const void* b, const float* gain, const float* bias) {
  constexpr int kVectors = kLoraTileColumns / 16;
  f32x16 acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) acc[i][c] = f32_zero();
  }
  for (int64_t j = 0; j < m.rank; ++j) {
    f32x16 factor[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) factor[i] = f32_set1(s[i * lds + j]);
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const f32x16 column = load_weights<kType>(b, j * kLoraTileColumns + 16 * c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) acc[i][c] = fma(column, factor[i], acc[i][c]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const int left = num_columns - 16 * c;
      if (left <= 0) continue;
      const int n = left < 16 ? left : 16;
      f32x16 delta = acc[i][c];
      if (bias != nullptr) delta = delta + load(bias + 16 * c);
      delta = delta * f32_set1(m.scaling);
      if (gain != nullptr) {
        const f32x16 g = load(gain + 16 * c);
        delta = fma(g, delta, (g - f32_set1(1.0f)) * load_n(base + rows[i] * ldb + 16 * c, n));
      }
      float* out = y + rows[i] * ldy + 16 * c;
      store_n(out, fma(f32_set1(weights[i]), delta, load_n(out, n)), n);
    }
  }
}

template <ElementType kType, int kRows>
MOTET_INLINE void expand_block(float* y, int64_t ldy, const float* base, int64_t ldb, const float* s,
                               int64_t lds, const int32_t* rows, const float* weights, int n,
                               const LoraModule& m, int tile) {
  const int64_t begin = int64_t{tile} * kLoraTileColumns;
  const int64_t left = n - begin;
  expand_tile<kType, kRows>(y + begin, ldy, base + begin, ldb, s, lds, rows, weights,
                            left < kLoraTileColumns ? static_cast<int>(left) : kLoraTileColumns, m,
                            m.b_tiles[tile], m.gain_tiles != nullptr ? m.gain_tiles[tile] : nullptr,
                            m.bias_tiles != nullptr ? m.bias_tiles[tile] : nullptr);
}

template <typename Function>
MOTET_INLINE void dispatch_type(ElementType type, Function&& f) {
  switch (type) {
    case ElementType::kF32:
      return f.template operator()<ElementType::kF32>();
    case ElementType::kF16:
      return f.template operator()<ElementType::kF16>();
    case ElementType::kBF16:
      return f.template operator()<ElementType::kBF16>();
  }
}

void lora_shrink(float* s, int64_t lds, const float* x, int64_t ldx, const int32_t* rows, int num_rows, int k,
                 const LoraModule& m, int j_begin, int j_end) {
  dispatch_type(m.type, [&]<ElementType kType>() __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kShrinkRows <= num_rows; i += kShrinkRows) {
      shrink_rows<kType, kShrinkRows>(s + i * lds, lds, x, ldx, rows + i, k, m, j_begin, j_end);
    }
    for (; i < num_rows; ++i) shrink_rows<kType, 1>(s + i * lds, lds, x, ldx, rows + i, k, m, j_begin, j_end);
  });
}

void lora_expand(float* y, int64_t ldy, const float* base, int64_t ldb, const float* s, int64_t lds,
                 const int32_t* rows, const float* weights, int num_rows, int n, const LoraModule& m,
                 int tile_begin, int tile_end) {
  dispatch_type(m.type, [&]<ElementType kType>() __attribute__((always_inline)) {
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      int64_t i = 0;
      for (; i + kExpandRows <= num_rows; i += kExpandRows) {
        expand_block<kType, kExpandRows>(y, ldy, base, ldb, s + i * lds, lds, rows + i, weights + i, n, m,
                                         tile);
      }
      for (; i < num_rows; ++i) {
        expand_block<kType, 1>(y, ldy, base, ldb, s + i * lds, lds, rows + i, weights + i, n, m, tile);
      }
    }
  });
}

}  // namespace motet::MOTET_ISA
