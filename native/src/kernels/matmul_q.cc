// y = x · wᵀ over packed tiles with int8 activations (kernels.h: QuantizedRows).
//
// Few rows are bound by reading the weights: they go over the packed bytes as these come from memory, all rows at once, or
// some of them and then the others.
// Many rows are bound by arithmetic: some tiles are unpacked a chunk of K at a time into a buffer that fits the first
// level of cache, and then all rows go over it, their sums waiting in y between chunks. Where the processor has integer
// tile registers (AMX), blocks of sixteen rows use those.
//
// Integer products are exact and every row takes its sums through the same operations in the same order, so that the
// ways give the same bits, and the choice is free to follow the number of rows.
#include "simd.h"
#include "tile.h"
#include "variant.h"

namespace motet::MOTET_ISA {
namespace {

// Few rows: rows and tiles of the biggest block that the registers hold.
#if defined(MOTET_ISA_avx512)
constexpr int kMaxRows = 6, kTilesOfFew = 2;
#elif defined(MOTET_ISA_avx2)
constexpr int kMaxRows = 4, kTilesOfFew = 1;
#else
constexpr int kMaxRows = 2, kTilesOfFew = 1;
#endif
// Up to so many rows. On from there unpacking the weights first is faster. They are of one block (kernels.h).
#if defined(MOTET_ISA_avx512)
constexpr int kFewRows = 16;
#else
constexpr int kFewRows = 2 * kMaxRows;
#endif
static_assert(kFewRows <= kRowBlock);
constexpr int blocks_of_few(int rows) { return (rows + kMaxRows - 1) / kMaxRows; }
// Many rows: tiles that go together, and how many rows of so many are a block. What is said of a row once serves all its tiles, so
// that three by four are faster than two by six. The tile registers take two.
#if defined(MOTET_ISA_avx512)
constexpr int kTiles = 3;
#else
constexpr int kTiles = 1;
#endif
constexpr bool uses_tile_registers([[maybe_unused]] WeightFormat format) {
#if defined(MOTET_ISA_amx)
  return format_info(format).group_size == kActivationGroup;
#else
  return false;
#endif
}
constexpr int tiles_of(WeightFormat format) { return uses_tile_registers(format) ? 2 : kTiles; }
constexpr int rows_of_turn(int tiles) { return tiles > 2 ? 4 : kMaxRows; }
// Up to three rows wait for memory alone: a thread reads one stream of it, tile after tile, and asks for what lies so far ahead. More
// rows take longer, in several blocks that read the same tiles: they ask for the next tiles meanwhile, evenly, so that memory is at
// work all the time.
constexpr int64_t kPrefetchBytes = 6144;
constexpr bool asks_for_next(int rows) { return rows > 3; }

// The rows of one block (kernels.h) from one of them on.
struct RowsOfBlock {
  const QuantizedRows& x;
  int64_t first;   // place of group 0 of the first of these rows
  int64_t height;  // places from group to group

  MOTET_INLINE RowsOfBlock(const QuantizedRows& x, int64_t row)
      : x(x), first(x.at(row, 0)), height(x.block_rows(row)) {}
};

// What a row says of one group of weights.
template <WeightFormat kFormat>
struct GroupOfRow {
  static constexpr int kGroupsPerScale = kActivationGroup / format_info(kFormat).group_size;

  int64_t at;
  const int8_t* low;      // the low parts of its integers
  const int32_t* middle;  // four bytes: the middle part of the peak at its place, or zeros
  const int32_t* wide;    // the same of the high part
  int chunk;              // which vector of weights the four belong to
  bool is_first;          // the first half of a group of activations

  MOTET_INLINE GroupOfRow(const RowsOfBlock& rows, int64_t r, int64_t g) {
    static constexpr int32_t kNone = 0;
    const QuantizedRows& x = rows.x;
    at = rows.first + g / kGroupsPerScale * rows.height + r;
    low = x.q + at * kQBytes;
    chunk = x.peak_chunks[at];
    middle = x.peak_middles + at;
    wide = x.peak_highs + at;
    is_first = g % kGroupsPerScale == 0;
    if constexpr (kGroupsPerScale > 1) {
      if (!is_first) low += kActivationGroup / 2;
      const bool is_here = (chunk < 4) == is_first;
      chunk &= 3;
      if (!is_here) middle = wide = &kNone;
    }
  }

  // What the weights' zero point adds to the dot product of this row.
  MOTET_INLINE i32x16 zero_sum(const QuantizedRows& x) const {
    constexpr int kZero = format_info(kFormat).zero;
    static_assert(kZero == 0 || kZero == 8 || kZero == 128);
    if constexpr (kZero == 0) return i32_zero();
    i32x16 sum = i32_set1(kGroupsPerScale == 1 ? x.sums8[at] : is_first ? x.first_sums8[at] : x.sums8[at] - x.first_sums8[at]);
    return kZero == 8 ? sum : shift_left<4>(sum);
  }
};

// Whether any of kRows rows of a block has a peak with a high part in group g.
template <WeightFormat kFormat, int kRows>
MOTET_INLINE bool any_wide(const RowsOfBlock& rows, int64_t g) {
  const int32_t* const highs = rows.x.peak_highs + rows.first + g / GroupOfRow<kFormat>::kGroupsPerScale * rows.height;
  if constexpr (kRows == 1) return highs[0] != 0;
  constexpr uint32_t kAll = (1u << kRows) - 1;
  return (bits(load_i32(highs) == i32_zero()) & kAll) != kAll;
}

// Asks for pieces of memory in turns of so many lines.
class Asker {
 public:
  // In the first num_turns turns all is asked for.
  Asker(const Ahead* pieces, int num_pieces, int64_t num_turns) : piece_(pieces), end_(pieces + num_pieces) {
    int64_t lines = 0;
    for (const Ahead* p = piece_; p < end_; ++p) lines += (p->end - p->at + 63) / 64;
    lines_ = (lines + num_turns - 1) / num_turns;
    if (piece_ < end_) at_ = piece_->at;
  }

  MOTET_INLINE void turn() {
    if (piece_ < end_) ask();
  }

 private:
  void ask() {
    for (int64_t i = 0; i < lines_; ++i) {
      prefetch_l2(at_);
      at_ += 64;
      if (at_ < piece_->end) continue;
      if (++piece_ == end_) return;
      at_ = piece_->at;
    }
  }

  const Ahead* piece_;
  const Ahead* end_;
  const uint8_t* at_ = nullptr;
  int64_t lines_;
};

// Four input features of one row, the same in every column.
template <WeightFormat kFormat>
MOTET_INLINE i32x16 dot4_weights(i32x16 acc, u8x64 w, u8x64 x) {
  return format_info(kFormat).bits == 4 ? dot4_u7(acc, w, x) : dot4(acc, w, x);
}

// y [kRows][kNum · 16] for the rows of x from `row` on, straight from the packed bytes of kNum tiles. They are one of kParts blocks of
// rows that go over these.
template <WeightFormat kFormat, int kRows, int kNum, int kPart, int kParts>
void block_few(float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x, int64_t row, Asker& asker) {
  using T = Tile<kFormat>;
  constexpr FormatInfo kInfo = T::kInfo;
  const int64_t stride = T::bytes(x.k);
  const uint8_t* const next = tiles + kNum * stride;
  const T first(tiles, x.k);
  const RowsOfBlock rows(x, row);
  const int64_t groups = x.k / kInfo.group_size;

  f32x16 acc[kRows][kNum];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kNum; ++t) acc[r][t] = f32_zero();
  }
  // Where a peak meets its weights, in any of the vectors: several rows keep them unpacked, one or two unpack them again.
  constexpr bool kKeeps = kRows > 2 && kInfo.bits == 4;
  u8x64 unpacked[kNum][kKeeps ? 8 : 1];
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* const weights = first.group(g);
    asker.turn();
    if constexpr (kParts > 1 || asks_for_next(kRows)) {
      T::template ask_part<kPart, kParts, kNum>(next, g);
    } else {
      static_assert(kNum == 1);
      first.ask_ahead(g, kPrefetchBytes);
    }
    i32x16 dot[kRows][kNum];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const i32x16 start = GroupOfRow<kFormat>(rows, r, g).zero_sum(x);
#pragma GCC unroll 8
      for (int t = 0; t < kNum; ++t) dot[r][t] = start;
    }
#pragma GCC unroll 8
    for (int c = 0; c < T::kGroupBytes / 64; ++c) {
      u8x64 low[kNum], high[kNum];
#pragma GCC unroll 8
      for (int t = 0; t < kNum; ++t) {
        const u8x64 bytes = load_bytes(weights + t * stride + 64 * c);
        low[t] = kInfo.bits == 4 ? low_nibbles(bytes) : bytes;
        if constexpr (kInfo.bits == 4) high[t] = high_nibbles(bytes);
        if constexpr (kKeeps) {
          unpacked[t][c] = low[t];
          unpacked[t][c + 4] = high[t];
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int8_t* from = GroupOfRow<kFormat>(rows, r, g).low + 4 * c;
        const u8x64 x_low = bytes_word(from);
#pragma GCC unroll 8
        for (int t = 0; t < kNum; ++t) dot[r][t] = dot4_weights<kFormat>(dot[r][t], low[t], x_low);
        if constexpr (kInfo.bits == 4) {
          const u8x64 x_high = bytes_word(from + 16);
#pragma GCC unroll 8
          for (int t = 0; t < kNum; ++t) dot[r][t] = dot4_weights<kFormat>(dot[r][t], high[t], x_high);
        }
      }
    }
    const auto weights_at = [&](int t, int chunk) __attribute__((always_inline)) {
      if constexpr (kKeeps) return unpacked[t][chunk];
      else if constexpr (kInfo.bits == 4) return nibbles(load_bytes(weights + t * stride + 64 * (chunk & 3)), chunk >= 4);
      return load_bytes(weights + t * stride + 64 * chunk);
    };
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const GroupOfRow<kFormat> group(rows, r, g);
      const u8x64 x_peak = bytes_word(group.middle);
#pragma GCC unroll 8
      for (int t = 0; t < kNum; ++t) {
        const i32x16 product = dot4_weights<kFormat>(i32_zero(), weights_at(t, group.chunk), x_peak);
        dot[r][t] = dot[r][t] + shift_left<kPeakShift>(product);
      }
    }
    if (__builtin_expect(any_wide<kFormat, kRows>(rows, g), 0)) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const GroupOfRow<kFormat> group(rows, r, g);
        const u8x64 x_wide = bytes_word(group.wide);
#pragma GCC unroll 8
        for (int t = 0; t < kNum; ++t) {
          const i32x16 product = dot4_weights<kFormat>(i32_zero(), weights_at(t, group.chunk), x_wide);
          dot[r][t] = dot[r][t] + shift_left<kWideShift>(product);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kNum; ++t) {
      const T tile(tiles + t * stride, x.k);
      const f32x16 scale = tile.scale(g), min = tile.min(g);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = GroupOfRow<kFormat>(rows, r, g).at;
        acc[r][t] = fma(to_f32(dot[r][t]), scale * f32_set1(x.scale[at]), acc[r][t]);
        if constexpr (kInfo.has_min) acc[r][t] = fma(min, f32_set1(x.offsets[at]), acc[r][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kNum; ++t) store(y + r * ldy + t * kTileColumns, acc[r][t]);
  }
}

// All of kRows rows, from row kAt on, in kParts blocks of like size, of which kPart are done: the later ones find the tiles in the
// cache.
template <WeightFormat kFormat, int kRows, int kNum, int kAt = 0, int kPart = 0, int kParts = blocks_of_few(kRows)>
MOTET_INLINE void blocks_few(float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x, Asker& asker) {
  constexpr int kHere = (kRows + kParts - kPart - 1) / (kParts - kPart);
  block_few<kFormat, kHere, kNum, kPart, kParts>(y + kAt * ldy, ldy, tiles, x, kAt, asker);
  if constexpr (kRows > kHere) blocks_few<kFormat, kRows - kHere, kNum, kAt + kHere, kPart + 1, kParts>(y, ldy, tiles, x, asker);
}

// The tiles [begin, end) for kRows rows, kNum at a time. What is left over goes in fewer.
template <WeightFormat kFormat, int kRows, int kNum>
void few_tiles(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Asker& asker) {
  int64_t t = begin;
  for (; t + kNum <= end; t += kNum) blocks_few<kFormat, kRows, kNum>(y + t * kTileColumns, ldy, w.data + t * Tile<kFormat>::bytes(x.k), x, asker);
  if constexpr (kNum > 1) {
    if (t < end) few_tiles<kFormat, kRows, kNum / 2>(y, ldy, w, x, t, end, asker);
  }
}

// few_tiles with the number of rows as a template argument.
template <WeightFormat kFormat, int kRows>
MOTET_INLINE void few_rows(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int64_t begin, int64_t end, const Ahead* ahead,
                           int num_ahead) {
  if constexpr (kRows > 0) {
    constexpr int kNum = asks_for_next(kRows) ? kTilesOfFew : 1;
    if (x.num_rows != kRows) return few_rows<kFormat, kRows - 1>(y, ldy, w, x, begin, end, ahead, num_ahead);
    const int64_t walks = (end - begin + kNum - 1) / kNum * blocks_of_few(kRows);
    Asker asker(ahead, num_ahead, walks * (x.k / format_info(kFormat).group_size));
    few_tiles<kFormat, kRows, kNum>(y, ldy, w, x, begin, end, asker);
  }
}

// --- Many rows ---

// One tile's weights of some groups, unpacked. Per group: its weights as bytes, a vector per four features; 4-bit ones
// then once more, times 16, for the rows' peaks; the scales and mins in f32.
template <WeightFormat kFormat, bool kSigned>
struct Unpacked {
  using T = Tile<kFormat>;
  static constexpr FormatInfo kInfo = T::kInfo;
  static constexpr int kVectors = kInfo.group_size / 4;
  static constexpr bool kHasTimes16 = kInfo.bits == 4;
  static constexpr int kScaleAt = 64 * kVectors * (kHasTimes16 ? 2 : 1);
  static constexpr int kMinAt = kScaleAt + 64;
  static constexpr int kBytes = kMinAt + (kInfo.has_min ? 64 : 0);

  // Asks on the way for as many groups of the tile `next`, from next_begin on.
  static void fill(uint8_t* out, const T& tile, int64_t g_begin, int64_t num_groups, const T& next, int64_t next_begin) {
    const u8x64 zero = bytes_all(kSigned ? kInfo.zero : 0);
    for (int64_t g = g_begin, next_g = next_begin; g < g_begin + num_groups; ++g, ++next_g, out += kBytes) {
      const auto put = [&](int c, u8x64 w) __attribute__((always_inline)) {
        w = subtract_bytes(w, zero);
        store_bytes(out + 64 * c, w);
        if constexpr (kHasTimes16) store_bytes(out + 64 * (kVectors + c), times16(w));
      };
#pragma GCC unroll 8
      for (int c = 0; c < T::kGroupBytes / 64; ++c) {
        prefetch_l2(next.group(next_g) + 64 * c);
        const u8x64 bytes = load_bytes(tile.group(g) + 64 * c);
        if constexpr (kInfo.bits == 4) {
          put(c, low_nibbles(bytes));
          put(c + 4, high_nibbles(bytes));
        } else {
          put(c, bytes);
        }
      }
      prefetch_l2(next.scales + next_g * T::kScaleStride);
      if constexpr (kInfo.has_min) prefetch_l2(next.mins + next_g * T::kScaleStride);
      store(reinterpret_cast<float*>(out + kScaleAt), tile.scale(g));
      if constexpr (kInfo.has_min) store(reinterpret_cast<float*>(out + kMinAt), tile.min(g));
    }
  }
};

// Input features of a chunk: with the sums of a row taken up and laid down less often, longer ones are faster, as long as they
// leave the first level of cache room for rows.
constexpr int chunk_features(WeightFormat format) { return uses_tile_registers(format) ? 128 : 256; }
// Results of so many bytes are not in the second level of cache: their lines are asked for before the sums are done.
constexpr int64_t kFarResultBytes = 1 << 20;
constexpr int64_t sum_stride(WeightFormat format) { return tiles_of(format) * kTileColumns; }

// The groups [g_begin, g_begin + num_groups) of some tiles, unpacked, and the rows that go over them.
struct Many {
  const uint8_t* unpacked[kTiles];
  int num_tiles;
  const QuantizedRows* x;
  int64_t g_begin, num_groups;
  bool is_last;
  float* y;  // of row 0, at the first tile's columns
  int64_t ldy;

  // The sums of a row for tile t wait at sums + sum_stride · (row − first row of the pass) + 16 · t; the last chunk's
  // go to y.
  float* sums;
  int64_t first_row;
};

// Adds the groups to the sums of num_rows rows of a block for all tiles, kNum of them. Of fewer than kRows the rest is computed of what lies behind
// them, and dropped.
template <WeightFormat kFormat, int kRows, int kNum>
void block_many(const Many& m, int64_t row, int num_rows) {
  using U = Unpacked<kFormat, false>;
  constexpr FormatInfo kInfo = U::kInfo;
  const QuantizedRows& x = *m.x;
  const RowsOfBlock rows(x, row);
  float* const sums = m.sums + (row - m.first_row) * sum_stride(kFormat);

  f32x16 acc[kRows][kNum];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kNum; ++t)
      acc[r][t] = m.g_begin == 0 ? f32_zero() : load(sums + r * sum_stride(kFormat) + t * kTileColumns);
  }
  const uint8_t* p[kNum];
  for (int t = 0; t < kNum; ++t) p[t] = m.unpacked[t];
  for (int64_t g = m.g_begin; g < m.g_begin + m.num_groups; ++g) {
    i32x16 dot[kRows][kNum];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const i32x16 start = GroupOfRow<kFormat>(rows, r, g).zero_sum(x);
#pragma GCC unroll 4
      for (int t = 0; t < kNum; ++t) dot[r][t] = start;
    }
#pragma GCC unroll 8
    for (int c = 0; c < U::kVectors; ++c) {
      u8x64 w[kNum];
#pragma GCC unroll 4
      for (int t = 0; t < kNum; ++t) w[t] = load_bytes(p[t] + 64 * c);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const u8x64 word = bytes_word(GroupOfRow<kFormat>(rows, r, g).low + 4 * c);
#pragma GCC unroll 4
        for (int t = 0; t < kNum; ++t) dot[r][t] = dot4_weights<kFormat>(dot[r][t], w[t], word);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const GroupOfRow<kFormat> group(rows, r, g);
      const u8x64 word = bytes_word(group.middle);
#pragma GCC unroll 4
      for (int t = 0; t < kNum; ++t) {
        const uint8_t* w = p[t] + 64 * group.chunk;
        if constexpr (U::kHasTimes16) {
          dot[r][t] = dot4(dot[r][t], load_bytes(w + 64 * U::kVectors), word);
        } else {
          dot[r][t] = dot[r][t] + shift_left<kPeakShift>(dot4(i32_zero(), load_bytes(w), word));
        }
      }
    }
    if (__builtin_expect(any_wide<kFormat, kRows>(rows, g), 0)) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const GroupOfRow<kFormat> group(rows, r, g);
        const u8x64 word = bytes_word(group.wide);
#pragma GCC unroll 4
        for (int t = 0; t < kNum; ++t) {
          const i32x16 product = dot4(i32_zero(), load_bytes(p[t] + 64 * group.chunk), word);
          dot[r][t] = dot[r][t] + shift_left<kWideShift>(product);
        }
      }
    }
    f32x16 scale[kNum], min[kNum];
#pragma GCC unroll 4
    for (int t = 0; t < kNum; ++t) {
      scale[t] = load(reinterpret_cast<const float*>(p[t] + U::kScaleAt));
      if constexpr (kInfo.has_min) min[t] = load(reinterpret_cast<const float*>(p[t] + U::kMinAt));
      p[t] += U::kBytes;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = GroupOfRow<kFormat>(rows, r, g).at;
      const f32x16 xs = f32_set1(x.scale[at]);
#pragma GCC unroll 4
      for (int t = 0; t < kNum; ++t) {
        acc[r][t] = fma(to_f32(dot[r][t]), scale[t] * xs, acc[r][t]);
        if constexpr (kInfo.has_min) acc[r][t] = fma(min[t], f32_set1(x.offsets[at]), acc[r][t]);
      }
    }
  }
  float* const out = m.is_last ? m.y + row * m.ldy : sums;
  const int64_t stride = m.is_last ? m.ldy : sum_stride(kFormat);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kNum; ++t)
      if (r < num_rows) store(out + r * stride + t * kTileColumns, acc[r][t]);
  }
}

#if !defined(MOTET_ISA_amx)
template <WeightFormat kFormat>
struct Amx {
  static void begin() {}
  static void end() {}
};
#else
}  // namespace
}  // namespace motet::MOTET_ISA
#include "matmul_q_amx.h"
namespace motet::MOTET_ISA {
namespace {
#endif

// The rows [row, row + num_rows) of one block, in turns.
template <WeightFormat kFormat, int kNum>
void rows_of_block(const Many& m, int64_t row, int num_rows, Asker& asker) {
  constexpr int kTurn = rows_of_turn(kNum);
  for (int r = 0; r < num_rows; r += kTurn) {
    const int turn = num_rows - r < kTurn ? num_rows - r : kTurn;
    asker.turn();
    if (turn > 4 && kTurn > 4) block_many<kFormat, kTurn, kNum>(m, row + r, turn);
    else if (turn > 2 && kTurn > 2) block_many<kFormat, 4, kNum>(m, row + r, turn);
    else block_many<kFormat, 2, kNum>(m, row + r, turn);
  }
}

// kNum tiles for the rows [first_row, end_row) of a pass. next_tiles: how many tiles on the next ones are; 0: there are
// none.
template <WeightFormat kFormat, int kNum>
void many_rows(float* y, int64_t ldy, const uint8_t* tiles, const QuantizedRows& x, int64_t first_row, int64_t end_row,
               int64_t next_tiles, Asker& asker) {
  using T = Tile<kFormat>;
  constexpr bool kAmx = uses_tile_registers(kFormat);
  using U = Unpacked<kFormat, kAmx && T::kInfo.zero != 0>;
  constexpr int64_t kChunkGroups = chunk_features(kFormat) / T::kInfo.group_size;
  alignas(64) uint8_t unpacked[kNum][kChunkGroups * U::kBytes];
  alignas(64) float sums[(kMaxPassRows + kMaxRows) * sum_stride(kFormat)];
  const int64_t stride = T::bytes(x.k), groups = x.k / T::kInfo.group_size;
  const int64_t num_chunks = (groups + kChunkGroups - 1) / kChunkGroups;
  const bool are_far = (end_row - first_row) * ldy * static_cast<int64_t>(sizeof(float)) >= kFarResultBytes;
  Many m{{}, kNum, &x, 0, 0, false, y, ldy, sums, first_row};
  for (int t = 0; t < kTiles; ++t) m.unpacked[t] = unpacked[t < kNum ? t : 0];
  for (int64_t g = 0; g < groups; g += kChunkGroups) {
    m.g_begin = g;
    m.num_groups = groups - g < kChunkGroups ? groups - g : kChunkGroups;
    m.is_last = g + m.num_groups == groups;
    // While the rows go over this chunk the next is on its way, or the first of the next tiles.
    for (int t = 0; t < kNum; ++t) {
      const uint8_t* const tile = tiles + t * stride;
      const T next(m.is_last ? tile + next_tiles * stride : tile, x.k);
      U::fill(unpacked[t], T(tile, x.k), g, m.num_groups, next, m.is_last ? 0 : g + m.num_groups);
    }
    for (int64_t row = first_row; row < end_row; row += kRowBlock) {
      // A block asks for some of its lines in each chunk.
      if (are_far) {
        for (int64_t r = g / kChunkGroups; r < x.block_rows(row); r += num_chunks)
          for (int t = 0; t < kNum; ++t) prefetch_l2(y + (row + r) * ldy + t * kTileColumns);
      }
      if constexpr (kAmx) {
        asker.turn();
        Amx<kFormat>::rows(m, row, x.block_rows(row));
      } else {
        rows_of_block<kFormat, kNum>(m, row, x.block_rows(row), asker);
      }
    }
  }
}

template <WeightFormat kFormat>
void matmul_q_format(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x,
                     int tile_begin, int tile_end, const Ahead* ahead, int num_ahead) {
  // Below a full block the tile registers gain nothing.
  constexpr bool kAmx = uses_tile_registers(kFormat);
  if (x.num_rows <= (kAmx ? kRowBlock - 1 : kFewRows)) return few_rows<kFormat, kFewRows>(y, ldy, w, x, tile_begin, tile_end, ahead, num_ahead);
  // A turn is one of a block of rows over a chunk, or a part of one.
  constexpr int kMost = tiles_of(kFormat), kRowsOfTurn = kAmx ? kRowBlock : rows_of_turn(kMost);
  const int64_t chunks = (w.in_features + chunk_features(kFormat) - 1) / chunk_features(kFormat);
  const int64_t turns = (x.num_rows + kRowsOfTurn - 1) / kRowsOfTurn;
  Asker asker(ahead, num_ahead, (tile_end - tile_begin + kMost - 1) / kMost * chunks * turns);
  const int64_t stride = Tile<kFormat>::bytes(w.in_features);
  Amx<kFormat>::begin();
  for (int64_t row = 0; row < x.num_rows; row += pass_rows(x.k, kQBytes)) {
    const int64_t end_row = x.num_rows - row < pass_rows(x.k, kQBytes) ? x.num_rows : row + pass_rows(x.k, kQBytes);
    for (int64_t t = tile_begin; t < tile_end;) {
      // Four are two and two, so that none is alone.
      const int64_t left = tile_end - t, num = left == 4 && kMost == 3 ? 2 : left < kMost ? left : kMost;
      const auto go = [&]<int kNum>() {
        many_rows<kFormat, kNum>(y + t * kTileColumns, ldy, w.data + t * stride, x, row, end_row, left > num ? num : 0, asker);
      };
      if constexpr (kMost > 2) {
        if (num == 3) go.template operator()<3>();
      }
      if constexpr (kMost > 1) {
        if (num == 2) go.template operator()<2>();
      }
      if (num == 1) go.template operator()<1>();
      t += num;
    }
  }
  Amx<kFormat>::end();
}

}  // namespace

void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int tile_begin,
              int tile_end, const Ahead* ahead, int num_ahead) {
  dispatch_format(w.format, [&]<WeightFormat kFormat>() __attribute__((always_inline)) {
    if constexpr (format_info(kFormat).group_size != 0)
      matmul_q_format<kFormat>(y, ldy, w, x, tile_begin, tile_end, ahead, num_ahead);
  });
}

}  // namespace motet::MOTET_ISA
