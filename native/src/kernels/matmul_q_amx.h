// Blocks of rows on AMX's tile registers, for matmul_q.cc: a tile of 16 rows × 64 bytes of activations times one of 64
// bytes × 16 columns of weights is one instruction. A packed group already is such a tile of weights (weights.h), and a
// row's group one row of such a tile of activations (kernels.h).
//   4 bits: [low parts | middle parts] · [w | 16 w], one product of 64 features
//   8 bits: low parts · w, and middle parts · w, shifted left and added
// Weights with a zero point are signed here, so that nothing has to be taken off the product.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once
#include "simd.h"
#include "tile.h"
#include "tile_registers.h"

namespace motet::MOTET_ISA {
namespace {

// Tile registers: 0 and 1 products (4 bits: of two tiles of weights; 8 bits: of the low and the middle parts), 2
// activations, 3 weights. Not more: registers are renamed from a small pool, and while the core's other thread is busy
// loads take 28 cycles with eight in use and 10 with four (Emerald Rapids).
template <WeightFormat kFormat>
struct Amx {
  static constexpr FormatInfo kInfo = format_info(kFormat);
  static constexpr bool kSigned = kInfo.zero != 0;
  using U = Unpacked<kFormat, kSigned>;
  static constexpr int kRows = 16;
  static constexpr int kBlockBytes = kRows * kTileColumns * 4;
  static constexpr int64_t kProductInts = kBlockBytes / 4 * (kInfo.bits == 8 ? 2 : 1);  // of a group

  static void configure() {
    TileConfig config;
    const auto set = [&](int tile, int num_rows, int num_bytes) {
      config.rows[tile] = static_cast<uint8_t>(num_rows);
      config.bytes_per_row[tile] = static_cast<uint16_t>(num_bytes);
    };
    const int features = kInfo.bits == 4 ? 2 * kActivationGroup : kActivationGroup;
    set(0, kRows, 64);
    set(1, kRows, 64);
    set(2, kRows, features);
    set(3, features / 4, 64);
    load_config(config);
  }

  // Two products of n groups, to memory. 4 bits: of the rows with either tile's weights. 8 bits: of the rows' low and middle
  // parts with one tile's. A product is stored when its register is needed again, since it takes long, and one operand
  // serves both.
  MOTET_INLINE static void multiply_groups(int64_t n, const int8_t* x, int64_t x_stride, const uint8_t* w0, const uint8_t* w1,
                                           int32_t* to0, int32_t* to1) {
    for (int64_t g = 0; g < n; ++g) {
      load_tile<2>(x + g * x_stride);
      load_tile<3>(w0 + g * U::kBytes);
      if (g > 0) store_tile<0>(to0 + (g - 1) * kProductInts);
      multiply<kSigned, 0, 2, 3>();
      if constexpr (kInfo.bits == 4) load_tile<3>(w1 + g * U::kBytes);
      else load_tile<2>(x + g * x_stride + kActivationGroup);
      if (g > 0) store_tile<1>(to1 + (g - 1) * kProductInts);
      multiply<kSigned, 1, 2, 3>();
    }
    store_tile<0>(to0 + (n - 1) * kProductInts);
    store_tile<1>(to1 + (n - 1) * kProductInts);
  }

  // The sum of one row with one group more.
  MOTET_INLINE static f32x16 add_group(f32x16 sum, const int32_t* products, f32x16 scale, f32x16 min, float x_scale,
                                       float x_offset) {
    i32x16 dot = load_i32(products);
    if constexpr (kInfo.bits == 8) dot = dot + shift_left<kPeakShift>(load_i32(products + kBlockBytes / 4));
    sum = fma(to_f32(dot), scale * f32_set1(x_scale), sum);
    if constexpr (kInfo.has_min) sum = fma(min, f32_set1(x_offset), sum);
    return sum;
  }

  // A peak's high part is rare: it is added to the products in place.
  static void add_highs(int32_t* products, const QuantizedRows& x, int64_t at, int rows, const uint8_t* w) {
    for (int r = 0; r < rows; ++r) {
      if (x.peak_highs[at + r] == 0) continue;
      const u8x64 weights = load_bytes(w + 64 * x.peak_chunks[at + r]);
      const u8x64 high = bytes_word(&x.peak_highs[at + r]);
      i32x16 product;
      if constexpr (kSigned) {
        // The integer product wants unsigned weights: what the zero point adds is taken off again.
        product = dot4(i32_zero(), add_bytes(weights, bytes_all(kInfo.zero)), high) -
                  i32_set1(kInfo.zero * sum_of_bytes(x.peak_highs[at + r]));
      } else {
        product = dot4(i32_zero(), weights, high);
      }
      int32_t* const to = products + r * kTileColumns;
      store_i32(to, load_i32(to) + shift_left<kWideShift>(product));
    }
  }

  // Adds the groups to the sums of one block of rows: first all products, then all sums, which is faster than one group's sums
  // between the products of others. Of fewer than kNum rows the rest is computed of what lies behind them, and dropped:
  // registers of another size would have to be configured, which takes longer.
  template <int kNum>
  static void block(const Many& m, int64_t row, int rows, const int32_t* wide) {
    constexpr int64_t kChunkGroups = chunk_features(kFormat) / kActivationGroup;
    alignas(64) int32_t products[tiles_of(kFormat)][kChunkGroups * kProductInts];
    const QuantizedRows& x = *m.x;
    const int64_t first = x.at(row, m.g_begin), n = m.num_groups;
    const int8_t* const q = x.q + first * kQBytes;
    const int64_t q_stride = rows * kQBytes;
    // Of a single tile the products are there twice.
    if constexpr (kInfo.bits == 4) multiply_groups(n, q, q_stride, m.unpacked[0], m.unpacked[1], products[0], products[1]);
    for (int t = 0; t < m.num_tiles; ++t) {
      const uint8_t* const w = m.unpacked[t];
      if constexpr (kInfo.bits == 8) multiply_groups(n, q, q_stride, w, w, products[t], products[t] + kBlockBytes / 4);
      for (int64_t g = 0; g < n; ++g)
        if (__builtin_expect(wide[g] != 0, 0)) add_highs(products[t] + g * kProductInts, x, first + g * rows, rows, w + g * U::kBytes);
      add_groups<kNum>(m, t, row, rows, products[t]);
    }
  }

  // The sums of kNum rows in the columns of tile t.
  template <int kNum>
  MOTET_INLINE static void add_groups(const Many& m, int t, int64_t row, int rows, const int32_t* products) {
    float* const sums = m.sums + (row - m.first_row) * sum_stride(kFormat) + t * kTileColumns;
    float* const out = m.is_last ? m.y + row * m.ldy + t * kTileColumns : sums;
    const int64_t out_stride = m.is_last ? m.ldy : sum_stride(kFormat);
    const int64_t first = m.x->at(row, m.g_begin);
    f32x16 acc[kNum];
#pragma GCC unroll 16
    for (int r = 0; r < kNum; ++r) acc[r] = m.g_begin == 0 ? f32_zero() : load(sums + r * sum_stride(kFormat));
    for (int64_t g = 0; g < m.num_groups; ++g) {
      const uint8_t* const w = m.unpacked[t] + g * U::kBytes;
      const float* const scales = m.x->scale + first + g * rows;
      const float* const offsets = m.x->offsets + first + g * rows;
      const f32x16 scale = load(reinterpret_cast<const float*>(w + U::kScaleAt));
      const f32x16 min = kInfo.has_min ? load(reinterpret_cast<const float*>(w + U::kMinAt)) : f32_zero();
#pragma GCC unroll 16
      for (int r = 0; r < kNum; ++r)
        acc[r] = add_group(acc[r], products + g * kProductInts + r * kTileColumns, scale, min, scales[r], offsets[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kNum; ++r)
      if (r < rows) store(out + r * out_stride, acc[r]);
  }

  static void begin() {
    if constexpr (uses_tile_registers(kFormat)) configure();
  }
  static void end() {
    if constexpr (uses_tile_registers(kFormat)) release_tiles();
  }

  // One block of rows over a chunk.
  static void rows(const Many& m, int64_t row, int rows) {
    int32_t wide[chunk_features(kFormat) / kActivationGroup] = {};
    const int32_t* highs = m.x->peak_highs + m.x->at(row, m.g_begin);
    // Of fewer than 16 rows the others are of the next group: at worst it is looked at for nothing.
    for (int64_t g = 0; g < m.num_groups; ++g) wide[g] = bits(load_i32(highs + g * rows) == i32_zero()) != 0xffff;
    if (rows > 8) block<16>(m, row, rows, wide);
    else block<8>(m, row, rows, wide);
  }

 private:
  MOTET_INLINE static u8x64 add_bytes(u8x64 a, u8x64 b) {
    return subtract_bytes(a, subtract_bytes(bytes_all(0), b));
  }
  MOTET_INLINE static int32_t sum_of_bytes(int32_t word) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(static_cast<uint32_t>(word) >> (8 * i));
    return sum;
  }
};

}  // namespace
}  // namespace motet::MOTET_ISA
