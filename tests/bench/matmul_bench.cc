// What share of the memory's read rate does a product with one row reach, and what share of the int8 peak one
// with many?
//
//   matmul_bench [threads] [repetitions] [format]   default: 2 threads, 15 repetitions, all formats; MOTET_ISA chooses
//   the kernels
//
// Every line gives the best and the median of the repetitions. Both roofs are measured in the same run,
// because they move with whatever else the machine does.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace motet {
namespace {

int repetitions = 15;
std::atomic<uint64_t> sink;

struct Seconds {
  double best, median;
};

Seconds time_of(const std::function<void()>& function) {
  std::vector<double> all;
  for (int i = 0; i <= repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    function();
    if (i > 0) all.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(all.begin(), all.end());
  return {all.front(), all[all.size() / 2]};
}

// 64-byte aligned bytes filled with a pattern that is a number of ordinary size as f16, bf16 and f32 alike: some
// processors are slow with denormals.
struct Buffer {
  explicit Buffer(size_t size)
      : size(size), data(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64))) {
    for (size_t i = 0; i < size; ++i)
      data[i] = static_cast<uint8_t>((i * 2654435761u >> 24 & 0x0f) | 0x30);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  size_t size;
  uint8_t* data;
};

typedef uint64_t Words __attribute__((vector_size(64)));

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) void dot_products(int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
#define DOT(n) "vpdpbusd %%zmm16, %%zmm17, %%zmm" #n "\n\t"
    asm volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11) DOT(12)
                     DOT(13) DOT(14) DOT(15)::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                           "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef DOT
  }
}
#endif

double read_roof(ThreadPool& pool, const Buffer& buffer) {  // GB/s
  const int parts = pool.num_threads() * 16;
  const size_t words = buffer.size / sizeof(Words) / parts;
  const Seconds s = time_of([&] {
    pool.run(parts, [&](int part, int) {
      const Words* from = reinterpret_cast<const Words*>(buffer.data) + part * words;
      Words sum[4] = {};
      for (size_t i = 0; i + 4 <= words; i += 4) {
        for (int j = 0; j < 4; ++j) sum[j] += from[i + j];
      }
      sink += (sum[0] + sum[1] + sum[2] + sum[3])[0];
    });
  });
  std::printf("read                          %8.1f %8.1f GB/s\n", buffer.size / s.best / 1e9,
              buffer.size / s.median / 1e9);
  return buffer.size / s.best / 1e9;
}

double integer_roof([[maybe_unused]] ThreadPool& pool) {  // GOP/s; 0 where there is no such instruction
#if defined(__x86_64__)
  if (kernels_by_name("avx512") != nullptr) {
    constexpr int64_t kCount = 20000000;
    const Seconds s = time_of([&] { pool.run(pool.num_threads(), [](int, int) { dot_products(kCount); }); });
    const double ops = 128.0 * kCount * pool.num_threads() / 1e9;
    std::printf("vpdpbusd                      %8.0f %8.0f GOP/s\n", ops / s.best, ops / s.median);
    return ops / s.best;
  }
#endif
  return 0;
}

struct Case {
  const char* name;
  WeightFormat format;
};
constexpr Case kFormats[] = {{"int4", WeightFormat::kInt4},
                             {"int4_min", WeightFormat::kInt4Min},
                             {"int4_min_f32", WeightFormat::kInt4MinF32},
                             {"int8", WeightFormat::kInt8},
                             {"int8_group16", WeightFormat::kInt8Group16},
                             {"bf16", WeightFormat::kBF16}};

void product(ThreadPool& pool, const Case& c, const Buffer& weights, int n, int k, int rows, double read_gb,
             double peak_gop) {
  const PackedMatrix w{c.format, n, k, weights.data};
  const Buffer q((size_t(rows) * k / 32 + kRowBlock) * 64);  // aligned, as the device has it
  std::vector<float> scale(size_t(rows) * k / 32 + kRowBlock), offsets = scale, x(size_t(rows) * k), y(size_t(rows) * n);
  std::vector<int32_t> sums8(scale.size()), first_sums8 = sums8, peak_chunks = sums8, peak_middles = sums8, peak_highs = sums8;
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u >> 8 & 0xffff) - 32768;
  const QuantizedRows quantized{reinterpret_cast<int8_t*>(q.data), scale.data(), offsets.data(), sums8.data(), first_sums8.data(), peak_chunks.data(),
                                peak_middles.data(), peak_highs.data(), k, rows, kernels().q_bytes};
  kernels().quantize_rows(quantized, x.data(), k, 0, rows, 0, k / kActivationGroup);
  const int tiles = static_cast<int>(num_tiles(n)), per_task = std::max(2, tiles / (pool.num_threads() * 8));
  const Seconds s = time_of([&] {
    pool.run((tiles + per_task - 1) / per_task, [&](int task, int) {
      const int begin = task * per_task, end = std::min(begin + per_task, tiles);
      if (is_quantized(c.format))
        kernels().matmul_q(y.data(), n, w, quantized, begin, end, nullptr, 0);
      else
        kernels().matmul_f(y.data(), n, w, x.data(), k, rows, begin, end);
    });
  });
  const double gb = packed_bytes(c.format, n, k) / 1e9, gop = 2.0 * rows * n * k / 1e9;
  std::printf("%-12s rows %4d  %9.3f ms  %6.1f %6.1f GB/s (%3.0f %% of read)  %7.1f %7.1f GOP/s", c.name,
              rows, s.best * 1e3, gb / s.best, gb / s.median, 100 * gb / s.best / read_gb, gop / s.best,
              gop / s.median);
  if (peak_gop > 0 && is_quantized(c.format))
    std::printf(" (%3.0f %% of vpdpbusd)", 100 * gop / s.best / peak_gop);
  std::printf("\n");
}

}  // namespace
}  // namespace motet

int main(int argc, char** argv) {
  using namespace motet;
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  if (argc > 2) repetitions = std::atoi(argv[2]);
  ThreadPool pool(threads);
  const Buffer big(size_t{256} << 20);
  std::printf("%s, %d threads; best and median of %d\n", kernels().name, threads, repetitions);
  const double read_gb = read_roof(pool, big), peak_gop = integer_roof(pool);
  const auto is_wanted = [&](const Case& c) { return argc <= 3 || std::strcmp(argv[3], c.name) == 0; };
  std::printf("weights far larger than the caches, k 2048:\n");
  for (const Case& c : kFormats) {
    if (!is_wanted(c)) continue;
    const int n = static_cast<int>((size_t{128} << 20) / packed_bytes(c.format, 16, 2048)) * 16;
    for (int rows : {1, 2, 4, 6, 8, 12, 15, 16, 24, 32}) product(pool, c, big, n, 2048, rows, read_gb, peak_gop);
  }
  std::printf("weights of 2048 x 2048:\n");
  for (const Case& c : kFormats) {
    if (!is_wanted(c)) continue;
    for (int rows : {8, 32, 128, 512}) product(pool, c, big, 2048, 2048, rows, read_gb, peak_gop);
  }
}
