// y = x · wᵀ over packed tiles: with int8 activations (matmul_q) and with f32 ones (matmul_f).
//
// Both compute a block of rows × tiles with its sums in registers, and take a row's sums through the same operations
// in the same order whatever the block's shape, so that the shape is free to follow the number of rows.
#include "simd.h"
#include "tile.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Rows and tiles of the biggest block: what the registers hold.
#if defined(MOTET_ISA_avx512)
static constexpr int kMaxRows = 6, kMaxTiles = 2;
static constexpr int kMaxRowsF = 8, kMaxTilesF = 2;
#else
static constexpr int kMaxRows = 4, kMaxTiles = 1;
static constexpr int kMaxRowsF = 4, kMaxTilesF = 1;
#endif
#ifndef PFD
#define PFD 2048
#endif
#ifndef T1
#define T1 2
#endif
static constexpr int kPrefetchBytes = PFD;  // ahead in a tile's quants

// Four input features of one row, the same in every column.
template <WeightFormat kFormat>
MOTET_INLINE i32x16 dot4_weights(i32x16 acc, u8x64 w, u8x64 x) {
  return Tile<kFormat>::kInfo.bits == 4 ? dot4_u7(acc, w, x) : dot4(acc, w, x);
}

template <WeightFormat kFormat, int kRows, int kTiles>
static void block_q(float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x, int64_t row, int64_t k, int64_t prefetch_bytes) {
  using T = Tile<kFormat>;
  constexpr FormatInfo kInfo = T::kInfo;
  constexpr int kGroupsPerScale = kActivationGroup / kInfo.group_size;
  const T tile[2] = {T(tiles, k), T(tiles + (kTiles - 1) * T::bytes(k), k)};
  const int8_t* q = x.q + row * k;
  const float* x_scale = x.scale + row * (k / 32);
  const int32_t* sums = x.sums + row * (k / 16);
  const int64_t groups = k / kInfo.group_size;

  f32x16 acc[kRows][kTiles];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) acc[r][t] = f32_zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum[kRows];
    i32x16 dot[kRows][kTiles];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const int32_t* s = sums + r * (k / 16) + g * (2 / kGroupsPerScale);
      sum[r] = kInfo.group_size == 32 ? s[0] + s[1] : s[0];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) dot[r][t] = kInfo.zero == 0 ? i32_zero() : i32_set1(-kInfo.zero * sum[r]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < T::kGroupBytes / 64; ++c) {
      u8x64 low[kTiles], high[kTiles];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        const uint8_t* p = tile[t].group(g) + 64 * c;
        if (prefetch_bytes) prefetch(p + prefetch_bytes);
        const u8x64 bytes = load_bytes(p);
        low[t] = kInfo.bits == 4 ? low_nibbles(bytes) : bytes;
        if constexpr (kInfo.bits == 4) high[t] = high_nibbles(bytes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int8_t* from = q + r * k + g * kInfo.group_size + 4 * c;
        const u8x64 x_low = bytes_word(from);
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; ++t) dot[r][t] = dot4_weights<kFormat>(dot[r][t], low[t], x_low);
        if constexpr (kInfo.bits == 4) {
          const u8x64 x_high = bytes_word(from + 16);
#pragma GCC unroll 2
          for (int t = 0; t < kTiles; ++t) dot[r][t] = dot4_weights<kFormat>(dot[r][t], high[t], x_high);
        }
      }
    }
    f32x16 scale[kTiles], min[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      scale[t] = tile[t].scale(g);
      min[t] = tile[t].min(g);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float xs = x_scale[r * (k / 32) + g / kGroupsPerScale];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        acc[r][t] = fma(to_f32(dot[r][t]), scale[t] * f32_set1(xs), acc[r][t]);
        if constexpr (kInfo.has_min) acc[r][t] = fma(min[t], f32_set1(xs * static_cast<float>(sum[r])), acc[r][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) store(y + (row + r) * ldy + t * kTileColumns, acc[r][t]);
  }
}

// Calls block(integral constant rows) for the rows [0, num_rows) in blocks of at most kMax, sizes as even as they come.
template <int kMax, typename Block>
MOTET_INLINE void for_row_blocks(int num_rows, Block&& block) {
  const int num_blocks = (num_rows + kMax - 1) / kMax;
  for (int b = 0, row = 0; b < num_blocks; ++b) {
    const int rows = (num_rows - row) / (num_blocks - b);
    block(row, rows);
    row += rows;
  }
}

template <WeightFormat kFormat, int kTiles, int kRows>
MOTET_INLINE void block_q_of(int rows, float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x, int64_t row, int64_t k, int64_t prefetch_bytes) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return block_q<kFormat, kRows, kTiles>(y, ldy, tiles, x, row, k, prefetch_bytes);
    block_q_of<kFormat, kTiles, kRows - 1>(rows, y, ldy, tiles, x, row, k, prefetch_bytes);
  }
}

template <WeightFormat kFormat>
static void matmul_q_format(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int num_rows, int tile_begin, int tile_end) {
  const int64_t k = w.in_features;
  const int64_t stride = Tile<kFormat>::bytes(k);
  for (int64_t t = tile_begin; t < tile_end;) {
    const int64_t tiles = tile_end - t < kMaxTiles || (num_rows == 1 && T1 == 1) ? 1 : kMaxTiles;
    for_row_blocks<kMaxRows>(num_rows, [&](int64_t row, int rows) __attribute__((always_inline)) {
      float* out = y + t * kTileColumns;
      const int64_t ahead = row == 0 ? kPrefetchBytes : tiles * stride;
      if (tiles == kMaxTiles) {
        block_q_of<kFormat, kMaxTiles, kMaxRows>(rows, out, ldy, w.data + t * stride, x, row, k, ahead);
      } else {
        block_q_of<kFormat, 1, kMaxRows>(rows, out, ldy, w.data + t * stride, x, row, k, ahead);
      }
    });
    t += tiles;
  }
}

void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int num_rows, int tile_begin, int tile_end) {
  dispatch_format(w.format, [&]<WeightFormat kFormat>() __attribute__((always_inline)) {
    if constexpr (format_info(kFormat).group_size != 0) matmul_q_format<kFormat>(y, ldy, w, x, num_rows, tile_begin, tile_end);
  });
}

// matmul_f goes through K in chunks: a chunk's weights are brought to f32 once, in a buffer that fits L1, and then all
// rows go over it, their sums waiting in y between chunks.
static constexpr int kChunk = 64;

// w [kTiles][kChunk][16]; y [rows][tiles · 16] += over num_k features.
template <int kRows, int kTiles>
static void block_f(float* y, int64_t ldy, const float* const* w, const float* x, int64_t ldx, int num_k, bool first) {
  f32x16 acc[kRows][kTiles];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) acc[r][t] = first ? f32_zero() : load(y + r * ldy + t * kTileColumns);
  }
  for (int i = 0; i < num_k; ++i) {
    f32x16 weights[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) weights[t] = load(w[t] + i * kTileColumns);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const f32x16 value = f32_set1(x[r * ldx + i]);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) acc[r][t] = fma(weights[t], value, acc[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) store(y + r * ldy + t * kTileColumns, acc[r][t]);
  }
}

template <int kTiles, int kRows>
MOTET_INLINE void block_f_of(int rows, float* y, int64_t ldy, const float* const* w, const float* x, int64_t ldx, int num_k, bool first) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return block_f<kRows, kTiles>(y, ldy, w, x, ldx, num_k, first);
    block_f_of<kTiles, kRows - 1>(rows, y, ldy, w, x, ldx, num_k, first);
  }
}

// Features [k_begin, k_begin + num_k) of a tile as f32 [num_k][16]: in `buffer`, or where they lie.
template <WeightFormat kFormat>
MOTET_INLINE const float* chunk_of_tile(float* buffer, const uint8_t* data, int64_t k, int64_t k_begin, int num_k) {
  constexpr FormatInfo kInfo = format_info(kFormat);
  if constexpr (kFormat == WeightFormat::kF32) {
    return reinterpret_cast<const float*>(data) + k_begin * kTileColumns;
  } else if constexpr (kInfo.group_size == 0) {
    for (int i = 0; i < num_k; ++i) {
      const uint8_t* p = data + (k_begin + i) * kTileColumns * 2;
      prefetch(p + kPrefetchBytes);
      store(buffer + i * kTileColumns, kFormat == WeightFormat::kF16 ? load_f16(p) : load_bf16(p));
    }
  } else {
    const Tile<kFormat> tile(data, k);
    for (int i = 0; i < num_k; i += kInfo.group_size) {
      dequantize_group<kFormat>(buffer + i * kTileColumns, tile, (k_begin + i) / kInfo.group_size);
    }
  }
  return buffer;
}

template <WeightFormat kFormat>
MOTET_INLINE int64_t tile_stride(int64_t k) {
  constexpr FormatInfo kInfo = format_info(kFormat);
  if constexpr (kInfo.group_size != 0) return Tile<kFormat>::bytes(k);
  return k * kTileColumns * (kInfo.bits / 8);
}

template <WeightFormat kFormat>
static void matmul_f_format(float* y, int64_t ldy, const PackedMatrix& w, const float* x, int64_t ldx, int num_rows, int tile_begin, int tile_end) {
  alignas(64) float buffer[kMaxTilesF][kChunk * kTileColumns];
  const int64_t k = w.in_features;
  const int64_t stride = tile_stride<kFormat>(k);
  for (int64_t t = tile_begin; t < tile_end;) {
    const int64_t tiles = tile_end - t < kMaxTilesF ? tile_end - t : kMaxTilesF;
    for (int64_t k_begin = 0; k_begin < k; k_begin += kChunk) {
      const int num_k = k - k_begin < kChunk ? static_cast<int>(k - k_begin) : kChunk;
      const float* chunk[kMaxTilesF];
      for (int64_t i = 0; i < tiles; ++i) {
        chunk[i] = chunk_of_tile<kFormat>(buffer[i], w.data + (t + i) * stride, k, k_begin, num_k);
      }
      for_row_blocks<kMaxRowsF>(num_rows, [&](int64_t row, int rows) __attribute__((always_inline)) {
        float* out = y + row * ldy + t * kTileColumns;
        const float* in = x + row * ldx + k_begin;
        if (tiles == kMaxTilesF) {
          block_f_of<kMaxTilesF, kMaxRowsF>(rows, out, ldy, chunk, in, ldx, num_k, k_begin == 0);
        } else {
          block_f_of<1, kMaxRowsF>(rows, out, ldy, chunk, in, ldx, num_k, k_begin == 0);
        }
      });
    }
    t += tiles;
  }
}

void matmul_f(float* y, int64_t ldy, const PackedMatrix& w, const float* x, int64_t ldx, int num_rows, int tile_begin, int tile_end) {
  dispatch_format(w.format, [&]<WeightFormat kFormat>() __attribute__((always_inline)) {
    matmul_f_format<kFormat>(y, ldy, w, x, ldx, num_rows, tile_begin, tile_end);
  });
}

}  // namespace motet::MOTET_ISA
