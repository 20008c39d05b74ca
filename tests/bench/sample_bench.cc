// How long does the sampling of one token take? Median and the middle 80 %, one thread.
//
//   native/build/sample_bench
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "kernels/kernels.h"

namespace motet {
namespace {

struct Spread {
  double median, low, high;
};

// Seconds of `work`, over runs for about half a second.
Spread time_of(const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  work();
  const auto start = Clock::now();
  while (seconds.size() < 5 || Clock::now() - start < std::chrono::milliseconds(500)) {
    const auto begin = Clock::now();
    work();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds[seconds.size() / 10], seconds[seconds.size() * 9 / 10]};
}

void bench_sample(const Kernels& kernels, int vocab, int top_k, float top_p, int num_top) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(vocab), work(vocab);
  for (float& l : logits) l = normal(random);
  for (int i = 0; i < 20; ++i) logits[random() % vocab] += 8;
  std::vector<uint64_t> scratch(vocab);
  std::vector<int32_t> top_ids(num_top + 1);
  std::vector<float> top_logprobs(num_top + 1);
  SampleParams p = {};
  p.temperature = 0.8f;
  p.top_k = top_k;
  p.top_p = top_p;
  p.repetition_penalty = 1;
  p.num_top = num_top;
  const Spread s = time_of([&] {
    work = logits;
    ++p.position;
    kernels.sample(work.data(), vocab, p, top_ids.data(), top_logprobs.data(), scratch.data());
  });
  std::printf("%-7s sample of %6d, top_k %3d, top_p %.2f, %2d likeliest: %7.1f us (%.1f to %.1f)\n", kernels.name,
              vocab, top_k, top_p, num_top, s.median * 1e6, s.low * 1e6, s.high * 1e6);
}

}  // namespace
}  // namespace motet

int main() {
  using namespace motet;
  for (const char* isa : {"avx512", "avx2"}) {
    const Kernels* kernels = kernels_by_name(isa);
    if (kernels == nullptr) continue;
    for (const int vocab : {49152, 262144}) {
      bench_sample(*kernels, vocab, 0, 1, 0);
      bench_sample(*kernels, vocab, 50, 1, 0);
      bench_sample(*kernels, vocab, 0, 0.95f, 0);
      bench_sample(*kernels, vocab, 40, 0.9f, 20);
    }
  }
  return 0;
}
