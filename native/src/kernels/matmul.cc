// y = x · wᵀ over packed tiles: with int8 activations (matmul_q) and with f32 ones (matmul_f).
//
// Both compute a block of rows × tiles with its sums in registers, and take a row's sums through the same
// operations in the same order whatever the block's shape, so that the shape is free to follow the number of
// rows.
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
// Weights are asked for (into the second-level cache) before they are needed: while one pair of tiles is
// worked on, the next pair where two fit beside each other, else a little further on in the same tiles.
static constexpr int64_t kPrefetchPairBytes = 128 << 10;
static constexpr int64_t kPrefetchBytes = 3072;

// Four input features of one row, the same in every column.
template <WeightFormat kFormat>
MOTET_INLINE i32x16 dot4_weights(i32x16 acc, u8x64 w, u8x64 x) {
  return Tile<kFormat>::kInfo.bits == 4 ? dot4_u7(acc, w, x) : dot4(acc, w, x);
}

// y [kRows][kTiles · 16] for the rows of x from `row` on. near and next: what to ask for, in bytes ahead; 0:
// nothing.
template <WeightFormat kFormat, int kRows, int kTiles>
static void block_q(float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x, int64_t row,
                    int64_t k, int64_t near, int64_t next) {
  using T = Tile<kFormat>;
  constexpr FormatInfo kInfo = T::kInfo;
  constexpr int kGroupsPerScale = kActivationGroup / kInfo.group_size;
  const T tile[2] = {T(tiles, k), T(tiles + (kTiles - 1) * T::bytes(k), k)};
  const int8_t* q = x.q + row * k;
  const float* x_scale = x.scale + row * (k / 32);
  const int32_t* sums = x.sums + row * (k / 16);
  const int32_t* peak_words = x.peak_words + row * (k / 32);
  const int32_t* peak_chunks = x.peak_chunks + row * (k / 32);
  const int64_t groups = k / kInfo.group_size;
  // 4-bit weights of the group at hand, brought to bytes: a row's peak may be in any of its chunks.
  u8x64 unpacked[kTiles][kInfo.bits == 4 ? 8 : 1];

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
      for (int t = 0; t < kTiles; ++t)
        dot[r][t] = kInfo.zero == 0 ? i32_zero() : i32_set1(-kInfo.zero * sum[r]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < T::kGroupBytes / 64; ++c) {
      u8x64 low[kTiles], high[kTiles];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        const uint8_t* p = tile[t].group(g) + 64 * c;
        prefetch_l2(p + near);
        if (next != 0) prefetch_l2(p + next);
        const u8x64 bytes = load_bytes(p);
        low[t] = kInfo.bits == 4 ? low_nibbles(bytes) : bytes;
        if constexpr (kInfo.bits == 4) {
          high[t] = high_nibbles(bytes);
          unpacked[t][c] = low[t];
          unpacked[t][c + 4] = high[t];
        }
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
    // The high part of each row's peak.
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * (k / 32) + g / kGroupsPerScale;
      int32_t word = peak_words[at];
      int32_t chunk = peak_chunks[at];
      if constexpr (kGroupsPerScale == 2) {
        chunk -= 4 * static_cast<int32_t>(g % 2);
        word = chunk >= 0 && chunk < 4 ? word : 0;
        chunk &= 3;
      }
      const u8x64 x_peak = bytes_word(&word);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        const u8x64 w = kInfo.bits == 4 ? unpacked[t][kInfo.bits == 4 ? chunk : 0]
                                        : load_bytes(tile[t].group(g) + 64 * chunk);
        dot[r][t] = dot[r][t] + shift_left<kPeakShift>(dot4_weights<kFormat>(i32_zero(), w, x_peak));
      }
    }
    f32x16 scale[kTiles], min[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      if (next != 0) prefetch_l2(tile[t].scales + g * T::kScaleStride + next);
      scale[t] = tile[t].scale(g);
      min[t] = tile[t].min(g);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float xs = x_scale[r * (k / 32) + g / kGroupsPerScale];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        acc[r][t] = fma(to_f32(dot[r][t]), scale[t] * f32_set1(xs), acc[r][t]);
        if constexpr (kInfo.has_min)
          acc[r][t] = fma(min[t], f32_set1(xs * static_cast<float>(sum[r])), acc[r][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) store(y + r * ldy + t * kTileColumns, acc[r][t]);
  }
}

// Calls block(first row, rows) for the rows [0, num_rows) in blocks of at most kMax, their sizes as even as
// they come.
template <int kMax, typename Block>
MOTET_INLINE void for_row_blocks(int num_rows, Block&& block) {
  const int num_blocks = (num_rows + kMax - 1) / kMax;
  for (int b = 0, row = 0; b < num_blocks; ++b) {
    const int rows = (num_rows - row) / (num_blocks - b);
    block(row, rows);
    row += rows;
  }
}

// block_q with the number of rows as a template argument.
template <WeightFormat kFormat, int kTiles, int kRows>
MOTET_INLINE void block_q_of(int rows, float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x,
                             int64_t row, int64_t k, int64_t near, int64_t next) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return block_q<kFormat, kRows, kTiles>(y, ldy, tiles, x, row, k, near, next);
    block_q_of<kFormat, kTiles, kRows - 1>(rows, y, ldy, tiles, x, row, k, near, next);
  }
}

template <WeightFormat kFormat>
static void matmul_q_format(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x,
                            int num_rows, int tile_begin, int tile_end) {
  const int64_t k = w.in_features;
  const int64_t stride = Tile<kFormat>::bytes(k);
  for (int64_t t = tile_begin; t < tile_end;) {
    const int64_t tiles = tile_end - t < kMaxTiles ? 1 : kMaxTiles;
    const bool fits = tiles * stride <= kPrefetchPairBytes;
    const bool has_next = fits && t + 2 * tiles <= tile_end;
    for_row_blocks<kMaxRows>(num_rows, [&](int64_t row, int rows) __attribute__((always_inline)) {
      float* out = y + row * ldy + t * kTileColumns;
      const uint8_t* from = w.data + t * stride;
      const int64_t near = row == 0 && (t == tile_begin || !fits) ? kPrefetchBytes : 0;
      const int64_t next = row == 0 && has_next ? tiles * stride : 0;
      if (tiles == kMaxTiles) {
        block_q_of<kFormat, kMaxTiles, kMaxRows>(rows, out, ldy, from, x, row, k, near, next);
      } else {
        block_q_of<kFormat, 1, kMaxRows>(rows, out, ldy, from, x, row, k, near, next);
      }
    });
    t += tiles;
  }
}

void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int num_rows,
              int tile_begin, int tile_end) {
  dispatch_format(w.format, [&]<WeightFormat kFormat>() __attribute__((always_inline)) {
    if constexpr (format_info(kFormat).group_size != 0) {
      matmul_q_format<kFormat>(y, ldy, w, x, num_rows, tile_begin, tile_end);
    }
  });
}

// matmul_f goes through K in chunks: a chunk's weights are brought to f32 once, in a buffer that fits L1, and
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
