// AMX's tile registers: eight, of up to 16 rows of 64 bytes. With MOTET_AMX_EMULATED they are arrays, so that what is computed with
// them can be tested where the processor has none (tests/native/tile_registers_test.cc).
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBSSD.
#pragma once
#include <cstdint>

#include "simd.h"

namespace motet::MOTET_ISA {
namespace {

constexpr int kTileRegisterBytes = 16 * 64;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

#if defined(MOTET_AMX_EMULATED)

struct TileRegisters {
  TileConfig config;
  uint8_t bytes[8][kTileRegisterBytes];
};
thread_local TileRegisters tiles;

void load_config(const TileConfig& config) { tiles.config = config; }
void release_tiles() { tiles = {}; }

template <int kTile>
void load_tile(const void* from) {
  for (int r = 0; r < tiles.config.rows[kTile]; ++r)
    __builtin_memcpy(tiles.bytes[kTile] + 64 * r, static_cast<const uint8_t*>(from) + 64 * r, tiles.config.bytes_per_row[kTile]);
}

template <int kTile>
void store_tile(int32_t* to) {
  for (int r = 0; r < tiles.config.rows[kTile]; ++r)
    __builtin_memcpy(to + 16 * r, tiles.bytes[kTile] + 64 * r, tiles.config.bytes_per_row[kTile]);
}

// Bytes that the configuration leaves out of a register are no part of the product.
template <bool kSigned, int kTile, int kActivations, int kWeights>
void multiply() {
  const TileConfig& config = tiles.config;
  int32_t sums[16][16] = {};
  for (int r = 0; r < config.rows[kActivations]; ++r) {
    for (int k = 0; k < config.bytes_per_row[kActivations]; ++k) {
      for (int c = 0; c < config.bytes_per_row[kTile] / 4; ++c) {
        const uint8_t w = tiles.bytes[kWeights][64 * (k / 4) + 4 * c + k % 4];
        sums[r][c] += static_cast<int8_t>(tiles.bytes[kActivations][64 * r + k]) * (kSigned ? static_cast<int8_t>(w) : w);
      }
    }
  }
  __builtin_memcpy(tiles.bytes[kTile], sums, sizeof(sums));
}

#else

// Not _tile_loadconfig: gcc 12's tells the compiler of the first eight bytes only.
void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
void release_tiles() { _tile_release(); }

// The number of a register is part of the instruction. What is read and written is said exactly: a clobber of all memory
// would send the sums there and back.
template <int kTile>
MOTET_INLINE void load_tile(const void* from) {
  using Bytes = const uint8_t[kTileRegisterBytes];
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(int64_t{64}), "m"(*static_cast<Bytes*>(from)));
}

template <int kTile>
MOTET_INLINE void store_tile(int32_t* to) {
  using Sums = int32_t[kTileRegisterBytes / 4];
  __asm__ volatile("tilestored %%tmm%c1, (%2,%3,1)"
                   : "=m"(*reinterpret_cast<Sums*>(to))
                   : "i"(kTile), "r"(to), "r"(int64_t{64}));
}

// The product alone: nothing is added to what was there.
template <bool kSigned, int kTile, int kActivations, int kWeights>
MOTET_INLINE void multiply() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  if constexpr (kSigned) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTile), "i"(kActivations), "i"(kWeights));
  } else {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTile), "i"(kActivations), "i"(kWeights));
  }
}

#endif

}  // namespace
}  // namespace motet::MOTET_ISA
