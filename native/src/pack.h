// From a source tensor to packed bytes: dequantises GGUF blocks and float types, quantises where asked, and lays
// rows out as tiles. Pure functions over memory; no files and no Node here. Everything is checked by the caller's
// sizes: nothing reads beyond `source_bytes`.
#pragma once
#include <cstddef>
#include <cstdint>

#include "weights.h"

namespace motet {

enum class SourceType : int32_t { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ4_K, kQ5_K, kQ6_K };
inline constexpr int kNumSourceTypes = 11;

// Elements per block and bytes per block of a source type.
struct SourceInfo { const char* name; int block_elements; int block_bytes; };
const SourceInfo& source_info(SourceType type);

// The packed format that holds a GGUF-quantised source without loss; for float sources the format of the same name.
WeightFormat lossless_format(SourceType type);

// Elements [n·block, ...) of one row to f32. num_elements is a multiple of the block.
void dequantize_row(float* out, SourceType type, const uint8_t* source, int64_t num_elements);

// Packs tiles [tile_begin, tile_end) of [out_features, in_features] into out (the start of tile_begin).
//   row_bytes is a source row's stride; rows (may be null) permutes rows; addend is added to every element.
// A lossless target copies quants and scales; any other combination goes through f32 and is quantised:
// int4 and int8 symmetric per group of 32, the scale searched for least squared error (int4) or max|w|/127 (int8).
// Throws std::runtime_error naming the row when a value is not finite.
void pack_tiles(uint8_t* out, WeightFormat target, SourceType source_type, const uint8_t* source, int64_t row_bytes,
                int64_t out_features, int64_t in_features, const int32_t* rows, float addend, int64_t tile_begin, int64_t tile_end);

}  // namespace motet
