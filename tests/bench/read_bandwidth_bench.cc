// How fast this machine reads memory: the roof of decode, which reads every weight once per step.
// Each thread sums its share of an array far larger than any cache, four streams at a time with prefetch.
// Prints one JSON object: {"threads": n, "gigabytesPerSecond": best of the runs}.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device.h"
#include "thread_pool.h"

namespace {

constexpr size_t kBytes = size_t{512} << 20;
constexpr int kRuns = 9;
constexpr size_t kPrefetchBytes = 2048;

typedef uint64_t Lanes __attribute__((vector_size(64)));

uint64_t read_share(const uint8_t* begin, size_t num_bytes) {
  const size_t quarter = num_bytes / 4;
  Lanes sum[4] = {};
  for (size_t i = 0; i < quarter; i += 64) {
    for (int s = 0; s < 4; ++s) {
      const uint8_t* p = begin + s * quarter + i;
      __builtin_prefetch(p + kPrefetchBytes);
      sum[s] += *reinterpret_cast<const Lanes*>(p);
    }
  }
  const Lanes all = sum[0] + sum[1] + sum[2] + sum[3];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += all[i];
  return total;
}

}  // namespace

int main() {
  motet::ThreadPool pool(motet::available_cpus());
  auto* const data = static_cast<uint8_t*>(std::aligned_alloc(4096, kBytes + kPrefetchBytes));
  std::fill(data, data + kBytes, uint8_t{1});
  const size_t share = kBytes / pool.num_threads() / 256 * 256;
  std::vector<uint64_t> sums(pool.num_threads());
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(pool.num_threads(), [&](int task, int) { sums[task] = read_share(data + task * share, share); });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  uint64_t total = 0;
  for (const uint64_t s : sums) total += s;
  std::printf("{\"threads\": %d, \"gigabytesPerSecond\": %.1f, \"check\": %llu}\n", pool.num_threads(),
              static_cast<double>(share) * pool.num_threads() / best / 1e9, static_cast<unsigned long long>(total & 1));
}
