// What the kernel tests compare to: packing by the words of weights.h, slowly and obviously, seeded random
// numbers, and half-precision conversions by their definition. Every test runs over every instruction set
// this processor has.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace motet::reference {

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // In [low, high].
  int integer(int low, int high) {
    return low + static_cast<int>(bits() % static_cast<uint64_t>(int64_t{high} - low + 1));
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(1 - uniform())) * std::cos(2 * M_PI * uniform()));
  }
  std::vector<float> normals(size_t count, float scale = 1) {
    std::vector<float> out(count);
    for (float& x : out) x = scale * normal();
    return out;
  }

 private:
  uint64_t state_;
};

// `count` normal numbers of their own seed.
inline std::vector<float> random_floats(size_t count, uint64_t seed, float scale = 1) {
  return Random(seed).normals(count, scale);
}

// A vector whose data is 64-byte aligned, as packed files are mapped.
template <typename T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const AlignedAllocator&) const { return true; }
};
template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

// --- Half precision, by definition ---

inline float f16_to_f32(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

// Round to nearest, ties to even. Finite x only.
inline uint16_t f32_to_f16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24));
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = fraction · 2^exponent, fraction in [0.5, 1)
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // 1024 ... 2048
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + units);
}

inline float bf16_to_f32(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline uint16_t f32_to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t below = u & 0xffff, kept = u >> 16;
  return static_cast<uint16_t>(kept + (below > 0x8000 || (below == 0x8000 && (kept & 1)) ? 1 : 0));
}

// x as it comes back from being stored in `type`.
inline float round_to(ElementType type, float x) {
  if (type == ElementType::kF16) return f16_to_f32(f32_to_f16(x));
  if (type == ElementType::kBF16) return bf16_to_f32(f32_to_bf16(x));
  return x;
}

// Plain values as bytes of `type`.
inline AlignedVector<uint8_t> encode(ElementType type, const std::vector<float>& values) {
  AlignedVector<uint8_t> out(values.size() * element_bytes(type));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = type == ElementType::kF16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
    if (type == ElementType::kF32)
      std::memcpy(out.data() + 4 * i, &values[i], 4);
    else
      std::memcpy(out.data() + 2 * i, &half, 2);
  }
  return out;
}

// --- Matrices ---

// A matrix before packing. Float formats have `values`; quantised ones q, scale and min, the last two already
// rounded to the format's precision.
struct Matrix {
  WeightFormat format;
  int n, k;
  std::vector<float> values;      // [n, k]
  std::vector<uint8_t> q;         // [n, k]
  std::vector<float> scale, min;  // [n, k / groupSize]

  int groups() const { return k / format_info(format).group_size; }
  float weight(int row, int feature) const {
    if (!is_quantized(format)) return values[size_t(row) * k + feature];
    const FormatInfo f = format_info(format);
    const size_t group = size_t(row) * groups() + feature / f.group_size;
    return std::fma(static_cast<float>(q[size_t(row) * k + feature] - f.zero), scale[group],
                    f.has_min ? min[group] : 0.0f);
  }
};

inline ElementType scale_type(WeightFormat format) {
  return format_info(format).scale_bytes == 2 ? ElementType::kF16 : ElementType::kF32;
}

inline Matrix random_matrix(Random& random, WeightFormat format, int n, int k) {
  Matrix m{format, n, k, {}, {}, {}, {}};
  if (!is_quantized(format)) {
    m.values = random.normals(size_t(n) * k);
    const ElementType type = format == WeightFormat::kF16 ? ElementType::kF16 : ElementType::kBF16;
    if (format != WeightFormat::kF32)
      for (float& x : m.values) x = round_to(type, x);
    return m;
  }
  const FormatInfo f = format_info(format);
  for (int i = 0; i < n * k; ++i) m.q.push_back(static_cast<uint8_t>(random.integer(0, (1 << f.bits) - 1)));
  for (int i = 0; i < n * m.groups(); ++i) {
    m.scale.push_back(round_to(scale_type(format), 0.01f * random.normal()));
    m.min.push_back(f.has_min ? round_to(scale_type(format), 0.1f * random.normal()) : 0.0f);
  }
  return m;
}

// The bytes of a matrix, each put where weights.h says it lies.
inline AlignedVector<uint8_t> pack(const Matrix& m) {
  const FormatInfo f = format_info(m.format);
  AlignedVector<uint8_t> out(packed_bytes(m.format, m.n, m.k));
  const auto put = [&](size_t offset, ElementType type, float value) {
    const AlignedVector<uint8_t> bytes = encode(type, {value});
    std::memcpy(out.data() + offset, bytes.data(), bytes.size());
  };
  for (int row = 0; row < m.n; ++row) {
    const size_t tile = row / kTileColumns * tile_bytes(m.format, m.k), column = row % kTileColumns;
    for (int feature = 0; feature < m.k; ++feature) {
      const size_t element = size_t(feature) * kTileColumns + column;
      if (m.format == WeightFormat::kF32) put(tile + element * 4, ElementType::kF32, m.weight(row, feature));
      if (m.format == WeightFormat::kF16) put(tile + element * 2, ElementType::kF16, m.weight(row, feature));
      if (m.format == WeightFormat::kBF16)
        put(tile + element * 2, ElementType::kBF16, m.weight(row, feature));
      if (!is_quantized(m.format)) continue;
      const size_t group = feature / f.group_size, in_group = feature % f.group_size;
      const size_t group_bytes = size_t(f.group_size) * kTileColumns * f.bits / 8;
      const size_t quants = tile + tile_header_bytes(m.format, m.k) + group * group_bytes;
      const uint8_t q = m.q[size_t(row) * m.k + feature];
      const size_t vector = in_group / 4, byte = 4 * column + in_group % 4;
      if (f.bits == 8)
        out[quants + 64 * vector + byte] = q;
      else
        out[quants + 64 * (vector % 4) + byte] |= static_cast<uint8_t>(vector < 4 ? q : q << 4);
    }
    if (!is_quantized(m.format)) continue;
    for (int group = 0; group < m.groups(); ++group) {
      const size_t at = (size_t(group) * kTileColumns + column) * f.scale_bytes;
      const size_t mins = size_t(m.groups()) * kTileColumns * f.scale_bytes;
      put(tile + at, scale_type(m.format), m.scale[size_t(row) * m.groups() + group]);
      if (f.has_min) put(tile + mins + at, scale_type(m.format), m.min[size_t(row) * m.groups() + group]);
    }
  }
  return out;
}

// --- Quantised rows ---

struct Rows {
  int num_rows, k, q_bytes;
  std::vector<int8_t> q;
  std::vector<float> scale, offsets;
  std::vector<int32_t> sums8, first_sums8, peak_chunks, peak_middles, peak_highs;

  Rows(int num_rows, int k, int q_bytes)
      : num_rows(num_rows),
        k(k),
        q_bytes(q_bytes),
        q((size_t(num_rows) * k / 32 + kRowBlock) * q_bytes),
        scale(size_t(num_rows) * k / 32 + kRowBlock),
        offsets(scale.size()),
        sums8(scale.size()),
        first_sums8(scale.size()),
        peak_chunks(scale.size()),
        peak_middles(scale.size()),
        peak_highs(scale.size()) {}
  QuantizedRows view() {
    return {q.data(), scale.data(), offsets.data(), sums8.data(), first_sums8.data(), peak_chunks.data(), peak_middles.data(), peak_highs.data(), k, num_rows, q_bytes};
  }
  size_t at(int row, int feature) const {
    const int block = row / 16, height = std::min(16, num_rows - 16 * block);
    return size_t(block) * 16 * (k / 32) + size_t(feature / 32) * height + row % 16;
  }
  int8_t& low(int row, int feature) { return q[at(row, feature) * q_bytes + feature % 32]; }
  // The whole integer of one value.
  int integer(int row, int feature) const {
    const size_t group = at(row, feature);
    const int place = feature % 32;
    const auto of_peak = [&](int32_t four) {
      return peak_chunks[group] == place / 4 ? static_cast<int8_t>(static_cast<uint32_t>(four) >> (8 * (place % 4))) : 0;
    };
    return q[group * q_bytes + place] + 16 * of_peak(peak_middles[group]) + 2048 * of_peak(peak_highs[group]);
  }
  // Makes a value the peak of its group, its integer low + 128 · high, and brings what is said of the group in line.
  void set_peak(int row, int feature, int high) {
    const size_t group = at(row, feature);
    const int place = feature % 32;
    const int top = static_cast<int>(std::floor((high + 8) / 16.0));
    peak_chunks[group] = place / 4;
    peak_middles[group] = static_cast<int32_t>(static_cast<uint32_t>(8 * (high - 16 * top) & 255) << (8 * (place % 4)));
    if (q_bytes > 32) {
      std::memset(&q[group * q_bytes + 32], 0, 32);
      std::memcpy(&q[group * q_bytes + 32 + place / 4 * 4], &peak_middles[group], 4);
    }
    peak_highs[group] = static_cast<int32_t>(static_cast<uint32_t>(top & 255) << (8 * (place % 4)));
    int sum = 0, first_sum = 0;
    for (int i = 0; i < 32; ++i) {
      const int n = integer(row, feature / 32 * 32 + i);
      sum += n;
      if (i < 16) first_sum += n;
    }
    sums8[group] = -8 * sum;
    first_sums8[group] = -8 * first_sum;
    offsets[group] = scale[group] * static_cast<float>(sum);
  }
};

// x [num_rows, k]; every value finite.
inline Rows quantize(const std::vector<float>& x, int num_rows, int k, int q_bytes) {
  Rows out(num_rows, k, q_bytes);
  for (int r = 0; r < num_rows; ++r) {
    for (int group = 0; group < k / 32; ++group) {
      const float* from = x.data() + size_t(r) * k + group * 32;
      int peak = 0;
      for (int i = 1; i < 32; ++i) {
        if (std::fabs(from[i]) > std::fabs(from[peak])) peak = i;
      }
      float second = 0;
      for (int i = 0; i < 32; ++i) {
        if (i != peak) second = std::fmax(second, std::fabs(from[i]));
      }
      float scale = std::fmax(second / 127, std::fabs(from[peak]) / 16319);
      if (scale < std::numeric_limits<float>::min()) scale = 0;
      out.scale[out.at(r, group * 32)] = scale;
      int high = 0;
      for (int i = 0; i < 32; ++i) {
        int n = scale == 0 ? 0 : static_cast<int>(std::nearbyint(from[i] * (1 / scale)));
        if (i == peak) {
          high = static_cast<int>(std::floor((n + 64) / 128.0));
          n -= 128 * high;
        }
        out.low(r, group * 32 + i) = static_cast<int8_t>(n);
      }
      out.set_peak(r, group * 32 + peak, high);
    }
  }
  return out;
}

// --- Running a test on every instruction set ---

class KernelTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels_ = *GetParam();
};

inline std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> out;
  for (const char* name : kInstructionSets) {
    if (const Kernels* k = kernels_by_name(name)) out.push_back(k);
  }
  return out;
}

inline std::string kernels_name(const testing::TestParamInfo<const Kernels*>& info) {
  return info.param->name;
}

#define MOTET_TEST_ALL_KERNELS(Suite)                                                            \
  INSTANTIATE_TEST_SUITE_P(Isa, Suite, testing::ValuesIn(motet::reference::available_kernels()), \
                           motet::reference::kernels_name)

// Equal bit by bit; a failure names the first place.
template <typename A, typename B>
void expect_same_bits(const A& actual, const B& expected, const std::string& what = "") {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(std::memcmp(&actual[i], &expected[i], sizeof(actual[i])), 0)
        << what << " at " << i << ": got " << +actual[i] << ", expected " << +expected[i];
  }
}

}  // namespace motet::reference
