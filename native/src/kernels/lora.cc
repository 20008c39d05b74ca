// The two halves of a low-rank delta: shrink to the rank (x · Aᵀ), expand to the output features (s · Bᵀ) and
// add. Where every row has an adapter of its own, each weight is read for one row only, and what counts is
// that weights arrive as fast as memory gives them. One stream does not get all of that: so four adapters are
// read side by side, or four places of one, each asked for a little ahead.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

// Rows computed together, so that a weight is read and widened once for them; for shrink also ranks, so that
// x is. And streams of weights that are read side by side for one row each.
#if defined(MOTET_ISA_avx512)
static constexpr int kExpandRows = 6, kShrinkRows = 3, kShrinkRanks = 2, kStreams = kLoraStreams;
#else
static constexpr int kExpandRows = 1, kShrinkRows = 1, kShrinkRanks = 1, kStreams = 1;
#endif
// How far ahead of their use a stream's weights are asked for.
static constexpr int kAheadBytes = 2048;

template <LoraFormat kFormat>
static constexpr int64_t kBlockBytes = 64 * static_cast<int64_t>(lora_element_bytes(kFormat));

// 64 weights in f32, as four vectors.
template <LoraFormat kFormat>
MOTET_INLINE void load_weights(f32x16* out, const uint8_t* from) {
  if constexpr (kFormat == LoraFormat::kBF16) {
#pragma GCC unroll 2
    for (int c = 0; c < 4; c += 2) {
      const i32x16 pair = load_i32(reinterpret_cast<const int32_t*>(from) + 8 * c);
      out[c] = as_f32(shift_left<16>(pair));
      out[c + 1] = as_f32(pair & i32_set1(static_cast<int32_t>(0xffff0000u)));
    }
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const uint8_t* p = from + kBlockBytes<kFormat> / 4 * c;
      if constexpr (kFormat == LoraFormat::kF32) out[c] = load(reinterpret_cast<const float*>(p));
      if constexpr (kFormat == LoraFormat::kF16) out[c] = load_f16(p);
      if constexpr (kFormat == LoraFormat::kInt8) out[c] = to_f32(load_s8(p));
    }
  }
}

// The last n < 64 of a row; what is beyond them is 0. No byte beyond the row's is read.
template <LoraFormat kFormat>
MOTET_INLINE void load_last_weights(f32x16* out, const uint8_t* from, int n) {
  alignas(64) uint8_t padded[kBlockBytes<kFormat>] = {};
  const int num_elements = kFormat == LoraFormat::kBF16 ? (n + 31) / 32 * 32 : n;
  __builtin_memcpy(padded, from, static_cast<unsigned>(num_elements) * lora_element_bytes(kFormat));
  load_weights<kFormat>(out, padded);
}

template <LoraFormat kFormat>
MOTET_INLINE void prefetch_block(const uint8_t* p) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlockBytes<kFormat>; i += 64) prefetch(p + i);
}

// --- Shrink ---
// A row's product with a rank row takes the features 16c to 16c + 15 of every 64 into sum c; in the end
// (0 + 1) + (2 + 3), reduced.

// *s[u] = x[u] · a[u]
template <LoraFormat kFormat, int kCount>
static void shrink_streams(float* const* s, const float* const* x, const uint8_t* const* a, int64_t k) {
  f32x16 acc[kCount][4];
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[u][c] = f32_zero();
  }
  int64_t f = 0, at = 0;
  for (; f + 64 <= k; f += 64, at += kBlockBytes<kFormat>) {
#pragma GCC unroll 4
    for (int u = 0; u < kCount; ++u) {
      f32x16 weights[4];
      prefetch_block<kFormat>(a[u] + at + kAheadBytes);  // rows follow one another but at the end of a page
      load_weights<kFormat>(weights, a[u] + at);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[u][c] = fma(weights[c], load(x[u] + f + 16 * c), acc[u][c]);
    }
  }
  if (f < k) {
#pragma GCC unroll 4
    for (int u = 0; u < kCount; ++u) {
      f32x16 weights[4];
      const int left = static_cast<int>(k - f);
      load_last_weights<kFormat>(weights, a[u] + at, left);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int n = left - 16 * c < 16 ? left - 16 * c : 16;
        if (n > 0) acc[u][c] = fma(weights[c], load_n(x[u] + f + 16 * c, n), acc[u][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) *s[u] = reduce_add((acc[u][0] + acc[u][1]) + (acc[u][2] + acc[u][3]));
}

// The same for every row and rank row of a block: s[i][j] = x[i] · a[j]. Weights are expected in the cache.
template <LoraFormat kFormat, int kRows, int kRanks>
static void shrink_block(float* s, int64_t lds, const float* const* x, const void* const* a, int64_t k) {
  f32x16 acc[kRows][kRanks][4];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[i][j][c] = f32_zero();
    }
  }
  const auto row = [&](int j) { return static_cast<const uint8_t*>(a[j]); };
  int64_t f = 0, at = 0;
  for (; f + 64 <= k; f += 64, at += kBlockBytes<kFormat>) {
    f32x16 weights[kRanks][4];
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) load_weights<kFormat>(weights[j], row(j) + at);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const f32x16 features = load(x[i] + f + 16 * c);
#pragma GCC unroll 2
        for (int j = 0; j < kRanks; ++j) acc[i][j][c] = fma(weights[j][c], features, acc[i][j][c]);
      }
    }
  }
  if (f < k) {
    const int left = static_cast<int>(k - f);
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) {
      f32x16 weights[4];
      load_last_weights<kFormat>(weights, row(j) + at, left);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int n = left - 16 * c < 16 ? left - 16 * c : 16;
        if (n <= 0) continue;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          acc[i][j][c] = fma(weights[c], load_n(x[i] + f + 16 * c, n), acc[i][j][c]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kRanks; ++j) {
      s[i * lds + j] = reduce_add((acc[i][j][0] + acc[i][j][1]) + (acc[i][j][2] + acc[i][j][3]));
    }
  }
}

// One row of one job, its rank rows as kStreams runs that are read side by side.
template <LoraFormat kFormat>
static void shrink_row(const LoraJob& job, const float* x, int64_t ldx, int64_t k, int row, int j_begin,
                       int j_end) {
  const float* from[kStreams];
  const uint8_t* a[kStreams];
  float* s[kStreams];
  const auto set = [&](int u, int j) {
    from[u] = x + job.rows[row] * ldx;
    a[u] = static_cast<const uint8_t*>(job.module->a_rows[j]);
    s[u] = job.s + row * job.lds + j;
  };
  const int run = (j_end - j_begin) / kStreams;
  for (int j = j_begin; j < j_begin + run; ++j) {
    for (int u = 0; u < kStreams; ++u) set(u, j + u * run);
    shrink_streams<kFormat, kStreams>(s, from, a, k);
  }
  for (int j = j_begin + run * kStreams; j < j_end; ++j) {
    set(0, j);
    shrink_streams<kFormat, 1>(s, from, a, k);
  }
}

template <LoraFormat kFormat>
static void shrink_rows(const LoraJob& job, const float* x, int64_t ldx, int64_t k, int row_begin,
                        int row_end, int j_begin, int j_end) {
  int row = row_begin;
  for (; row + kShrinkRows <= row_end && kShrinkRows > 1; row += kShrinkRows) {
    const float* from[kShrinkRows];
    for (int i = 0; i < kShrinkRows; ++i) from[i] = x + job.rows[row + i] * ldx;
    float* s = job.s + row * job.lds;
    const void* const* a = job.module->a_rows;
    int j = j_begin;
    for (; j + kShrinkRanks <= j_end; j += kShrinkRanks) {
      shrink_block<kFormat, kShrinkRows, kShrinkRanks>(s + j, job.lds, from, a + j, k);
    }
    for (; j < j_end; ++j) shrink_block<kFormat, kShrinkRows, 1>(s + j, job.lds, from, a + j, k);
  }
  for (; row < row_end; ++row) shrink_row<kFormat>(job, x, ldx, k, row, j_begin, j_end);
}

// The only rows of jobs that fit together, side by side.
template <LoraFormat kFormat>
static void shrink_jobs(const LoraJob* jobs, const float* x, int64_t ldx, int64_t k, int j_begin, int j_end) {
  const float* from[kStreams];
  const uint8_t* a[kStreams];
  float* s[kStreams];
  for (int j = j_begin; j < j_end; ++j) {
    for (int u = 0; u < kStreams; ++u) {
      from[u] = x + jobs[u].rows[0] * ldx;
      a[u] = static_cast<const uint8_t*>(jobs[u].module->a_rows[j]);
      s[u] = jobs[u].s + j;
    }
    shrink_streams<kFormat, kStreams>(s, from, a, k);
  }
}

// --- Expand ---

// A tile of a job's module.
struct Unit {
  const LoraJob* job;
  int tile;
};

MOTET_INLINE const uint8_t* bytes_of(const Unit& unit) {
  return static_cast<const uint8_t*>(unit.job->module->b_tiles[unit.tile]);
}

// What s · Bᵀ of a tile becomes on its way onto y, for one row of the job.
MOTET_INLINE void add_delta(float* y, int64_t ldy, const float* base, int64_t ldb, int n, const Unit& unit,
                            int row, const f32x16* sums) {
  const LoraModule& m = *unit.job->module;
  const int64_t first = int64_t{unit.tile} * kLoraTileColumns;
  const float* gain = m.gain_tiles != nullptr ? m.gain_tiles[unit.tile] : nullptr;
  const float* bias = m.bias_tiles != nullptr ? m.bias_tiles[unit.tile] : nullptr;
  const f32x16 scaling = f32_set1(m.scaling), weight = f32_set1(unit.job->weights[row]);
  const int64_t at = unit.job->rows[row];
  float* out = y + at * ldy + first;
  const float* in = base + at * ldb + first;
#pragma GCC unroll 4
  for (int c = 0; c < kLoraTileColumns / 16; ++c) {
    const int64_t left = n - first - 16 * c;
    if (left <= 0) continue;
    const int columns = left < 16 ? static_cast<int>(left) : 16;
    f32x16 delta = sums[c];
    if (bias != nullptr) delta = delta + load(bias + 16 * c);
    delta = delta * scaling;
    if (gain != nullptr) {
      const f32x16 g = load(gain + 16 * c);
      delta = fma(g, delta, (g - f32_set1(1.0f)) * load_n(in + 16 * c, columns));
    }
    store_n(out + 16 * c, fma(weight, delta, load_n(out + 16 * c, columns)), columns);
  }
}

// s[j] as B's rank row j is to be multiplied by.
template <LoraFormat kFormat>
MOTET_INLINE f32x16 factor_of(const float* s, const uint8_t* tile, int64_t j) {
  const float value = s[j];
  return f32_set1(kFormat == LoraFormat::kInt8 ? value * reinterpret_cast<const float*>(tile)[j] : value);
}

template <LoraFormat kFormat>
MOTET_INLINE int64_t bytes_before_weights(int64_t rank) {
  return kFormat == LoraFormat::kInt8 ? static_cast<int64_t>(lora_scale_bytes(static_cast<int>(rank))) : 0;
}

// Units of one row each, of the same rank: s · Bᵀ, j in order, and onto y. Asks meanwhile for the rest of
// their tiles, and then for those at `ahead`.
template <LoraFormat kFormat, int kUnits>
static void expand_units(float* y, int64_t ldy, const float* base, int64_t ldb, int n, const Unit* units,
                         const uint8_t* const* ahead) {
  const int64_t rank = units[0].job->module->rank, before = bytes_before_weights<kFormat>(rank);
  const uint8_t* tile[kUnits];
  const float* s[kUnits];
  f32x16 acc[kUnits][4];
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    tile[u] = bytes_of(units[u]);
    s[u] = units[u].job->s;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[u][c] = f32_zero();
  }
  int64_t j = 0;
  const auto add_ranks = [&](int64_t end, const uint8_t* const* next, int64_t offset)
      __attribute__((always_inline)) {
    for (; j < end; ++j) {
      const int64_t at = before + j * kBlockBytes<kFormat>;
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u) {
        f32x16 columns[4];
        prefetch_block<kFormat>(next[u] + at + offset);
        load_weights<kFormat>(columns, tile[u] + at);
        const f32x16 factor = factor_of<kFormat>(s[u], tile[u], j);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[u][c] = fma(columns[c], factor, acc[u][c]);
      }
    }
  };
  const int64_t here = rank - kAheadBytes / kBlockBytes<kFormat>;
  if (here > 0) add_ranks(here, tile, kAheadBytes);
  add_ranks(rank, ahead, here > 0 ? -here * kBlockBytes<kFormat> - before : -before);
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) add_delta(y, ldy, base, ldb, n, units[u], 0, acc[u]);
}

// The tiles of kJobs jobs that fit together; after the last tile comes the first of the jobs at `later`.
template <LoraFormat kFormat, int kJobs>
static void expand_jobs(float* y, int64_t ldy, const float* base, int64_t ldb, int n, const LoraJob* jobs,
                        int tile_begin, int tile_end, const LoraJob* later, const LoraJob* end) {
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    Unit units[kJobs];
    const uint8_t* ahead[kJobs];
    for (int u = 0; u < kJobs; ++u) {
      units[u] = {jobs + u, tile};
      const Unit next = tile + 1 < tile_end ? Unit{jobs + u, tile + 1} : Unit{later + u, tile_begin};
      ahead[u] = bytes_of(next.job < end ? next : units[u]);
    }
    expand_units<kFormat, kJobs>(y, ldy, base, ldb, n, units, ahead);
  }
}

// The same sums for kRows rows of one unit.
template <LoraFormat kFormat, int kRows>
static void expand_rows(float* y, int64_t ldy, const float* base, int64_t ldb, int n, const Unit& unit,
                        int row) {
  const LoraJob& job = *unit.job;
  const int64_t rank = job.module->rank;
  const uint8_t* tile = bytes_of(unit);
  const uint8_t* b = tile + bytes_before_weights<kFormat>(rank);
  const float* s = job.s + row * job.lds;
  f32x16 acc[kRows][4];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[i][c] = f32_zero();
  }
  for (int64_t j = 0; j < rank; ++j, b += kBlockBytes<kFormat>) {
    f32x16 columns[4];
    load_weights<kFormat>(columns, b);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const f32x16 factor = factor_of<kFormat>(s + i * job.lds, tile, j);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[i][c] = fma(columns[c], factor, acc[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) add_delta(y, ldy, base, ldb, n, unit, row + i, acc[i]);
}

template <typename Function>
MOTET_INLINE void dispatch_lora_format(LoraFormat format, Function&& f) {
  switch (format) {
    case LoraFormat::kF32:
      return f.template operator()<LoraFormat::kF32>();
    case LoraFormat::kF16:
      return f.template operator()<LoraFormat::kF16>();
    case LoraFormat::kBF16:
      return f.template operator()<LoraFormat::kBF16>();
    case LoraFormat::kInt8:
      return f.template operator()<LoraFormat::kInt8>();
  }
}

MOTET_INLINE bool fit_together(const LoraJob& a, const LoraJob& b) {
  return a.num_rows == 1 && b.num_rows == 1 && a.module->rank == b.module->rank &&
         a.module->format == b.module->format;
}

// How many of the jobs from `job` on are read side by side: kStreams, or 1.
MOTET_INLINE int num_together(const LoraJob* job, const LoraJob* end) {
  if (end - job < kStreams) return 1;
  for (int u = 1; u < kStreams; ++u) {
    if (!fit_together(job[0], job[u])) return 1;
  }
  return kStreams;
}

void lora_shrink(const LoraJob* jobs, int num_jobs, const float* x, int64_t ldx, int k, int row_begin,
                 int row_end, int j_begin, int j_end) {
  const LoraJob* const end = jobs + num_jobs;
  for (const LoraJob* job = jobs; job < end;) {
    const int together = num_together(job, end);
    dispatch_lora_format(
        job->module->format, [&]<LoraFormat kFormat>() __attribute__((always_inline)) {
          if (kStreams > 1 && together == kStreams) {
            shrink_jobs<kFormat>(job, x, ldx, k, j_begin, j_end);
          } else {
            shrink_rows<kFormat>(*job, x, ldx, k, row_begin, row_end, j_begin, j_end);
          }
        });
    job += together;
  }
}

void lora_expand(float* y, int64_t ldy, const float* base, int64_t ldb, const LoraJob* jobs, int num_jobs,
                 int n, int tile_begin, int tile_end) {
  const LoraJob* const end = jobs + num_jobs;
  for (const LoraJob* job = jobs; job < end;) {
    const int together = num_together(job, end);
    const LoraJob* const later = job + together;
    dispatch_lora_format(
        job->module->format, [&]<LoraFormat kFormat>() __attribute__((always_inline)) {
          if (kStreams > 1 && together == kStreams) {
            expand_jobs<kFormat, kStreams>(y, ldy, base, ldb, n, job, tile_begin, tile_end, later, end);
          } else if (job->num_rows == 1) {
            expand_jobs<kFormat, 1>(y, ldy, base, ldb, n, job, tile_begin, tile_end, later, end);
          } else {
            for (int tile = tile_begin; tile < tile_end; ++tile) {
              int row = 0;
              for (; row + kExpandRows <= job->num_rows; row += kExpandRows) {
                expand_rows<kFormat, kExpandRows>(y, ldy, base, ldb, n, {job, tile}, row);
              }
              for (; row < job->num_rows; ++row) {
                expand_rows<kFormat, 1>(y, ldy, base, ldb, n, {job, tile}, row);
              }
            }
          }
        });
    job = later;
  }
}

}  // namespace motet::MOTET_ISA
