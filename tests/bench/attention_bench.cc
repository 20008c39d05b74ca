// How fast is the attention of one layer, as a step calls it? Decode: bytes of KV read per second, which memory bounds.
// Prefill: arithmetic per second, which the multiply-adds bound. And decode over a prefix that all sequences share,
// against the same with copies of it. Median wall time and the middle 80 %. Pages lie in random order.
//
//   native/build/attention_bench [threads (0: all)] [decode|prefill|shared|all] [model]    MOTET_ISA chooses the instruction set
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "device.h"

namespace motet {
namespace {

struct Shape {
  const char* name;
  int num_heads, num_kv_heads, head_dim;
};
constexpr Shape kModels[] = {{"SmolLM2-135M", 9, 3, 64}, {"Qwen2.5-0.5B", 14, 2, 64}, {"Llama-3.2-1B", 32, 8, 64}};

struct Spread {
  double median, low, high;
};

// Seconds of `work`, over runs for about 0.1 s.
Spread time_of(const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  work();
  const auto start = Clock::now();
  while (seconds.size() < 5 || Clock::now() - start < std::chrono::milliseconds(100)) {
    const auto begin = Clock::now();
    work();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds[seconds.size() / 10], seconds[seconds.size() * 9 / 10]};
}

// Multiply-adds of one thread in registers, in GFLOP/s: twelve chains, which outlast the latency.
#if defined(__x86_64__)
template <typename Vector>
__attribute__((target("avx512f,avx2,fma"), noinline)) void multiply_add(int64_t rounds) {
  Vector a[12] = {}, factor = {};
  for (int64_t i = 0; i < rounds; ++i)
    asm volatile(
        "vfmadd231ps %12, %12, %0\n vfmadd231ps %12, %12, %1\n vfmadd231ps %12, %12, %2\n vfmadd231ps %12, %12, %3\n"
        "vfmadd231ps %12, %12, %4\n vfmadd231ps %12, %12, %5\n vfmadd231ps %12, %12, %6\n vfmadd231ps %12, %12, %7\n"
        "vfmadd231ps %12, %12, %8\n vfmadd231ps %12, %12, %9\n vfmadd231ps %12, %12, %10\n vfmadd231ps %12, %12, %11"
        : "+x"(a[0]), "+x"(a[1]), "+x"(a[2]), "+x"(a[3]), "+x"(a[4]), "+x"(a[5]), "+x"(a[6]), "+x"(a[7]), "+x"(a[8]),
          "+x"(a[9]), "+x"(a[10]), "+x"(a[11])
        : "x"(factor));
}
template <typename Vector>
double gflops_of() {
  constexpr int64_t kRounds = 1 << 20;
  return 2.0 * 12 * kRounds * (sizeof(Vector) / 4) / time_of([] { multiply_add<Vector>(kRounds); }).median * 1e-9;
}
double peak_gflops() {
  using Narrow __attribute__((vector_size(32))) = float;
  using Wide __attribute__((vector_size(64))) = float;
  return std::string(kernels().name) == "avx512" ? gflops_of<Wide>() : gflops_of<Narrow>();
}
#else
double peak_gflops() { return NAN; }
#endif

const char* name_of(KvType type) { return type == KvType::kInt8 ? "int8" : type == KvType::kF16 ? "f16" : "f32"; }

struct Case {
  Shape model;
  int num_sequences, context, num_rows;  // rows: the last of the context
  int shared_tokens;                     // that all sequences begin with, in the same pages
  KvType type;
};

class Bench {
 public:
  explicit Bench(int num_threads) : num_threads_(num_threads) {}

  Spread run(const Case& c) {
    const Shape& m = c.model;
    const size_t side = kv_side_bytes(c.type, m.num_kv_heads, m.head_dim), page_bytes = (2 * side + 63) / 64 * 64;
    const int blocks_each = (c.context + kBlockTokens - 1) / kBlockTokens, shared = c.shared_tokens / kBlockTokens;
    const int num_pages = shared + c.num_sequences * (blocks_each - shared);
    const auto device = make_cpu_device(num_pages * page_bytes, num_threads_, false);
    const KvLayer kv{device->arena(), page_bytes, 0, side, c.type, m.num_kv_heads, m.head_dim};
    std::mt19937 random(2);
    std::vector<float> row(m.num_kv_heads * m.head_dim);
    for (int t = 0; t < kBlockTokens; ++t) {
      for (float& v : row) v = static_cast<float>(random() % 2000) / 1000 - 1;
      kernels().kv_write(kv, 0, t, row.data(), row.data());
    }
    for (int p = 1; p < num_pages; ++p) std::memcpy(kv.arena + p * page_bytes, kv.arena, page_bytes);

    std::vector<int32_t> pages(num_pages);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(1));
    std::vector<int32_t> starts{0}, block_starts{0}, blocks, positions;
    for (int s = 0; s < c.num_sequences; ++s) {
      for (int r = 0; r < c.num_rows; ++r) positions.push_back(c.context - c.num_rows + r);
      starts.push_back(static_cast<int>(positions.size()));
      for (int b = 0; b < blocks_each; ++b) blocks.push_back(pages[b < shared ? b : shared + s * (blocks_each - shared) + b - shared]);
      block_starts.push_back(static_cast<int>(blocks.size()));
    }
    const std::vector<int32_t> tokens(positions.size());
    Batch batch;
    batch.token_ids = tokens;
    batch.positions = positions;
    batch.sequence_starts = starts;
    batch.block_starts = block_starts;
    batch.block_ids = blocks;

    const int width = m.num_heads * m.head_dim;
    std::vector<float> q(positions.size() * width), out(q.size());
    std::normal_distribution<float> normal;
    for (float& v : q) v = normal(random);
    device->begin(batch, num_pages);
    return time_of([&] {
      device->attention(kv, batch, q.data(), width, out.data(), width, m.num_heads, 0, 1 / std::sqrt(static_cast<float>(m.head_dim)));
    });
  }

  void print(const Case& c, double peak) {
    const Shape& m = c.model;
    const Spread s = run(c);
    const double seen = c.num_rows * (c.context - (c.num_rows - 1) / 2.0) * c.num_sequences;
    const double gflops = seen * m.num_heads * m.head_dim * 4 / s.median * 1e-9;
    const double bytes = 2.0 * c.num_sequences * c.context / kBlockTokens * kv_side_bytes(c.type, m.num_kv_heads, m.head_dim);
    std::printf("%-12s %-4s %2d sequences, context %5d, %4d rows each", m.name, name_of(c.type), c.num_sequences, c.context, c.num_rows);
    if (c.shared_tokens) std::printf(", %d shared", c.shared_tokens);
    std::printf(": %9.3f ms (%.3f to %.3f) %7.1f GFLOP/s", s.median * 1e3, s.low * 1e3, s.high * 1e3, gflops);
    if (c.num_rows > 1) std::printf(" %3.0f %% of peak\n", 100 * gflops / peak);
    else if (c.shared_tokens) std::printf("\n");
    else std::printf(" %6.2f GB/s of KV\n", bytes / s.median * 1e-9);
    std::fflush(stdout);
  }

 private:
  int num_threads_;
};

}  // namespace
}  // namespace motet

int main(int argc, char** argv) {
  using namespace motet;
  const int asked = argc > 1 ? std::atoi(argv[1]) : 0, num_threads = asked > 0 ? asked : available_cpus();
  const std::string what = argc > 2 ? argv[2] : "all", model = argc > 3 ? argv[3] : "";
  const double peak = num_threads * peak_gflops();
  std::printf("%s, %d threads, f32 multiply-add peak %.0f GFLOP/s\n", kernels().name, num_threads, peak);
  Bench bench(num_threads);
  for (const Shape& m : kModels) {
    if (std::string(m.name).find(model) == std::string::npos) continue;
    for (const KvType type : {KvType::kF16, KvType::kInt8}) {
      if (what == "all" || what == "decode")
        for (const int sequences : {1, 8, 32})
          for (const int context : {128, 2048, 8192}) bench.print({m, sequences, context, 1, 0, type}, peak);
      if (what == "all" || what == "prefill")
        for (const int context : {512, 4096}) bench.print({m, 1, context, 512, 0, type}, peak);
      if (what == "all" || what == "shared")
        for (const int shared : {0, 2048}) bench.print({m, 32, 2048 + 64, 1, shared, type}, peak);
    }
  }
  return 0;
}
