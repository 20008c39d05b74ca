// y = x · wᵀ over packed tiles with f32 activations.
//
// A block of rows × tiles has its sums in registers, and takes a row's sums through the same operations in the same
// order whatever the block's shape, so that the shape is free to follow the number of rows.
#include "simd.h"
#include "tile.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Rows and tiles of the biggest block: what the registers hold.
#if defined(MOTET_ISA_avx512)
static constexpr int kMaxRowsF = 8, kMaxTilesF = 2;
#else
static constexpr int kMaxRowsF = 4, kMaxTilesF = 1;
#endif
// Weights are asked for (into the second-level cache) before they are needed.
static constexpr int64_t kPrefetchBytes = 3072;

// Calls block(first row, rows) for the rows [0, num_rows) in blocks of at most kMax, their sizes as even as they come.
template <int kMax, typename Block>
MOTET_INLINE void for_row_blocks(int num_rows, Block&& block) {
  const int num_blocks = (num_rows + kMax - 1) / kMax;
  for (int b = 0, row = 0; b < num_blocks; ++b) {
    const int rows = (num_rows - row) / (num_blocks - b);
    block(row, rows);
    row += rows;
  }
}

// It goes through K in chunks: a chunk's weights are brought to f32 once, in a buffer that fits L1, and
// then all rows go over it, their sums waiting in y between chunks.
static constexpr int kChunk = 64;

// w [kTiles][kChunk][16]; y [rows][tiles · 16] += over num_k features.
template <int kRows, int kTiles>
static void block_f(float* y, int64_t ldy, const float* const* w, const float* x, int64_t ldx, int num_k,
                    bool first) {
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
MOTET_INLINE void block_f_of(int rows, float* y, int64_t ldy, const float* const* w, const float* x,
                             int64_t ldx, int num_k, bool first) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return block_f<kRows, kTiles>(y, ldy, w, x, ldx, num_k, first);
    block_f_of<kTiles, kRows - 1>(rows, y, ldy, w, x, ldx, num_k, first);
  }
}

// Features [k_begin, k_begin + num_k) of a tile as f32 [num_k][16]: in `buffer`, or where they lie.
template <WeightFormat kFormat>
MOTET_INLINE const float* chunk_of_tile(float* buffer, const uint8_t* data, int64_t k, int64_t k_begin,
                                        int num_k) {
  constexpr FormatInfo kInfo = format_info(kFormat);
  if constexpr (kFormat == WeightFormat::kF32) {
    return reinterpret_cast<const float*>(data) + k_begin * kTileColumns;
  } else if constexpr (kInfo.group_size == 0) {
    for (int i = 0; i < num_k; ++i) {
      const uint8_t* p = data + (k_begin + i) * kTileColumns * 2;
      prefetch_l2(p + kPrefetchBytes);
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
static void matmul_f_format(float* y, int64_t ldy, const PackedMatrix& w, const float* x, int64_t ldx,
                            int num_rows, int tile_begin, int tile_end) {
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

void matmul_f(float* y, int64_t ldy, const PackedMatrix& w, const float* x, int64_t ldx, int num_rows,
              int tile_begin, int tile_end) {
  dispatch_format(w.format, [&]<WeightFormat kFormat>() __attribute__((always_inline)) {
    matmul_f_format<kFormat>(y, ldy, w, x, ldx, num_rows, tile_begin, tile_end);
  });
}

}  // namespace motet::MOTET_ISA
