// How fast is attention? Decode: bytes of KV read per second, over many sequences at long contexts, where memory
// bounds it. Prefill: arithmetic per second, where the multiply-adds bound it. And one sampled token's time.
// Median wall time and the middle 80 %; as many threads as argv[1] says (default 1). f16 KV, pages in random order.
//
//   g++ -std=c++20 -O2 -I native/src tests/bench/attention_bench.cc native/build/libmotet_core.a -pthread -o attention_bench
//   ./attention_bench [threads]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "kernels/kernels.h"

namespace motet {
namespace {

struct Model {
  const char* name;
  int num_heads, num_kv_heads, head_dim;
};
constexpr Model kModels[] = {{"SmolLM2-135M", 9, 3, 64}, {"Llama-3.1-8B", 32, 8, 128}, {"Gemma-3-1B", 4, 1, 256},
                             {"one head per KV head", 8, 8, 64}};

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

void in_parallel(int num_threads, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads; ++t) threads.emplace_back(work, t);
  work(0);
  for (std::thread& t : threads) t.join();
}

struct Unmap {
  size_t num_bytes;
  void operator()(uint8_t* address) const { munmap(address, num_bytes); }
};

// In huge pages, as the device's arena.
std::unique_ptr<uint8_t[], Unmap> arena_of(size_t num_bytes) {
  void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  madvise(address, num_bytes, MADV_HUGEPAGE);
  return {static_cast<uint8_t*>(address), Unmap{num_bytes}};
}

void bench(const Kernels& kernels, const Model& m, int num_sequences, int context, int num_rows, int num_threads) {
  const size_t side = static_cast<size_t>(m.num_kv_heads) * m.head_dim * kBlockTokens * 2;
  const int blocks_per_sequence = (context + kBlockTokens - 1) / kBlockTokens;
  const int num_pages = num_sequences * blocks_per_sequence;
  const std::unique_ptr<uint8_t[], Unmap> arena = arena_of(num_pages * 2 * side);
  std::vector<int32_t> pages(num_pages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(1));
  const KvLayer kv = {.arena = arena.get(), .page_bytes = 2 * side, .k_offset = 0, .v_offset = side,
                      .type = ElementType::kF16, .num_kv_heads = m.num_kv_heads, .head_dim = m.head_dim};
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> row(m.num_kv_heads * m.head_dim), other(row.size());
  for (int i = 0; i < num_pages * kBlockTokens; ++i) {
    for (size_t j = 0; j < row.size(); ++j) row[j] = static_cast<float>(random() % 2000) / 1000 - 1;
    kernels.kv_write(kv, i / kBlockTokens, i % kBlockTokens, row.data(), row.data());
  }
  const int width = m.num_heads * m.head_dim, heads_per_kv = m.num_heads / m.num_kv_heads;
  std::vector<float> q(static_cast<size_t>(num_sequences) * num_rows * width), out(q.size());
  for (float& v : q) v = normal(random);

  const auto work = [&](int thread) {
    std::vector<float> scratch(attention_scratch_floats(heads_per_kv, m.head_dim));
    for (int job = thread; job < num_sequences * m.num_kv_heads; job += num_threads) {
      const int sequence = job / m.num_kv_heads, kv_head = job % m.num_kv_heads;
      const size_t at = static_cast<size_t>(sequence) * num_rows * width + kv_head * heads_per_kv * m.head_dim;
      kernels.attention(kv, {.q = &q[at], .ldq = width, .out = &out[at], .ldo = width, .num_rows = num_rows,
                             .first_position = context - num_rows, .heads_per_kv = heads_per_kv, .kv_head = kv_head,
                             .blocks = &pages[sequence * blocks_per_sequence], .window = 0,
                             .scale = 1 / std::sqrt(static_cast<float>(m.head_dim)), .scratch = scratch.data()});
    }
  };
  const Spread s = time_of([&] { in_parallel(num_threads, work); });
  const double keys_seen = num_rows * (context - (num_rows - 1) / 2.0) * num_sequences;
  const double flops = keys_seen * width * 4;
  const double bytes = static_cast<double>(num_sequences) * context * m.num_kv_heads * m.head_dim * 4;
  std::printf("%-7s %-21s %3d sequences, context %5d, %4d rows each: %9.3f ms (%.3f to %.3f)  %7.1f GFLOP/s",
              kernels.name, m.name, num_sequences, context, num_rows, s.median * 1e3, s.low * 1e3, s.high * 1e3,
              flops / s.median * 1e-9);
  std::printf(num_rows == 1 ? "  %6.2f GB/s of KV\n" : "\n", bytes / s.median * 1e-9);
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

int main(int argc, char** argv) {
  using namespace motet;
  const int num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  for (const char* isa : {"avx512", "avx2"}) {
    const Kernels* kernels = kernels_by_name(isa);
    if (kernels == nullptr) continue;
    for (const Model& m : kModels) {
      for (const int context : {1024, 4096}) bench(*kernels, m, 32, context, 1, num_threads);
      bench(*kernels, m, 1, 512, 512, num_threads);
      bench(*kernels, m, 1, 4096, 512, num_threads);
    }
    for (const int vocab : {49152, 262144}) {
      bench_sample(*kernels, vocab, 0, 1, 0);
      bench_sample(*kernels, vocab, 50, 1, 0);
      bench_sample(*kernels, vocab, 0, 0.95f, 0);
      bench_sample(*kernels, vocab, 40, 0.9f, 20);
    }
  }
  return 0;
}
