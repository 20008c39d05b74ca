// How fast this machine reads memory: the roof of decode, which reads every weight once per step.
//
//   read_bandwidth_bench [MiB] [threads] [runs]      default: 2048 MiB, one thread per usable CPU, 5 runs
//
// Reads an array of that size again and again, each thread its own share, in several patterns: 1 to 8
// streams, with and without prefetch, on huge pages where the kernel grants them. The fastest pattern is the
// roof, and its median run the figure, as steps are told by their median. The size matters: a model that fits
// into the last-level cache has that cache's roof, so ask with the bytes that a step reads. Prints one JSON
// object: {"threads", "bytes", "gigabytesPerSecond": the median run of the fastest pattern, "best": that
// pattern's best run, "streams", "prefetchBytes", "smallPages": the figure on pages of 4 KiB}.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device.h"
#include "thread_pool.h"

namespace {

typedef uint64_t Line __attribute__((vector_size(64)));

constexpr size_t kLineBytes = sizeof(Line);
constexpr size_t kSlackBytes = 1 << 16;  // prefetches past the end stay inside the mapping

// Sums num_bytes at begin as kStreams streams that are num_bytes / kStreams apart, two lines of each a turn.
#if defined(__x86_64__)
#define MOTET_READ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOTET_READ_CLONES
#endif
#define MOTET_READ(kStreams)                                                                \
  MOTET_READ_CLONES uint64_t read_##kStreams(const uint8_t* begin, size_t num_bytes,        \
                                             size_t prefetch_bytes) {                       \
    const size_t stream_bytes = num_bytes / kStreams / (2 * kLineBytes) * (2 * kLineBytes); \
    Line sum[kStreams][2] = {};                                                             \
    for (size_t i = 0; i < stream_bytes; i += 2 * kLineBytes) {                             \
      for (int s = 0; s < kStreams; ++s) {                                                  \
        const uint8_t* p = begin + s * stream_bytes + i;                                    \
        if (prefetch_bytes > 0) {                                                           \
          __builtin_prefetch(p + prefetch_bytes);                                           \
          __builtin_prefetch(p + prefetch_bytes + kLineBytes);                              \
        }                                                                                   \
        sum[s][0] += reinterpret_cast<const Line*>(p)[0];                                   \
        sum[s][1] += reinterpret_cast<const Line*>(p)[1];                                   \
      }                                                                                     \
    }                                                                                       \
    Line all = {};                                                                          \
    for (int s = 0; s < kStreams; ++s) all += sum[s][0] + sum[s][1];                        \
    uint64_t total = 0;                                                                     \
    for (int i = 0; i < 8; ++i) total += all[i];                                            \
    return total;                                                                           \
  }
MOTET_READ(1)
MOTET_READ(2)
MOTET_READ(4)
MOTET_READ(8)

struct Pattern {
  int streams;
  size_t prefetch_bytes;
  uint64_t (*read)(const uint8_t* begin, size_t num_bytes, size_t prefetch_bytes);
};
constexpr Pattern kPatterns[] = {{1, 0, read_1},    {1, 2048, read_1}, {2, 2048, read_2}, {4, 0, read_4},
                                 {4, 1024, read_4}, {4, 2048, read_4}, {8, 0, read_8},    {8, 1024, read_8}};

struct Rate {
  double median = 0, best = 0;
  Pattern pattern = kPatterns[0];
};

uint64_t check = 0;

Rate measure(motet::ThreadPool& pool, const uint8_t* data, size_t num_bytes, int runs) {
  const int threads = pool.num_threads();
  const size_t share = num_bytes / threads / 4096 * 4096;
  std::vector<uint64_t> sums(threads);
  Rate fastest;
  for (const Pattern& pattern : kPatterns) {
    std::vector<double> rates;
    for (int run = 0; run < runs; ++run) {
      const auto start = std::chrono::steady_clock::now();
      pool.run(threads, [&](int task, int) {
        sums[task] = pattern.read(data + task * share, share, pattern.prefetch_bytes);
      });
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      rates.push_back(static_cast<double>(share) * threads / seconds.count() / 1e9);
      for (const uint64_t sum : sums) check += sum;
    }
    std::sort(rates.begin(), rates.end());
    const double median = rates[rates.size() / 2];
    if (median > fastest.median) fastest = {median, rates.back(), pattern};
  }
  return fastest;
}

uint8_t* map(size_t num_bytes, int advice) {
  void* const address =
      mmap(nullptr, num_bytes + kSlackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) {
    std::fprintf(stderr, "read_bandwidth_bench: expected %zu bytes of memory, got none\n", num_bytes);
    std::exit(1);
  }
  madvise(address, num_bytes + kSlackBytes, advice);
  std::fill_n(static_cast<uint8_t*>(address), num_bytes + kSlackBytes, uint8_t{1});
  return static_cast<uint8_t*>(address);
}

}  // namespace

int main(int argc, char** argv) {
  const size_t num_bytes = (argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 2048) << 20;
  const int threads = argc > 2 ? std::atoi(argv[2]) : motet::available_cpus();
  const int runs = argc > 3 ? std::atoi(argv[3]) : 5;
  if (num_bytes == 0 || threads < 1 || runs < 1) {
    std::fprintf(stderr, "usage: read_bandwidth_bench [MiB >= 1] [threads >= 1] [runs >= 1]\n");
    return 2;
  }
  motet::ThreadPool pool(threads);
  uint8_t* const huge = map(num_bytes, MADV_HUGEPAGE);
  const Rate rate = measure(pool, huge, num_bytes, runs);
  munmap(huge, num_bytes + kSlackBytes);
  const Rate small = measure(pool, map(num_bytes, MADV_NOHUGEPAGE), num_bytes, runs);
  const Rate& roof = rate.median > small.median ? rate : small;
  std::printf(
      "{\"threads\": %d, \"bytes\": %zu, \"gigabytesPerSecond\": %.1f, \"best\": %.1f, \"streams\": %d, "
      "\"prefetchBytes\": %zu, \"smallPages\": %.1f, \"check\": %llu}\n",
      threads, num_bytes, roof.median, roof.best, roof.pattern.streams, roof.pattern.prefetch_bytes,
      small.median, static_cast<unsigned long long>(check & 1));
}
