// What do adapters cost?
//
//   lora_bench kernels [bf16|int8]                            how fast shrink and expand read adapters, by
//   rank lora_bench steps [rounds] [batch,batch,...] [bf16|int8] [more]     what they add to a step
//
// Shapes are those of Qwen2.5-0.5B, weights are random. Where every row has another adapter, what decides is
// how fast adapters' bytes come from memory, so every figure stands beside the rate that this machine reads
// at, measured in the same run.
//
// "steps" decodes without adapters, with another adapter in every row, and with an adapter in one row only,
// and prefills one prompt; "more" adds ranks 4, 64 and 128. Variants are interleaved step by step. A tax is
// the time that adapters add to a step; beside it stands how often the time that their bytes take at the read
// rate fits into it. All times are given as median and least: the least is what a busy machine disturbs less.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "model.h"
#include "thread_pool.h"

namespace motet {
namespace {

constexpr int kLayers = 24, kHidden = 896, kInter = 4864, kHeads = 14, kKvHeads = 2, kHeadDim = 64,
              kVocab = 151936;
constexpr int kContext = 128, kMaxBatch = 32, kPrefill = 512;
constexpr int kShapes[kNumLayerTargets][2] = {{kHeads * kHeadDim, kHidden},
                                              {kKvHeads * kHeadDim, kHidden},
                                              {kKvHeads * kHeadDim, kHidden},
                                              {kHidden, kHeads* kHeadDim},
                                              {kInter, kHidden},
                                              {kInter, kHidden},
                                              {kHidden, kInter}};

int rounds = 15;

struct Spread {
  double low, median, high;
};
Spread spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values.front(), values[values.size() / 2], values.back()};
}

double seconds_of(const std::function<void()>& function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

uint32_t random_state = 1;
uint32_t random_bits() { return (random_state = random_state * 1664525 + 1013904223) >> 8; }

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::vector<uint8_t>& bytes) {
    const int fd = mkstemp(path_);
    size_t done = 0;
    while (fd >= 0 && done < bytes.size()) {
      const ssize_t wrote = write(fd, bytes.data() + done, bytes.size() - done);
      if (wrote <= 0) break;
      done += static_cast<size_t>(wrote);
    }
    if (fd < 0 || done < bytes.size()) std::perror(path_), std::exit(1);
    close(fd);
  }
  ~TemporaryFile() { unlink(path_); }
  const char* path() const { return path_; }

 private:
  char path_[32] = "/tmp/motet-lora-bench-XXXXXX";
};

// Random weights: int4 in the layers, int8 for the embedding that is the head too.
std::unique_ptr<Model> random_model(bool int8_adapters) {
  std::vector<uint8_t> bytes;
  std::vector<PackedTensorSpec> tensors;
  const auto matrix = [&](const char* role, int layer, WeightFormat format, int n, int k) {
    const size_t size = packed_bytes(format, n, k), one = tile_bytes(format, k),
                 header = tile_header_bytes(format, k);
    const size_t offset = (bytes.size() + 63) / 64 * 64;
    bytes.resize(offset + size);
    for (size_t i = 0; i + 4 <= size; i += 4) {
      const uint32_t word =
          i % one < header ? 0x18001800 : random_bits() << 8 ^ random_bits();  // scales of 0.002
      std::memcpy(&bytes[offset + i], &word, 4);
    }
    tensors.push_back(
        {role, layer, false, format, n, k, static_cast<int64_t>(offset), static_cast<int64_t>(size)});
  };
  const auto vector = [&](const char* role, int layer, int n) {
    const size_t offset = (bytes.size() + 63) / 64 * 64;
    bytes.resize(offset + size_t(n) * 4);
    for (int i = 0; i < n; ++i) {
      const float one = 1;
      std::memcpy(&bytes[offset + size_t(i) * 4], &one, 4);
    }
    tensors.push_back(
        {role, layer, true, WeightFormat::kF32, 1, n, static_cast<int64_t>(offset), int64_t{n} * 4});
  };
  matrix("embedding", -1, WeightFormat::kInt8, kVocab, kHidden);
  vector("final_norm", -1, kHidden);
  for (int l = 0; l < kLayers; ++l) {
    for (int t = 0; t < kNumLayerTargets; ++t)
      matrix(target_name(static_cast<Target>(t)), l, WeightFormat::kInt4, kShapes[t][0], kShapes[t][1]);
    vector("attention_norm", l, kHidden);
    vector("mlp_norm", l, kHidden);
    vector("q_bias", l, kHeads * kHeadDim);
    vector("k_bias", l, kKvHeads * kHeadDim);
    vector("v_bias", l, kKvHeads * kHeadDim);
  }
  ModelDims dims{kLayers, kHidden, kInter, kHeads, kKvHeads, kHeadDim, kVocab,   32768,
                 1e-6f,   0.125f,  1,      false,  {},       {},       {{{}, 1}}};
  dims.sliding_windows.assign(kLayers, 0);
  dims.rope_table_index.assign(kLayers, 0);
  dims.rope_tables[0].inverse_frequencies.assign(kHeadDim / 2, 0.01f);
  const TemporaryFile file(bytes);
  return std::make_unique<Model>(file.path(), dims, tensors, false, KvType::kF16, size_t{3} << 30, 0,
                                 int8_adapters);
}

// What the adapters of a variant are: bf16, one for each row.
struct Voice {
  const char* name;
  int rank;
  std::vector<int> targets;
  int rows_with_adapter = kMaxBatch;  // the others are the base's
  std::vector<std::shared_ptr<Adapter>> adapters = {};
  size_t bytes = 0;  // of one
};
const std::vector<int> kQV = {0, 2}, kAll = {0, 1, 2, 3, 4, 5, 6};

void load(const Model& model, Voice& voice, int32_t& page) {
  std::vector<AdapterModuleSpec> specs;
  std::vector<uint8_t> bytes;
  for (int l = 0; l < kLayers; ++l) {
    for (const int t : voice.targets) {
      const auto put = [&](int64_t count) {
        const auto offset = static_cast<int64_t>(bytes.size());
        bytes.resize(bytes.size() + static_cast<size_t>(count) * 2);
        for (int64_t i = 0; i < count; ++i) {  // magnitudes of 2^-7 to 2^-6
          const auto bits = static_cast<uint16_t>((random_bits() & 0x807f) | 120 << 7);
          std::memcpy(&bytes[static_cast<size_t>(offset + i * 2)], &bits, 2);
        }
        return offset;
      };
      const int64_t a = put(int64_t{voice.rank} * kShapes[t][1]),
                    b = put(int64_t{voice.rank} * kShapes[t][0]);
      specs.push_back({l, static_cast<Target>(t), voice.rank, 1, ElementType::kBF16, a, b, -1, -1,
                       ElementType::kF32, ElementType::kF32});
    }
  }
  voice.bytes = bytes.size() / (model.has_int8_adapters() ? 2 : 1);
  const TemporaryFile file(bytes);
  const int64_t num_pages = adapter_size(model, specs).num_pages;
  for (int i = 0; i < std::min(voice.rows_with_adapter, kMaxBatch); ++i) {
    std::vector<int32_t> pages;
    for (int64_t n = 0; n < num_pages; ++n) pages.push_back(page++);
    voice.adapters.push_back(load_adapter(model, file.path(), specs, pages));
  }
}

// A step of `num_sequences` sequences of `rows` tokens each, at positions from `first` on.
class Step {
 public:
  Step(const Voice& voice, int num_sequences, int rows, int first) {
    const int blocks = (first + rows - 1) / kBlockTokens + 1;
    for (int s = 0; s < num_sequences; ++s) {
      for (int i = 0; i < rows; ++i) {
        tokens_.push_back(static_cast<int32_t>(random_bits() % kVocab));
        positions_.push_back(first + i);
      }
      starts_.push_back(static_cast<int32_t>(tokens_.size()));
      for (int i = 0; i < blocks; ++i) blocks_.push_back(s * blocks + i);
      block_starts_.push_back(static_cast<int32_t>(blocks_.size()));
      if (s < static_cast<int>(voice.adapters.size())) {
        handles_.push_back(s);
        weights_.push_back(1);
        adapters_.push_back(voice.adapters[s].get());
      }
      adapter_starts_.push_back(static_cast<int32_t>(handles_.size()));
      rows_.push_back(static_cast<int32_t>(tokens_.size()) - 1);
    }
    const size_t n = rows_.size();
    zeros_.assign(n, 0), ones_.assign(n, 1), none_.assign(n, 0), no_starts_.assign(n + 1, 0),
        seeds_.assign(n, 0);
    batch_.token_ids = tokens_, batch_.positions = positions_, batch_.sequence_starts = starts_;
    batch_.block_starts = block_starts_, batch_.block_ids = blocks_;
    batch_.adapter_starts = adapter_starts_, batch_.adapter_handles = handles_,
    batch_.adapter_weights = weights_;
    batch_.sample_rows = rows_, batch_.temperature = zeros_, batch_.top_p = ones_, batch_.min_p = zeros_;
    batch_.repetition_penalty = ones_, batch_.presence_penalty = zeros_, batch_.frequency_penalty = zeros_;
    batch_.top_k = none_, batch_.num_top = none_, batch_.seeds = seeds_, batch_.bias_starts = no_starts_;
    batch_.history_starts = no_starts_, batch_.history_prompt_counts = none_;
  }
  Step(const Step&) = delete;

  void run(Model& model) { model.step(batch_, adapters_, output_); }

 private:
  std::vector<int32_t> tokens_, positions_, starts_{0}, block_starts_{0}, blocks_, adapter_starts_{0},
      handles_, rows_, none_, no_starts_;
  std::vector<float> weights_, zeros_, ones_;
  std::vector<uint64_t> seeds_;
  std::vector<const Adapter*> adapters_;
  Batch batch_;
  StepOutput output_;
};

double read_rate() {  // GB/s, the best of some runs
  constexpr size_t kBytes = size_t{512} << 20;
  typedef uint64_t Lanes __attribute__((vector_size(64)));
  static auto* const data = static_cast<uint8_t*>(std::aligned_alloc(4096, kBytes + 4096));
  static ThreadPool pool(available_cpus());
  static const bool filled = (std::memset(data, 1, kBytes), true);
  static_cast<void>(filled);
  const size_t share = kBytes / pool.num_threads() / 1024 * 1024;
  static std::vector<Lanes> sums(pool.num_threads());
  double best = 1e9;
  for (int run = 0; run < 5; ++run) {
    best = std::min(best, seconds_of([&] {
                      pool.run(pool.num_threads(), [&](int task, int) {
                        Lanes sum[4] = {};
                        const size_t quarter = share / 4;
                        for (size_t i = 0; i < quarter; i += 64) {
                          for (int s = 0; s < 4; ++s) {
                            const uint8_t* p = data + task * share + s * quarter + i;
                            __builtin_prefetch(p + 2048);
                            sum[s] += *reinterpret_cast<const Lanes*>(p);
                          }
                        }
                        sums[task] = sum[0] + sum[1] + sum[2] + sum[3];
                      });
                    }));
  }
  return static_cast<double>(share) * pool.num_threads() / best / 1e9;
}

// Memory in huge pages where the system has them, as the device arena is.
uint8_t* reserve(size_t num_bytes) {
  void* p = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) std::perror("mmap"), std::exit(1);
  madvise(p, num_bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(p);
}

// Adapters of one rank in a given number of bytes, one row each: x and y of every row, and the modules.
class Adapters {
 public:
  Adapters(uint8_t* memory, size_t num_bytes, LoraFormat format, int rank) {
    size_t used = 0;
    const auto place = [&](size_t bytes) { return used += bytes, memory + used - bytes; };
    size_t a = 0, b = 0;
    for (const auto& [n, k] : kShapes) {
      a += lora_a_row_bytes(format, k) * rank;
      b += lora_b_tile_bytes(format, rank) * (n / kLoraTileColumns);
    }
    count_ = std::min<int>(static_cast<int>(num_bytes / (a + b) / kLayers), 4 * kMaxBatch) / kLoraStreams *
             kLoraStreams;
    a_bytes_ = a * kLayers * count_, b_bytes_ = b * kLayers * count_;
    rows_.resize(count_), weights_.assign(count_, 1), s_.resize(size_t(count_) * kNumLayerTargets * rank);
    x_.assign(kInter, 0.5f), y_.assign(size_t(count_) * kInter, 0);
    modules_.resize(size_t(count_) * kLayers * kNumLayerTargets), tables_.reserve(modules_.size() * 2);
    for (int i = 0; i < count_; ++i) {
      rows_[i] = i;
      for (int l = 0; l < kLayers; ++l) {
        for (const auto& targets : {std::vector<int>{0, 1, 2}, {3}, {4, 5}, {6}}) {
          for (const int t : targets) {
            tables_.push_back({});
            for (int j = 0; j < rank; ++j)
              tables_.back().push_back(place(lora_a_row_bytes(format, kShapes[t][1])));
            module(l, t, i) = {rank, 1, format, tables_.back().data(), nullptr, nullptr, nullptr};
          }
          for (const int t : targets) {
            tables_.push_back({});
            for (int tile = 0; tile < kShapes[t][0] / kLoraTileColumns; ++tile)
              tables_.back().push_back(place(lora_b_tile_bytes(format, rank)));
            module(l, t, i).b_tiles = tables_.back().data();
          }
        }
      }
    }
    for (int l = 0; l < kLayers; ++l) {
      for (int t = 0; t < kNumLayerTargets; ++t) {
        for (int i = 0; i < count_; ++i)
          jobs_.push_back({&module(l, t, i), &rows_[i], &weights_[i],
                           &s_[(size_t(i) * kNumLayerTargets + t) * rank], rank, 1});
      }
    }
  }

  // Of A or of B, with its scales.
  double half_bytes(bool is_b) const { return static_cast<double>(is_b ? b_bytes_ : a_bytes_); }
  void shrink(ThreadPool& pool) {
    const int quads = count_ / kLoraStreams;
    pool.run(kLayers * quads, [&](int task, int) {
      for (int t = 0; t < kNumLayerTargets; ++t) {
        const LoraJob* jobs =
            &jobs_[(size_t(task / quads) * kNumLayerTargets + t) * count_ + task % quads * kLoraStreams];
        kernels().lora_shrink(jobs, kLoraStreams, x_.data(), 0, kShapes[t][1], 0, 1, 0, jobs->module->rank);
      }
    });
  }
  void expand(ThreadPool& pool) {
    constexpr int kTiles = 8;
    std::vector<std::array<int, 3>> tasks;
    for (int l = 0; l < kLayers; ++l) {
      for (int t = 0; t < kNumLayerTargets; ++t) {
        for (int tile = 0; tile < kShapes[t][0] / kLoraTileColumns; tile += kTiles)
          tasks.push_back({l, t, tile});
      }
    }
    pool.run(static_cast<int>(tasks.size()), [&](int task, int) {
      const auto [l, t, tile] = tasks[task];
      kernels().lora_expand(y_.data(), kInter, y_.data(), kInter,
                            &jobs_[(size_t(l) * kNumLayerTargets + t) * count_], count_, kShapes[t][0], tile,
                            std::min(tile + kTiles, kShapes[t][0] / kLoraTileColumns));
    });
  }

 private:
  LoraModule& module(int l, int t, int i) {
    return modules_[(size_t(i) * kLayers + l) * kNumLayerTargets + t];
  }

  int count_;
  size_t a_bytes_, b_bytes_;
  std::vector<LoraModule> modules_;
  std::vector<std::vector<const void*>> tables_;
  std::vector<LoraJob> jobs_;
  std::vector<int32_t> rows_;
  std::vector<float> weights_, s_, x_, y_;
};

void run_kernels(bool int8) {
  constexpr size_t kBytes = size_t{600} << 20;
  uint8_t* const memory = reserve(kBytes);
  std::memset(memory, 0x3c, kBytes);  // a small number in every format
  const int all = available_cpus();
  std::printf("%s, %s; GB/s of adapters with 1 thread and with %d, the best of 5\n", kernels().name,
              int8 ? "int8" : "bf16", all);
  std::printf("read %8.1f GB/s\n", read_rate());
  for (const int rank : {4, 8, 16, 64, 128}) {
    Adapters adapters(memory, kBytes, int8 ? LoraFormat::kInt8 : LoraFormat::kBF16, rank);
    std::printf("rank %3d", rank);
    for (const bool is_expand : {false, true}) {
      std::printf("%s", is_expand ? "   expand" : "   shrink");
      for (const int threads : {1, all}) {
        ThreadPool pool(threads);
        double best = 1e9;
        for (int i = 0; i < 5; ++i)
          best =
              std::min(best, seconds_of([&] { is_expand ? adapters.expand(pool) : adapters.shrink(pool); }));
        std::printf(" %6.1f", adapters.half_bytes(is_expand) / best / 1e9);
      }
    }
    std::printf("\n");
  }
  std::printf("read %8.1f GB/s\n", read_rate());
}

void compare(Model& model, std::vector<Voice>& voices, const char* what, int num_sequences, int rows,
             int first) {
  std::vector<std::unique_ptr<Step>> variants;
  for (const Voice& voice : voices)
    variants.push_back(std::make_unique<Step>(voice, num_sequences, rows, first));
  std::vector<std::vector<double>> times(voices.size());
  for (auto& variant : variants) variant->run(model);
  double rate = read_rate();
  for (int round = 0; round < rounds; ++round) {
    for (size_t v = 0; v < voices.size(); ++v)
      times[v].push_back(seconds_of([&] { variants[v]->run(model); }));
  }
  rate = std::max(rate, read_rate());
  std::printf("\n%s %d; read %.1f GB/s\n", what, num_sequences * rows, rate);
  const Spread base = spread(times[0]);
  for (size_t v = 0; v < voices.size(); ++v) {
    const Spread time = spread(times[v]);
    std::printf("  %-24s %8.2f ms, least %8.2f", voices[v].name, time.median * 1e3, time.low * 1e3);
    const size_t num_adapters = std::min<size_t>(voices[v].adapters.size(), num_sequences);
    if (num_adapters > 0) {
      const double bytes = static_cast<double>(voices[v].bytes) * static_cast<double>(num_adapters),
                   at_best = bytes / rate / 1e9;
      const double more = time.median - base.median, least = time.low - base.low;
      std::printf("; tax %5.1f %% %6.2f ms, least %5.1f %% %6.2f ms; %.0f MB in %.2f ms: %.2fx, least %.2fx",
                  100 * more / base.median, more * 1e3, 100 * least / base.low, least * 1e3, bytes / 1e6,
                  at_best * 1e3, more / at_best, least / at_best);
    }
    std::printf("\n");
  }
}

int main_(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto has = [&](const char* word) {
    return std::find(words.begin(), words.end(), word) != words.end();
  };
  const bool int8 = has("int8");
  if (words.empty() || words[0] == "kernels") run_kernels(int8);
  if (!words.empty() && words[0] == "kernels") return 0;
  if (words.size() > 1) rounds = std::max(1, std::atoi(words[1].c_str()));
  std::vector<int> batches = {1, 8, 32};
  if (words.size() > 2) {
    batches.clear();
    std::istringstream list(words[2]);
    for (std::string one; std::getline(list, one, ',');)
      batches.push_back(std::clamp(std::atoi(one.c_str()), 1, kMaxBatch));
  }
  const auto model = random_model(int8);
  std::vector<Voice> voices = {{"base", 0, {}, 0},
                               {"rank 8 on q, v", 8, kQV},
                               {"rank 16 on all linear", 16, kAll},
                               {"rank 16, in one row", 16, kAll, 1}};
  if (has("more")) {
    voices.push_back({"rank 4 on all linear", 4, kAll});
    voices.push_back({"rank 64, in 8 rows", 64, kAll, 8});
    voices.push_back({"rank 128, in 8 rows", 128, kAll, 8});
  }
  auto page = static_cast<int32_t>(kMaxBatch * (kContext / kBlockTokens + 2));
  for (Voice& voice : voices)
    if (voice.rank > 0) load(*model, voice, page);
  std::printf("%s, %d threads; %s adapters; %.0f MB of weights\n", kernels().name,
              model->device().num_threads(), int8 ? "int8" : "bf16",
              static_cast<double>(model->weight_bytes()) / 1e6);
  for (const int batch : batches) compare(*model, voices, "decode", batch, 1, kContext);
  rounds = (rounds + 2) / 3;
  compare(*model, voices, "prefill", 1, kPrefill, 0);
  return 0;
}

}  // namespace
}  // namespace motet

int main(int argc, char** argv) { return motet::main_(argc, argv); }
