// One row of a packed matrix in f32: an embedding.
#include "simd.h"
#include "tile.h"
#include "variant.h"

namespace motet::MOTET_ISA {

template <WeightFormat kFormat>
static void unpack_row_format(float* out, const PackedMatrix& w, int64_t n) {
  constexpr FormatInfo kInfo = format_info(kFormat);
  const int64_t k = w.in_features;
  const int64_t column = n % kTileColumns;
  if constexpr (kInfo.group_size == 0) {
    const uint8_t* tile = w.data + n / kTileColumns * (k * kTileColumns * (kInfo.bits / 8));
    for (int64_t i = 0; i < k; ++i) {
      const int64_t element = i * kTileColumns + column;
      if constexpr (kFormat == WeightFormat::kF32) {
        out[i] = reinterpret_cast<const float*>(tile)[element];
      } else {
        const uint8_t* p = tile + 2 * element;
        store_n(out + i, kFormat == WeightFormat::kF16 ? load_f16_n(p, 1) : load_bf16_n(p, 1), 1);
      }
    }
  } else {
    const Tile<kFormat> tile(w.data + n / kTileColumns * Tile<kFormat>::bytes(k), k);
    for (int64_t g = 0; g < k / kInfo.group_size; ++g) {
      float scale[kTileColumns], min[kTileColumns], q[kInfo.group_size];
      store(scale, tile.scale(g));
      store(min, tile.min(g));
      const uint8_t* from = tile.group(g) + 4 * column;
      for (int i = 0; i < kInfo.group_size; ++i) {
        const int high = kInfo.bits == 4 ? i / 16 : 0;  // the group's second half lies in high nibbles
        const int byte = from[(i - 16 * high) / 4 * 64 + i % 4];
        q[i] = static_cast<float>((kInfo.bits == 4 ? byte >> 4 * high & 15 : byte) - kInfo.zero);
      }
      for (int i = 0; i < kInfo.group_size; i += 16) {
        store(out + g * kInfo.group_size + i,
              fma(load(q + i), f32_set1(scale[column]), f32_set1(min[column])));
      }
    }
  }
}

void unpack_row(float* out, const PackedMatrix& w, int32_t n) {
  dispatch_format(w.format, [&]<WeightFormat kFormat>()
                                __attribute__((always_inline)) { unpack_row_format<kFormat>(out, w, n); });
}

}  // namespace motet::MOTET_ISA
