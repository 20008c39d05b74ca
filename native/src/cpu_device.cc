// The CPU as a device: the arena is a bounded region of memory, copies are done when the call returns, and each
// operation spreads its rows, tiles or heads over a pool of threads. Beside them a thread fills the staging area.
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <string>

#include "copy_thread.h"
#include "device.h"
#include "thread_pool.h"

namespace motet {
namespace {

// Least work worth a task of its own, in multiply-adds: about ten microseconds.
constexpr int64_t kTaskMacs = 256 * 1024;
// Tasks per thread that an operation is cut into, so that a thread that was held up is caught up with.
constexpr int kTasksPerThread = 4;
// Least groups of activations worth a task: about five microseconds.
constexpr int64_t kQuantizeTaskGroups = 512;
// Query rows of one prefill task at most: enough to share each key load.
constexpr int kAttentionTaskRows = 32;
// With more rows than this a step does not wait for its weights; and how much of them each thread asks for ahead: part of its
// second level of cache.
constexpr int kAheadRows = 12;
constexpr size_t kAheadBytes = 256 << 10;
// Sequences with more rows than this amortise what they read by themselves, and share no reading.
constexpr int kSharingRows = 4;
// What loading and converting a key and a value costs, in multiply-adds of one (row, head) pair with both.
constexpr int kKeyLoadCost = 4;
// Memory for partial results of attention: 64 MiB. Rows beyond it are computed in one piece.
constexpr int64_t kMaxPartialFloats = int64_t{16} << 20;
// Rows of a shrink that are computed together: their x stays in the second-level cache for all ranks.
constexpr int kShrinkTaskRows = 48;
// About what one core reads and computes, to cut shrinks into tasks of like time, and the least time of one.
constexpr double kShrinkBytesPerNs = 25, kShrinkMacsPerNs = 60, kShrinkTaskNs = 4000;
constexpr int kTilesPerLoraTile = kLoraTileColumns / kTileColumns;
// Rows that wait for the weights' memory more than they compute, and the least tiles of a task of so few.
constexpr int kStreamRows = 2, kStreamTiles = 24;
// Tiles that a block of rows goes over at once.
constexpr int kFewTiles = 2;
// What a thread computes of gate and up before it multiplies them: part of its second level of cache, and whole turns of a product's
// tiles and of the adapters'.
constexpr size_t kGatedBytes = 384 << 10;
constexpr int kGatedTiles = 12;

// Of the adapters' B: how much a thread asks for while it computes the product that this is added to, a part of its second level of
// cache; the least tiles of adapters of such a product; and how many pieces of memory that may be.
constexpr size_t kDeltaBytes = 256 << 10;
constexpr size_t kLeastUnits = 3;
constexpr int kMaxAheadPieces = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Zeroed memory that takes real pages only when it is written.
class Region {
 public:
  explicit Region(size_t num_bytes) : size_(num_bytes) {
    if (num_bytes == 0) return;
    void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(address);
    madvise(data_, num_bytes, MADV_HUGEPAGE);
  }
  ~Region() {
    if (data_) munmap(data_, size_);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_;
};

class CpuDevice final : public Device {
 public:
  CpuDevice(size_t arena_bytes, int num_threads, bool reference_mode, size_t host_arena_bytes)
      : kernels_(kernels()),
        arena_(arena_bytes),
        host_arena_(host_arena_bytes),
        reference_mode_(reference_mode),
        pool_(num_threads > 0 ? num_threads : available_cpus()) {}

  uint8_t* arena() const override { return arena_.data(); }
  size_t arena_bytes() const override { return arena_.size(); }
  uint8_t* host_arena() const override { return host_arena_.data(); }
  int num_threads() const override { return pool_.num_threads(); }

  std::shared_ptr<uint8_t> allocate(size_t num_bytes) override {
    const auto region = std::make_shared<Region>(num_bytes);
    return {region, region->data()};
  }

  Event copy_to_arena(uint8_t* target, const void* source, size_t num_bytes) override {
    std::memcpy(target, source, num_bytes);
    return 0;
  }
  Event copy_from_arena(void* target, const uint8_t* source, size_t num_bytes) override {
    std::memcpy(target, source, num_bytes);
    return 0;
  }
  Event clear_arena(uint8_t* target, size_t num_bytes) override {
    std::memset(target, 0, num_bytes);
    return 0;
  }
  void wait(Event) override {}
  void synchronize() override { copy_thread_.wait_for_all(); }

  void grow(Buffer& buffer, size_t num_floats) override {
    if (buffer.num_floats >= num_floats) return;
    buffer.data.reset();
    buffer.num_floats = 0;  // so it stays when there is no memory
    // Big ones lie on huge pages: a product writes few columns of many rows, each on a page of its own otherwise.
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t alignment = num_floats * sizeof(float) < 2 * kHugePage ? 64 : kHugePage;
    const size_t bytes = (num_floats * sizeof(float) + alignment - 1) / alignment * alignment;
    auto* data = static_cast<float*>(std::aligned_alloc(alignment, bytes));
    if (!data) throw std::bad_alloc();
    if (alignment == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
    std::memset(data, 0, bytes);
    buffer.data = {data, [](float* p) { std::free(p); }};
    buffer.num_floats = num_floats;
  }

  void embed(float* x, const PackedMatrix& embedding, std::span<const int32_t> tokens, float scale) override {
    const int64_t k = embedding.in_features;
    over_rows(static_cast<int>(tokens.size()), k * 8, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) {
        kernels_.unpack_row(x + r * k, embedding, tokens[r]);
        if (scale != 1.0f)
          for (int64_t i = 0; i < k; ++i) x[r * k + i] *= scale;
      }
    });
  }

  void rmsnorm(float* y, int64_t ldy, const float* x, int64_t ldx, const float* weight, int num_rows, int n, float eps) override {
    over_rows(num_rows, n * 2, [&](int begin, int end) { kernels_.rmsnorm(y + begin * ldy, ldy, x + begin * ldx, ldx, weight, end - begin, n, eps); });
  }

  void project(std::span<const Projection> projections, const float* x, int64_t ldx, int num_rows, int layer, const LoraPlan& lora,
               std::span<const Projection> next) override {
    project_with(projections, x, ldx, num_rows, layer, lora, next, nullptr);
  }
  void project_gated(std::span<const Projection> gate_up, const float* x, int64_t ldx, int num_rows, int layer, const LoraPlan& lora,
                     std::span<const Projection> next, bool gelu) override {
    project_with(gate_up, x, ldx, num_rows, layer, lora, next, gelu ? kernels_.gelu_mul : kernels_.silu_mul);
  }

  void rope(float* x, int64_t ldx, int num_heads, int head_dim, int num_rows, const RopeAngles& angles) override {
    if (static_cast<int>(row_indices_.size()) < num_rows)
      for (int r = static_cast<int>(row_indices_.size()); r < num_rows; ++r) row_indices_.push_back(r);
    over_rows(num_rows, int64_t{num_heads} * head_dim * 2, [&](int begin, int end) {
      kernels_.rope(x + begin * ldx, ldx, num_heads, head_dim, row_indices_.data() + begin, end - begin, angles.cos.data(), angles.sin.data());
    });
  }

  void store_kv(const KvLayer& kv, const Batch& batch, const float* k, int64_t ldk, const float* v, int64_t ldv) override {
    page_of_row_.resize(batch.token_ids.size());
    for (int s = 0; s < batch.num_sequences(); ++s)
      for (int32_t r = batch.sequence_starts[s]; r < batch.sequence_starts[s + 1]; ++r)
        page_of_row_[r] = batch.block_ids[batch.block_starts[s] + batch.positions[r] / kBlockTokens];
    over_rows(batch.num_tokens(), int64_t{kv.num_kv_heads} * kv.head_dim * 4, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) kernels_.kv_write(kv, page_of_row_[r], batch.positions[r], k + r * ldk, v + r * ldv);
    });
  }

  // Finds the partitions of keys that sequences of few rows have in common: those where their block tables begin alike. Those
  // with blocks in the host arena stay apart.
  void begin(const Batch& batch, int64_t num_pages) override {
    planned_window_ = staged_window_ = -1;
    num_fetched_waves_ = 0;
    num_pages_ = num_pages;
    has_host_blocks_.assign(batch.num_sequences(), 0);
    if (!batch.staging_pages.empty())
      for (int s = 0; s < batch.num_sequences(); ++s)
        for (int32_t i = batch.block_starts[s]; i < batch.block_starts[s + 1]; ++i) has_host_blocks_[s] |= batch.block_ids[i] >= num_pages;
    shared_runs_.clear();
    own_partition_.assign(batch.num_sequences(), 0);
    for (int r = static_cast<int>(row_indices_.size()); r < batch.num_tokens(); ++r) row_indices_.push_back(r);

    struct Alike {  // sequences whose block tables agree up to a partition
      std::vector<int32_t> sequences;
      int partition, run;  // the run before it; −1: none
    };
    std::vector<Alike> open(1, {{}, 0, -1});
    for (int s = 0; s < batch.num_sequences(); ++s)
      if (batch.sequence_starts[s + 1] - batch.sequence_starts[s] <= kSharingRows && !has_host_blocks_[s]) open[0].sequences.push_back(s);
    while (!open.empty()) {
      const Alike alike = std::move(open.back());
      open.pop_back();
      const auto ids = [&](int32_t s) { return batch.block_ids.data() + batch.block_starts[s] + alike.partition * kPartitionBlocks; };
      const auto compare = [&](int32_t a, int32_t b) { return std::memcmp(ids(a), ids(b), kPartitionBlocks * sizeof(int32_t)); };
      std::vector<int32_t> sequences;  // those that have this partition whole, before their own rows
      for (const int32_t s : alike.sequences)
        if (batch.positions[batch.sequence_starts[s]] >= (alike.partition + 1) * kPartitionTokens) sequences.push_back(s);
      std::sort(sequences.begin(), sequences.end(), [&](int32_t a, int32_t b) {
        const int order = compare(a, b);
        return order != 0 ? order < 0 : a < b;
      });
      for (size_t i = 0, end; i < sequences.size(); i = end) {
        for (end = i + 1; end < sequences.size() && compare(sequences[i], sequences[end]) == 0;) ++end;
        if (end - i < 2) continue;
        std::vector<int32_t> group(sequences.begin() + i, sequences.begin() + end);
        for (const int32_t s : group) own_partition_[s] = alike.partition + 1;
        int run = alike.run;
        if (run >= 0 && group.size() == shared_runs_[run].sequences.size()) {
          shared_runs_[run].end = alike.partition + 1;
        } else {
          run = static_cast<int>(shared_runs_.size());
          shared_runs_.push_back({alike.partition, alike.partition + 1, group});
        }
        open.push_back({std::move(group), alike.partition + 1, run});
      }
    }
  }

  void fetch_ahead(const KvLayer& kv, const Batch& batch, int window) override {
    plan_staging(kv, batch, window);
    for (int wave = num_fetched_waves_; wave < std::min(2, num_waves_); ++wave) fetch(kv, wave);
  }

  int64_t staged_bytes() const override { return staged_bytes_; }

  // What lies in the device arena first, while the first waves are copied; then wave after wave of partitions that come from the
  // host arena, each folded into those before it.
  void attention(const KvLayer& kv, const Batch& batch, const float* q, int64_t ldq, float* out, int64_t ldo, int num_heads, int window,
                 float scale) override {
    fetch_ahead(kv, batch, window);
    if (window != planned_window_) plan_attention(kv, batch, num_heads, window);  // else as in the layer before
    planned_window_ = window;
    const size_t scratch_floats = attention_scratch_floats(kv.head_dim);
    grow(scratch_, scratch_floats * pool_.num_threads());
    const int heads_per_kv = num_heads / kv.num_kv_heads;
    const auto attend = [&](const KvLayer& in, const int32_t* blocks, const AttentionTask& task, int first, int end, int thread) {
      const int32_t* rows = (task.is_shared ? shared_rows_ : row_indices_).data() + task.first_row;
      kernels_.attention(in, {q, ldq, out, ldo, rows, task.num_rows, batch.positions.data(), heads_per_kv, task.kv_head,
                              blocks + batch.block_starts[task.sequence], window, scale, first, end,
                              task.has_partials ? partials_of_row_.data() : nullptr, task.is_carried ? partials_of_row_.data() : nullptr,
                              scratch_.data.get() + scratch_floats * thread});
    };
    run(static_cast<int>(attention_tasks_.size()), [&](int index, int thread) {
      const AttentionTask& task = attention_tasks_[index];
      attend(kv, batch.block_ids.data(), task, task.first_partition, task.end_partition, thread);
    });

    const KvLayer staging{kv.arena, staging_shape_.unit_bytes, 0, kv.v_offset - kv.k_offset, kv.type, kv.num_kv_heads, kv.head_dim};
    for (int wave = 0; wave + 1 < static_cast<int>(wave_tasks_.size()); ++wave) {
      if (wave < num_waves_) {
        if (wave >= num_fetched_waves_) fetch(kv, wave);
        copy_thread_.wait(wave_copied_[wave % 2]);
        copy_own_blocks(kv, wave);
      }
      const int first_task = wave_tasks_[wave];
      run(wave_tasks_[wave + 1] - first_task, [&](int index, int thread) {
        const AttentionTask& task = carried_tasks_[first_task + index];
        for (int p = task.first_partition, next; p < task.end_partition; p = next) {
          const bool is_staged = is_staged_partition(batch, task.sequence, p);
          for (next = p + 1; next < task.end_partition && is_staged_partition(batch, task.sequence, next) == is_staged;) ++next;
          attend(is_staged ? staging : kv, is_staged ? staged_ids_.data() : batch.block_ids.data(), task, p, next, thread);
        }
      });
      // Its half is free again.
      if (wave + 2 < num_waves_) fetch(kv, wave + 2);
    }
    num_fetched_waves_ = 0;

    if (partial_rows_.empty()) return;
    const int64_t partials = std::max<int64_t>(1, num_partial_floats_ / static_cast<int64_t>(partial_rows_.size()));
    over_rows(static_cast<int>(partial_rows_.size()), partials * 4, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) {
        const int32_t row = partial_rows_[i];
        kernels_.attention_fold(out + row * ldo, partials_of_row_[row].data, num_heads, partials_of_row_[row].count, kv.head_dim);
      }
    });
  }

  void add(float* y, const float* x, int64_t ld, int num_rows) override {
    over_rows(num_rows, ld, [&](int begin, int end) { kernels_.add(y + begin * ld, x + begin * ld, (end - begin) * ld); });
  }

  void gather_rows(float* y, const float* x, int64_t ld, std::span<const int32_t> rows) override {
    for (size_t i = 0; i < rows.size(); ++i) std::memcpy(y + static_cast<int64_t>(i) * ld, x + rows[i] * ld, ld * sizeof(float));
  }

  void sample(float* logits, int64_t ldl, int vocab, const Batch& b, int first_sample, int num_samples, int max_top, StepOutput& output) override {
    const size_t scratch_floats = size_t{2} * vocab + 16;
    grow(sample_scratch_, scratch_floats * pool_.num_threads());
    run(num_samples, [&](int i, int thread) {
      const int s = first_sample + i;
      SampleParams params{};
      params.temperature = b.temperature[s];
      params.top_k = b.top_k[s];
      params.top_p = b.top_p[s];
      params.min_p = b.min_p[s];
      params.repetition_penalty = b.repetition_penalty[s];
      params.presence_penalty = b.presence_penalty[s];
      params.frequency_penalty = b.frequency_penalty[s];
      params.seed = b.seeds[s];
      params.position = b.positions[b.sample_rows[s]];
      const int32_t* history = b.history_ids.data() + b.history_starts[s];
      params.prompt_tokens = history;
      params.num_prompt_tokens = b.history_prompt_counts[s];
      params.output_tokens = history + params.num_prompt_tokens;
      params.num_output_tokens = b.history_starts[s + 1] - b.history_starts[s] - params.num_prompt_tokens;
      params.bias_ids = b.bias_ids.data() + b.bias_starts[s];
      params.bias_values = b.bias_values.data() + b.bias_starts[s];
      params.num_bias = b.bias_starts[s + 1] - b.bias_starts[s];
      params.num_top = b.num_top[s];
      TokenMatcher* const matcher = b.matchers.empty() ? nullptr : b.matchers[s];
      if (matcher) params.allowed = matcher->allowed();
      const SampleResult result = kernels_.sample(logits + i * ldl, vocab, params, output.top_ids.data() + size_t{1} * s * max_top,
                                                  output.top_logprobs.data() + size_t{1} * s * max_top, sample_scratch_.data.get() + scratch_floats * thread);
      output.tokens[s] = result.token;
      output.logprobs[s] = result.logprob;
      if (matcher) matcher->accept(result.token);
    });
  }

 private:
  using Activation = decltype(Kernels::silu_mul);
  // The jobs of one projection's deltas, wave after wave.
  struct Deltas {
    int first_job = 0, num_jobs = 0;
    bool has_gain = false, has_waves = false;  // a DoRA gain; rows with several adapters
    float* base = nullptr;                     // as y: where the projection without adapters is kept; null: nobody needs it
  };
  // Part of a shrink that one thread does: some rows, some rank rows, of one job or of several with one row each.
  struct Piece {
    int first_job, num_jobs, row_begin, row_end, j_begin, j_end;
  };
  struct Task {
    int begin, end;  // of pieces; of tiles
    int pass = 0;  // of rows
  };

  // Partitions [first, end) of keys that these sequences have in common, and no other.
  struct SharedRun {
    int first, end;
    std::vector<int32_t> sequences;
  };
  // Some rows against some partitions of the keys of a sequence, for one KV head.
  struct AttentionTask {
    bool is_shared, has_partials, is_carried;
    int sequence, kv_head;
    int first_row, num_rows;  // in row_indices_; in shared_rows_ when the rows are of several sequences
    int first_partition, end_partition;
    int64_t cost;
  };

  // A partition of keys with blocks in the host arena, which is attended to in the staging area. Copied once for all sequences
  // that have the same blocks there.
  struct Load {
    const int32_t* ids;  // [num_blocks] page ids
    int num_blocks;
  };
  // A sequence goes on from partition `first` to before `end` in a wave.
  struct StagedRun {
    int wave, sequence, first, end;
  };

  static constexpr int kPartitionBlocks = kPartitionTokens / kBlockTokens;
  static int first_partition(const Batch& batch, int row, int window) {
    return window > 0 ? std::max(0, batch.positions[row] - window + 1) / kPartitionTokens : 0;
  }
  static int end_partition(const Batch& batch, int row) { return batch.positions[row] / kPartitionTokens + 1; }

  bool is_staged_partition(const Batch& batch, int sequence, int partition) const {
    return staged_ids_[batch.block_starts[sequence] + partition * kPartitionBlocks] >= 0;
  }

  // Says what comes from the host arena for layers with this window, and puts it into waves: as many partitions as half of the
  // staging area holds, in ascending order, so that every sequence finds its own in order.
  void plan_staging(const KvLayer& kv, const Batch& batch, int window) {
    if (window == staged_window_) return;  // as in the layer before
    staged_window_ = window;
    num_waves_ = 0;
    loads_.clear();
    staged_runs_.clear();
    staged_end_.assign(batch.num_sequences(), 0);
    if (std::find(has_host_blocks_.begin(), has_host_blocks_.end(), 1) == has_host_blocks_.end()) return;

    struct Wanted {
      int partition, sequence;
      Load load;
    };
    std::vector<Wanted> wanted;
    for (int s = 0; s < batch.num_sequences(); ++s) {
      if (!has_host_blocks_[s]) continue;
      const int begin = batch.sequence_starts[s], last = batch.sequence_starts[s + 1] - 1;
      const int num_blocks = batch.positions[last] / kBlockTokens + 1;
      const int first_block = window > 0 ? std::max(0, batch.positions[begin] - window + 1) / kBlockTokens : 0;
      for (int p = first_partition(batch, begin, window); p < end_partition(batch, last); ++p) {
        const Load load{batch.block_ids.data() + batch.block_starts[s] + p * kPartitionBlocks, std::min(kPartitionBlocks, num_blocks - p * kPartitionBlocks)};
        const int32_t* const first_seen = load.ids + std::max(0, first_block - p * kPartitionBlocks);
        if (std::any_of(first_seen, load.ids + load.num_blocks, [&](int32_t id) { return id >= num_pages_; })) wanted.push_back({p, s, load});
      }
    }
    // Those that have the same blocks in the same place are neighbours then.
    const auto before = [](const Wanted& a, const Wanted& b) {
      if (a.partition != b.partition) return a.partition < b.partition;
      return std::lexicographical_compare(a.load.ids, a.load.ids + a.load.num_blocks, b.load.ids, b.load.ids + b.load.num_blocks);
    };
    std::stable_sort(wanted.begin(), wanted.end(), before);

    const size_t side_bytes = kv_side_bytes(kv.type, kv.num_kv_heads, kv.head_dim);
    staging_shape_ = staging_shape(kv.page_bytes, side_bytes);
    loads_per_wave_ = static_cast<int>(staging_shape_.partitions_per_half(static_cast<int64_t>(batch.staging_pages.size())));
    slots_.clear();
    for (const int32_t page : batch.staging_pages)
      for (int i = 0; i < staging_shape_.slots_per_page; ++i)
        slots_.push_back(static_cast<int32_t>((static_cast<size_t>(page) * kv.page_bytes + i * staging_shape_.slot_bytes) / staging_shape_.unit_bytes));
    staged_ids_.assign(batch.block_ids.size(), -1);
    std::vector<int> run_of(batch.num_sequences(), -1);  // a sequence's last
    for (size_t i = 0; i < wanted.size(); ++i) {
      const auto& [partition, s, load] = wanted[i];
      if (i == 0 || before(wanted[i - 1], wanted[i])) loads_.push_back(load);
      const int index = static_cast<int>(loads_.size()) - 1, wave = index / loads_per_wave_;
      std::copy_n(slots_.begin() + first_slot(index), load.num_blocks, staged_ids_.begin() + batch.block_starts[s] + partition * kPartitionBlocks);
      int& run = run_of[s];
      if (run < 0 || staged_runs_[run].wave != wave) {
        staged_runs_.push_back({wave, s, run < 0 ? first_partition(batch, batch.sequence_starts[s], window) : staged_runs_[run].end, 0});
        run = static_cast<int>(staged_runs_.size()) - 1;
      }
      staged_end_[s] = staged_runs_[run].end = partition + 1;
    }
    num_waves_ = static_cast<int>(ceil_div(static_cast<int64_t>(loads_.size()), loads_per_wave_));
  }

  int first_slot(int load) const {
    const int wave = load / loads_per_wave_;
    return (wave % 2 * loads_per_wave_ + load % loads_per_wave_) * kPartitionBlocks;
  }

  // Calls f(page id, its slot's place in the arena) for the blocks of a wave.
  template <typename F>
  void for_each_block(int wave, F&& f) {
    const int end = std::min((wave + 1) * loads_per_wave_, static_cast<int>(loads_.size()));
    for (int load = wave * loads_per_wave_; load < end; ++load)
      for (int b = 0; b < loads_[load].num_blocks; ++b)
        f(loads_[load].ids[b], arena_.data() + static_cast<size_t>(slots_[first_slot(load) + b]) * staging_shape_.unit_bytes);
  }

  // Has the host blocks of a wave copied, whose half nobody reads any more.
  void fetch(const KvLayer& kv, int wave) {
    std::vector<CopyThread::Copy> copies;
    const size_t num_bytes = slice_bytes(kv);
    for_each_block(wave, [&](int32_t id, uint8_t* target) {
      if (id < num_pages_) return;
      copies.push_back({target, host_arena_.data() + static_cast<size_t>(id - num_pages_) * kv.page_bytes + kv.k_offset, num_bytes});
      staged_bytes_ += static_cast<int64_t>(num_bytes);
    });
    wave_copied_[wave % 2] = copy_thread_.post(std::move(copies));
    num_fetched_waves_ = wave + 1;
  }
  // Blocks of the device arena that share a partition with host blocks: now, since this layer may just have written them.
  void copy_own_blocks(const KvLayer& kv, int wave) {
    for_each_block(wave, [&](int32_t id, uint8_t* target) {
      if (id < num_pages_) std::memcpy(target, kv.arena + static_cast<size_t>(id) * kv.page_bytes + kv.k_offset, slice_bytes(kv));
    });
  }
  static size_t slice_bytes(const KvLayer& kv) { return kv.v_offset - kv.k_offset + kv_side_bytes(kv.type, kv.num_kv_heads, kv.head_dim); }

  // Cuts attention into tasks of about equal cost, the longest first. What is cut along the keys has its results folded
  // afterwards: the rows of partial_rows_. The cuts never change a result.
  void plan_attention(const KvLayer& kv, const Batch& batch, int num_heads, int window) {
    const int heads_per_kv = num_heads / kv.num_kv_heads, num_sequences = batch.num_sequences();
    const auto first_partition = [&](int row) { return CpuDevice::first_partition(batch, row, window); };
    const auto end_partition = [&](int row) { return CpuDevice::end_partition(batch, row); };
    const auto cost_of = [&](int64_t num_rows, int64_t num_keys) {
      const int64_t groups = ceil_div(num_rows * heads_per_kv, kAttentionRows);
      return num_keys * 2 * kv.head_dim * (num_rows * heads_per_kv + groups * kKeyLoadCost);
    };
    attention_pieces_.clear();
    attention_tasks_.clear();
    carried_tasks_.clear();
    wave_tasks_.clear();
    shared_rows_.clear();
    partial_rows_.clear();
    num_partial_floats_ = 0;
    partials_of_row_.assign(batch.num_tokens(), {nullptr, 0, 0});
    // Gives the rows room for a partial result of each of their partitions, if there is any left. Those before `carried` have
    // one for all of them.
    const auto take_partials = [&](int begin, int end, int carried = 0) {
      const int64_t floats_of_partition = int64_t{num_heads} * (kv.head_dim + kPartialExtra);
      const auto first_partial = [&](int r) { return std::max(first_partition(r), carried - 1); };
      int64_t num_floats = 0;
      for (int r = begin; r < end; ++r) num_floats += (end_partition(r) - first_partial(r)) * floats_of_partition;
      if (num_partial_floats_ + num_floats > kMaxPartialFloats) return false;
      for (int r = begin; r < end; ++r) {
        partials_of_row_[r] = {nullptr, first_partial(r), end_partition(r) - first_partial(r)};
        partial_rows_.push_back(r);
      }
      num_partial_floats_ += num_floats;
      return true;
    };

    // Where one row's heads fill most of a group, company saves no arithmetic, and the caches save the reading.
    const bool pays = 2 * heads_per_kv <= kAttentionRows;
    // Pieces before they are cut along the keys, for all KV heads: of the shared runs, then of each sequence alone.
    is_sharing_.assign(num_sequences, 0);
    for (int s = 0; s < num_sequences; ++s) {
      const int begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
      is_sharing_[s] = pays && own_partition_[s] > first_partition(begin) && take_partials(begin, end);
    }
    for (const SharedRun& run : shared_runs_) {
      // Under a window each partition may have other rows that see it.
      for (int p = run.first, next; p < run.end; p = next) {
        next = window > 0 ? p + 1 : run.end;
        const int first_row = static_cast<int>(shared_rows_.size());
        int sequence = -1;
        for (const int32_t s : run.sequences) {
          if (!is_sharing_[s]) continue;
          for (int r = batch.sequence_starts[s]; r < batch.sequence_starts[s + 1]; ++r) {
            if (first_partition(r) > p) continue;
            shared_rows_.push_back(r);
            sequence = s;
          }
        }
        const int num_rows = static_cast<int>(shared_rows_.size()) - first_row;
        if (num_rows == 0) continue;
        attention_pieces_.push_back({true, true, false, sequence, 0, first_row, num_rows, p, next, cost_of(num_rows, int64_t{next - p} * kPartitionTokens)});
      }
    }
    const int64_t rows_of_all_heads = int64_t{batch.num_tokens()} * kv.num_kv_heads;
    const int task_rows = static_cast<int>(std::clamp<int64_t>(ceil_div(rows_of_all_heads, int64_t{pool_.num_threads()} * kTasksPerThread),
                                                               ceil_div(kAttentionRows, heads_per_kv), kAttentionTaskRows));
    // A sequence that goes through waves carries each row's result in its first partial. The partitions after them are pieces
    // like others where there is room for their partials; else they are one more wave.
    const auto carry = [&](int s, int wave, int first_partition, int end_partition) {
      const int end = batch.sequence_starts[s + 1];
      for (int r = batch.sequence_starts[s]; r < end; r += task_rows)
        for (int head = 0; head < kv.num_kv_heads; ++head)
          carried_tasks_.push_back({false, false, true, s, head, r, std::min(task_rows, end - r), first_partition, end_partition, wave});
    };
    is_apart_.assign(num_sequences, 0);
    for (int s = 0; s < num_sequences; ++s) {
      if (staged_end_[s] == 0) continue;
      const int begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
      is_apart_[s] = !take_partials(begin, end, staged_end_[s]);
      if (!is_apart_[s]) continue;
      for (int r = begin; r < end; ++r) partials_of_row_[r] = {nullptr, 0, 1}, partial_rows_.push_back(r);
      num_partial_floats_ += int64_t{end - begin} * num_heads * (kv.head_dim + kPartialExtra);
      if (staged_end_[s] < end_partition(end - 1)) carry(s, num_waves_, staged_end_[s], end_partition(end - 1));
    }
    for (const StagedRun& run : staged_runs_) carry(run.sequence, run.wave, run.first, run.end);
    std::stable_sort(carried_tasks_.begin(), carried_tasks_.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost < b.cost; });
    for (int i = 0; i < static_cast<int>(carried_tasks_.size()); ++i)
      while (static_cast<int64_t>(wave_tasks_.size()) <= carried_tasks_[i].cost) wave_tasks_.push_back(i);
    if (!wave_tasks_.empty()) wave_tasks_.push_back(static_cast<int>(carried_tasks_.size()));

    for (int s = 0; s < num_sequences; ++s) {
      if (is_apart_[s]) continue;
      const int end = batch.sequence_starts[s + 1];
      for (int r = batch.sequence_starts[s]; r < end; r += task_rows) {
        const int num_rows = std::min(task_rows, end - r), last = r + num_rows - 1;
        const int done = is_sharing_[s] ? own_partition_[s] : staged_end_[s], first = std::max(done, first_partition(r));
        if (first >= end_partition(last)) continue;
        // The rows see half of the positions that they are themselves.
        const int64_t num_keys = batch.positions[r] - std::max(first * kPartitionTokens, window > 0 ? batch.positions[r] - window + 1 : 0) + num_rows / 2 + 1;
        const bool has_partials = is_sharing_[s] || staged_end_[s] > 0;
        attention_pieces_.push_back({false, has_partials, false, s, 0, r, num_rows, first, end_partition(last), cost_of(num_rows, num_keys)});
      }
    }

    int64_t all = 0;
    for (const AttentionTask& piece : attention_pieces_) all += piece.cost * kv.num_kv_heads;
    const int64_t wanted = std::max<int64_t>(kTaskMacs, all / (int64_t{pool_.num_threads()} * kTasksPerThread));
    for (AttentionTask& piece : attention_pieces_) {
      const int num_partitions = piece.end_partition - piece.first_partition;
      int num_cuts = pool_.num_threads() == 1 ? 1 : static_cast<int>(std::clamp<int64_t>(ceil_div(piece.cost, wanted), 1, num_partitions));
      if (num_cuts > 1 && !piece.has_partials) {
        piece.has_partials = take_partials(piece.first_row, piece.first_row + piece.num_rows);
        if (!piece.has_partials) num_cuts = 1;
      }
      // Heads side by side, since their keys are: of equal tasks one is begun after the other.
      for (int c = 0; c < num_cuts; ++c) {
        AttentionTask task = piece;
        task.first_partition = piece.first_partition + num_partitions * c / num_cuts;
        task.end_partition = piece.first_partition + num_partitions * (c + 1) / num_cuts;
        task.cost = piece.cost / num_cuts;
        for (task.kv_head = 0; task.kv_head < kv.num_kv_heads; ++task.kv_head) attention_tasks_.push_back(task);
      }
    }
    std::stable_sort(attention_tasks_.begin(), attention_tasks_.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });

    grow(partials_, static_cast<size_t>(num_partial_floats_));
    float* data = partials_.data.get();
    for (const int32_t r : partial_rows_) {
      partials_of_row_[r].data = data;
      data += int64_t{num_heads} * partials_of_row_[r].count * (kv.head_dim + kPartialExtra);
    }
  }

  template <typename F>
  void run(int num_tasks, F&& f) {
    if (num_tasks == 1) return f(0, 0);
    if (num_tasks > 1) pool_.run(num_tasks, f);
  }

  // Neighbours to the same thread: the rows that it has had in the operation before are in its caches.
  template <typename F>
  void run_apart(int num_tasks, F&& f) {
    if (num_tasks == 1) return f(0, 0);
    if (num_tasks > 1) pool_.run_apart(num_tasks, {}, f);
  }

  // Calls f(begin, end) over rows, in this thread when there is too little to share.
  template <typename F>
  void over_rows(int num_rows, int64_t work_per_row, F&& f) {
    const int per_task = static_cast<int>(std::max({int64_t{1}, kTaskMacs / std::max<int64_t>(work_per_row, 1),
                                                    ceil_div(num_rows, int64_t{pool_.num_threads()} * kTasksPerThread)}));
    if (per_task >= num_rows) return f(0, num_rows);
    run_apart(static_cast<int>(ceil_div(num_rows, per_task)), [&](int t, int) { f(t * per_task, std::min(num_rows, (t + 1) * per_task)); });
  }

  // `activation`: null, or what the first of two projections goes through to be multiplied by the second.
  void project_with(std::span<const Projection> projections, const float* x, int64_t ldx, int num_rows, int layer, const LoraPlan& lora,
                    std::span<const Projection> next, Activation activation) {
    const int k = projections[0].weight->in_features;
    const bool any_quantized =
        !reference_mode_ && std::any_of(projections.begin(), projections.end(), [](const Projection& p) { return is_quantized(p.weight->format); });
    quantize_and_shrink(any_quantized, projections, x, ldx, num_rows, k, layer, lora);

    // A task's columns get their deltas as soon as they are there, while they are in the cache. Many rows are cut into passes
    // first: a thread that goes on in its pass finds the activations in its cache. Each thread has as many passes as the others, and so
    // its own rows from one projection to the next, unless they would be too few to unpack the weights for.
    int64_t num_passes = any_quantized ? ceil_div(num_rows, pass_rows(k, kernels_.q_bytes)) : 1;
    const int64_t even_passes = ceil_div(num_passes, pool_.num_threads()) * pool_.num_threads();
    if (num_passes > 1 && num_rows >= even_passes * kMinPassRows) num_passes = even_passes;
    const int rows_of_pass = static_cast<int>(ceil_div(ceil_div(num_rows, num_passes), int64_t{kRowBlock}) * kRowBlock);
    cut_jobs(projections.size(), num_rows, rows_of_pass);
    const int unit = unit_of(lora, num_rows);
    cut_tasks(tasks_, projections, num_rows, rows_of_pass, unit);
    look_ahead(next, num_rows, unit);
    const auto cut = projections.first(num_cut(projections, num_rows));
    const bool is_paired = cut.size() < projections.size();
    pool_.run_apart(static_cast<int>(tasks_.size()), ahead_, [&](int index, int) {
      const Task& task = tasks_[index];
      const int row_begin = task.pass * rows_of_pass, row_end = std::min(row_begin + rows_of_pass, num_rows);
      const auto part = [&](size_t i, int begin, int end) {
        product(projections[i], deltas_[task.pass * projections.size() + i], x, ldx, row_begin, row_end, begin, end);
      };
      for_each_part(task, cut, [&](size_t i, int begin, int end) {
        if (!is_paired) return part(i, begin, end);
        // As many columns of both at once as the cache holds.
        const int fit = static_cast<int>(kGatedBytes / ((row_end - row_begin) * 2 * kTileColumns * sizeof(float))) / kGatedTiles * kGatedTiles;
        const int step = std::max(fit, kGatedTiles);
        for (int from = begin, to; from < end; from = to) {
          to = std::min(from + step, end);
          part(0, from, to);
          part(1, from, to);
          activate(activation, projections[0], projections[1], row_begin, row_end, from, to);
        }
      });
    });
    if (activation && !is_paired) {
      const int tiles = static_cast<int>(num_tiles(projections[0].weight->out_features));
      over_rows(num_rows, int64_t{tiles} * kTileColumns * 16, [&](int begin, int end) { activate(activation, projections[0], projections[1], begin, end, 0, tiles); });
    }
  }

  // The packed tiles [begin, end) of a projection for the rows of a pass, with what adapters and bias add.
  void product(const Projection& p, const Deltas& deltas, const float* x, int64_t ldx, int row_begin, int row_end, int begin, int end) {
    float* const y = p.y + row_begin * p.ldy;
    // As many tiles at once as what expand reads of them is asked for.
    const int step = deltas.num_jobs > 0 ? tiles_of_turn(deltas) : end - begin;
    for (int from = begin, to; from < end; from = to) {
      to = std::min(from + step, end);
      if (!reference_mode_ && is_quantized(p.weight->format)) {
        Ahead pieces[kMaxAheadPieces];
        const int num_pieces = deltas.num_jobs > 0 ? deltas_ahead(deltas, from, to, pieces) : 0;
        kernels_.matmul_q(y, p.ldy, *p.weight, rows_of(quantized_, row_begin, row_end), from, to, pieces, num_pieces);
      } else {
        kernels_.matmul_f(y, p.ldy, *p.weight, x + row_begin * ldx, ldx, row_end - row_begin, from, to);
      }
      if (deltas.num_jobs > 0) expand_deltas(p, deltas, row_begin, row_end, from, to);
    }
    if (!p.bias) return;
    const int64_t column = int64_t{begin} * kTileColumns, count = std::min(int64_t{end} * kTileColumns, int64_t{p.weight->out_features}) - column;
    for (int r = 0; r < row_end - row_begin; ++r) kernels_.add(y + r * p.ldy + column, p.bias + column, count);
  }

  // gate = activation(gate) · up, of the packed tiles [begin, end).
  void activate(Activation activation, const Projection& gate, const Projection& up, int row_begin, int row_end, int begin, int end) {
    const int column = begin * kTileColumns, count = std::min(end * kTileColumns, gate.weight->out_features) - column;
    float* const y = gate.y + row_begin * gate.ldy + column;
    activation(y, gate.ldy, y, gate.ldy, up.y + row_begin * up.ldy + column, up.ldy, row_end - row_begin, count);
  }

  // Gives the quantised rows memory.
  void place_quantized(int num_rows, int k) {
    const size_t places = static_cast<size_t>(num_rows) * (k / kActivationGroup) + kRowBlock;
    grow(q_integers_, places * kernels_.q_bytes / sizeof(float));
    grow(q_scales_, places);
    grow(q_offsets_, places);
    if (q_chunks_.size() < places) {
      q_sums_.resize(places);
      q_first_sums_.resize(places);
      q_chunks_.resize(places);
      q_middles_.resize(places);
      q_highs_.resize(places);
    }
    quantized_ = {reinterpret_cast<int8_t*>(q_integers_.data.get()), q_scales_.data.get(), q_offsets_.data.get(), q_sums_.data(), q_first_sums_.data(),
                  q_chunks_.data(), q_middles_.data(), q_highs_.data(), k, num_rows, kernels_.q_bytes};
  }

  // Quantises the rows, and computes x · Aᵀ of the modules that their adapters have on these projections. Both read x alone, so they
  // go together: each time that threads wait for one another takes microseconds.
  void quantize_and_shrink(bool quantizes, std::span<const Projection> projections, const float* x, int64_t ldx, int num_rows, int k, int layer,
                           const LoraPlan& lora) {
    if (quantizes) place_quantized(num_rows, k);
    plan_jobs(projections, num_rows, layer, lora);
    tasks_.clear();
    if (!jobs_.empty()) plan_pieces(lora, k);
    // To quantise: pieces of one block of rows each, so that what two threads write lies apart.
    const int64_t groups = k / kActivationGroup, num_blocks = ceil_div(num_rows, int64_t{kRowBlock});
    const int64_t wanted = std::min(num_rows * groups / kQuantizeTaskGroups, int64_t{pool_.num_threads()} * kTasksPerThread);
    const int64_t ranges = std::clamp(ceil_div(wanted, num_blocks), int64_t{1}, std::max<int64_t>(ceil_div(groups, int64_t{16}), 1));
    const int num_shrinks = static_cast<int>(tasks_.size()), num_quantizes = quantizes ? static_cast<int>(num_blocks * ranges) : 0;
    const int num_tasks = num_shrinks + num_quantizes;
    // Both evenly over the tasks, so that each thread has its own rows to quantise.
    run_apart(num_tasks, [&](int index, int) {
      const int64_t quantize = int64_t{index} * num_quantizes / num_tasks;
      if (int64_t{index + 1} * num_quantizes / num_tasks == quantize) {
        const Task& task = tasks_[index - quantize];
        for (int i = task.begin; i < task.end; ++i) {
          const Piece& piece = pieces_[i];
          kernels_.lora_shrink(&jobs_[piece.first_job], piece.num_jobs, x, ldx, k, piece.row_begin, piece.row_end, piece.j_begin, piece.j_end);
        }
        return;
      }
      const int64_t range = quantize % ranges;
      const int row = static_cast<int>(quantize / ranges) * kRowBlock;
      kernels_.quantize_rows(quantized_, x, ldx, row, std::min(row + kRowBlock, num_rows), static_cast<int>(groups * range / ranges),
                             static_cast<int>(groups * (range + 1) / ranges));
    });
  }

  void plan_jobs(std::span<const Projection> projections, int num_rows, int layer, const LoraPlan& lora) {
    jobs_.clear(), group_of_job_.clear(), deltas_.clear();
    size_t s_floats = 0, base_floats = 0;
    for (const auto& p : projections) {
      Deltas deltas{static_cast<int>(jobs_.size()), 0, false, false, nullptr};
      for (size_t g = 0; g < lora.groups.size(); ++g) {
        const LoraGroup& group = lora.groups[g];
        const LoraModule& module = group.adapter->module(layer, p.target);
        if (module.rank == 0) continue;
        const int64_t lds = ceil_div(module.rank, 16) * 16;
        jobs_.push_back({&module, lora.rows.data() + group.first, lora.weights.data() + group.first, nullptr, lds, group.num_rows});
        group_of_job_.push_back(static_cast<int>(g));
        s_floats += static_cast<size_t>(lds) * group.num_rows;
        deltas.has_gain |= module.gain_tiles != nullptr;
        deltas.has_waves |= group.wave > 0;
      }
      deltas.num_jobs = static_cast<int>(jobs_.size()) - deltas.first_job;
      if (deltas.has_gain && deltas.has_waves) base_floats += static_cast<size_t>(p.ldy) * num_rows;
      deltas_.push_back(deltas);
    }
    grow(shrunk_, s_floats);
    grow(base_, base_floats);
    float* s = shrunk_.data.get();
    for (auto& job : jobs_) {
      job.s = s;
      s += job.lds * job.num_rows;
    }
    float* base = base_.data.get();
    for (size_t p = 0; p < projections.size(); ++p) {
      if (!deltas_[p].has_gain || !deltas_[p].has_waves) continue;
      deltas_[p].base = base;
      base += projections[p].ldy * num_rows;
    }
  }

  // Cuts the shrinks into pieces and these into tasks of about the same time. An adapter's modules follow one another, as
  // they do in memory, and adapters of one row each go side by side.
  void plan_pieces(const LoraPlan& lora, int k) {
    double all = 0;
    for (const auto& job : jobs_)
      for (int row = 0; row < job.num_rows; row += kShrinkTaskRows) all += shrink_ns(job, k, std::min(kShrinkTaskRows, job.num_rows - row)) * job.module->rank;
    const double per_task = std::max(all / (pool_.num_threads() * kTasksPerThread), kShrinkTaskNs);
    tasks_.clear(), pieces_.clear(), next_job_.assign(deltas_.size(), 0);
    double so_far = 0;  // of the last task
    const int num_groups = static_cast<int>(lora.groups.size());
    for (int g = 0, end = 0; g < num_groups; g = end) {
      end = g + 1;
      while (end < num_groups && end - g < kLoraStreams && lora.groups[g].num_rows == 1 && lora.groups[end].num_rows == 1) ++end;
      for (size_t p = 0; p < deltas_.size(); ++p) {
        const int first = deltas_[p].first_job + next_job_[p];
        int count = 0;
        while (next_job_[p] < deltas_[p].num_jobs && group_of_job_[first + count] < end) ++next_job_[p], ++count;
        bool together = count == kLoraStreams;
        for (int i = 1; together && i < count; ++i)
          together = jobs_[first + i].module->rank == jobs_[first].module->rank && jobs_[first + i].module->format == jobs_[first].module->format;
        for (int i = 0; i < count; i += together ? count : 1) add_pieces(first + i, together ? count : 1, k, per_task, so_far);
      }
    }
  }

  // Nanoseconds of one rank row: its bytes come from memory once, and each row takes its arithmetic.
  static double shrink_ns(const LoraJob& job, int k, int num_rows) {
    return std::max(k * static_cast<double>(lora_element_bytes(job.module->format)) / kShrinkBytesPerNs, static_cast<double>(k) * num_rows / kShrinkMacsPerNs);
  }

  void add_pieces(int first_job, int num_jobs, int k, double per_task, double& so_far) {
    const LoraJob& job = jobs_[first_job];
    for (int row = 0; row < job.num_rows; row += kShrinkTaskRows) {
      const int row_end = std::min(row + kShrinkTaskRows, job.num_rows);
      const double one = shrink_ns(job, k, row_end - row) * num_jobs;
      for (int j = 0; j < job.module->rank;) {
        if (tasks_.empty() || so_far >= per_task) {
          const int first = static_cast<int>(pieces_.size());
          tasks_.push_back({first, first});
          so_far = 0;
        }
        // Runs of at least kLoraStreams rank rows, which one job alone reads side by side.
        const int fits = static_cast<int>(std::min((per_task - so_far) / one, 1e6)) / kLoraStreams * kLoraStreams;
        const int j_end = std::min(j + std::max(fits, kLoraStreams), job.module->rank);
        pieces_.push_back({first_job, num_jobs, row, row_end, j, j_end});
        ++tasks_.back().end;
        so_far += one * (j_end - j);
        j = j_end;
      }
    }
  }

  // Tiles of projections and passes of rows as tasks of equal size, neighbours in memory one after another: as many for each
  // thread as are worth it. A task may go over from one projection to the next. Its ends lie between `unit` tiles of a projection.
  void cut_tasks(std::vector<Task>& tasks, std::span<const Projection> projections, int num_rows, int rows_of_pass, int unit) const {
    tasks.clear();
    const auto here = projections.first(num_cut(projections, num_rows));
    int64_t num_units = 0, tiles = 0;
    for (const auto& p : here) {
      tiles += num_tiles(p.weight->out_features);
      num_units += ceil_div(num_tiles(p.weight->out_features), unit);
    }
    const int64_t num_passes = ceil_div(num_rows, rows_of_pass), num_together = projections.size() / here.size();
    const int64_t tile_macs = int64_t{projections[0].weight->in_features} * kTileColumns * std::min(num_rows, rows_of_pass) * num_together;
    const int64_t wanted = std::clamp<int64_t>(tiles * num_passes * tile_macs / (kTaskMacs * pool_.num_threads()), 1, kTasksPerThread * 2) * pool_.num_threads();
    // One or two rows wait for memory at the beginning of each task, so theirs are longer.
    const int64_t most = num_rows > kStreamRows ? num_units : std::max<int64_t>(tiles / kStreamTiles / pool_.num_threads(), 1) * pool_.num_threads();
    const int64_t tasks_of_pass = std::min({num_units, most, ceil_div(wanted, num_passes)});
    for (int pass = 0; pass < num_passes; ++pass) {
      for (int64_t i = 0, begin = 0, end; i < tasks_of_pass; ++i, begin = end) {
        end = first_tile(here, num_units * (i + 1) / tasks_of_pass, unit);
        tasks.push_back({static_cast<int>(begin), static_cast<int>(end), pass});
      }
    }
  }

  // The tile with which a unit of the projections begins: so many tiles each, and what is left over at the end of a projection.
  static int64_t first_tile(std::span<const Projection> projections, int64_t index, int unit) {
    int64_t first = 0;
    for (const auto& p : projections) {
      const int64_t tiles = num_tiles(p.weight->out_features), units = ceil_div(tiles, unit);
      if (index < units) return first + index * unit;
      first += tiles;
      index -= units;
    }
    return first;
  }

  // The tiles that stay together in a task: those of a tile of the adapters; without these, those that few rows go over at once.
  static int unit_of(const LoraPlan& lora, int num_rows) { return lora.groups.empty() && num_rows <= kRowBlock ? kFewTiles : kTilesPerLoraTile; }

  // How many of the projections are cut into tasks. Of gate and up it is the gate, and a thread computes the same columns of both, which
  // it can multiply then without waiting for others. Few rows read them one after the other, as longer streams of memory.
  static size_t num_cut(std::span<const Projection> projections, int num_rows) {
    const bool is_gated = projections.size() == 2 && projections[0].target == Target::kGate;
    return is_gated && num_rows > kRowBlock ? 1 : projections.size();
  }

  // Calls f(projection, tile_begin, tile_end) for the parts of a task.
  template <typename F>
  static void for_each_part(const Task& task, std::span<const Projection> projections, F&& f) {
    int begin = task.begin, end = task.end;  // from this projection's first
    for (size_t p = 0; p < projections.size() && end > 0; ++p) {
      const int tiles = static_cast<int>(num_tiles(projections[p].weight->out_features));
      const int from = std::max(begin, 0), to = std::min(end, tiles);
      if (from < to) f(p, from, to);
      begin -= tiles;
      end -= tiles;
    }
  }

  // Where each thread will begin to read the weights of the projections after these. With few rows a step waits for memory, and
  // between two projections nobody reads: then those who wait ask for these bytes.
  void look_ahead(std::span<const Projection> next, int num_rows, int unit) {
    ahead_.clear();
    if (next.empty() || num_rows > kAheadRows) return;
    cut_tasks(next_tasks_, next, num_rows, num_rows, unit);
    for (int thread = 0; thread < pool_.num_threads(); ++thread) {
      bool is_first = true;
      for_each_part(next_tasks_[pool_.first_task(static_cast<int>(next_tasks_.size()), thread)], next.first(num_cut(next, num_rows)), [&](size_t p, int begin, int) {
        if (!is_first) return;
        is_first = false;
        const PackedMatrix& w = *next[p].weight;
        const uint8_t* const at = w.data + begin * packed_bytes(w.format, kTileColumns, w.in_features);
        ahead_.push_back({at, std::min(at + kAheadBytes, w.data + packed_bytes(w.format, w.out_features, w.in_features))});
      });
    }
  }

  // The jobs of each pass of rows, from those of all rows: deltas_ then has those of every projection in the first pass, in
  // the second, …
  void cut_jobs(size_t num_projections, int num_rows, int rows_of_pass) {
    if (jobs_.empty()) {
      for (int row = rows_of_pass; row < num_rows; row += rows_of_pass) deltas_.insert(deltas_.end(), num_projections, Deltas{});
      return;
    }
    if (rows_of_pass >= num_rows) return;
    all_jobs_.swap(jobs_);
    all_deltas_.swap(deltas_);
    jobs_.clear(), deltas_.clear();
    for (int row = 0; row < num_rows; row += rows_of_pass) {
      for (Deltas deltas : std::span(all_deltas_).first(num_projections)) {
        const auto whole = std::span(all_jobs_).subspan(deltas.first_job, deltas.num_jobs);
        deltas.first_job = static_cast<int>(jobs_.size());
        for (LoraJob job : whole) {
          const int32_t* const end = job.rows + job.num_rows;
          const int32_t* const first = std::lower_bound(job.rows, end, row);
          const int num_before = static_cast<int>(first - job.rows);
          job.num_rows = static_cast<int>(std::lower_bound(first, end, row + rows_of_pass) - first);
          if (job.num_rows == 0) continue;
          job.rows = first;
          job.weights += num_before;
          job.s += num_before * job.lds;
          jobs_.push_back(job);
        }
        deltas.num_jobs = static_cast<int>(jobs_.size()) - deltas.first_job;
        deltas_.push_back(deltas);
      }
    }
  }

  // How many packed tiles a product goes over before their deltas are added: whole tiles of the adapters.
  int tiles_of_turn(const Deltas& deltas) const {
    size_t bytes = 1;
    for (const LoraJob& job : std::span(jobs_).subspan(deltas.first_job, deltas.num_jobs)) bytes += lora_b_tile_bytes(job.module->format, job.module->rank);
    return static_cast<int>(std::clamp<size_t>(kDeltaBytes / bytes, kLeastUnits, INT_MAX / kTilesPerLoraTile)) * kTilesPerLoraTile;
  }

  // What expand reads for the packed tiles [begin, end), in its order, up to kDeltaBytes of it.
  int deltas_ahead(const Deltas& deltas, int begin, int end, Ahead (&pieces)[kMaxAheadPieces]) const {
    const int first = begin / kTilesPerLoraTile, last = static_cast<int>(ceil_div(end, kTilesPerLoraTile));
    int count = 0;
    size_t bytes = 0;
    for (const LoraJob& job : std::span(jobs_).subspan(deltas.first_job, deltas.num_jobs)) {
      const LoraModule& module = *job.module;
      const size_t tile_bytes = lora_b_tile_bytes(module.format, module.rank);
      for (int t = first; t < last; ++t, bytes += tile_bytes) {
        const auto* const at = static_cast<const uint8_t*>(module.b_tiles[t]);
        if (t > first && pieces[count - 1].end == at) {
          pieces[count - 1].end += tile_bytes;
        } else {
          if (count == kMaxAheadPieces || bytes >= kDeltaBytes) return count;
          pieces[count++] = {at, at + tile_bytes};
        }
      }
    }
    return count;
  }

  // y[rows] += delta for the packed tiles [begin, end), which begin with a tile of the adapters. A row's deltas are added in
  // its own order. DoRA's gain multiplies the projection before any adapter, which is kept aside where a second wave
  // would otherwise see the first one's sum.
  void expand_deltas(const Projection& p, const Deltas& deltas, int row_begin, int row_end, int begin, int end) {
    const float* base = p.y;
    if (deltas.base) {
      for (int64_t r = row_begin; r < row_end; ++r) {
        const int64_t at = r * p.ldy + int64_t{begin} * kTileColumns;
        std::memcpy(deltas.base + at, p.y + at, static_cast<size_t>(end - begin) * kTileColumns * sizeof(float));
      }
      base = deltas.base;
    }
    kernels_.lora_expand(p.y, p.ldy, base, p.ldy, jobs_.data() + deltas.first_job, deltas.num_jobs, p.weight->out_features, begin / kTilesPerLoraTile,
                         static_cast<int>(ceil_div(end, kTilesPerLoraTile)));
  }

  const Kernels& kernels_;
  Region arena_, host_arena_;
  bool reference_mode_;
  ThreadPool pool_;
  Buffer q_integers_, q_scales_, q_offsets_, shrunk_, base_, scratch_, partials_, sample_scratch_;
  QuantizedRows quantized_{};
  std::vector<int32_t> q_sums_, q_first_sums_, q_chunks_, q_middles_, q_highs_;
  std::vector<Task> tasks_, next_tasks_;
  std::vector<Ahead> ahead_;
  std::vector<Deltas> deltas_, all_deltas_;  // of each pass of rows and each projection; before rows are cut
  std::vector<LoraJob> jobs_, all_jobs_;     // projection after projection
  std::vector<int> group_of_job_, next_job_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> row_indices_;  // 0, 1, 2, …
  std::vector<int32_t> page_of_row_;

  std::vector<SharedRun> shared_runs_;     // of this step
  std::vector<int32_t> own_partition_;     // of each sequence: those before lie in runs
  int planned_window_ = -1;                // what the tasks below were made for; −1: nothing yet
  std::vector<AttentionTask> attention_pieces_, attention_tasks_;
  std::vector<int32_t> shared_rows_, partial_rows_;
  std::vector<AttentionPartials> partials_of_row_;
  std::vector<uint8_t> is_sharing_;        // of each sequence
  int64_t num_partial_floats_ = 0;

  int64_t num_pages_ = 0;                  // of the device arena; block ids from there on are host pages
  std::vector<uint8_t> has_host_blocks_;   // of each sequence of this step
  int staged_window_ = -1;                 // what the waves below were made for; −1: nothing yet
  StagingShape staging_shape_{};
  int num_waves_ = 0, loads_per_wave_ = 0;
  std::vector<Load> loads_;
  std::vector<StagedRun> staged_runs_;
  std::vector<int> staged_end_;            // of each sequence: partitions before it are done with in waves; 0: it has none
  std::vector<int32_t> slots_;             // of the staging area: where they begin, in units of the arena
  std::vector<int32_t> staged_ids_;        // as block_ids, of staged partitions: the slot that a block is copied to; −1 elsewhere
  std::vector<uint8_t> is_apart_;          // of each sequence in waves: all of it is, also what comes after them
  std::vector<AttentionTask> carried_tasks_;  // wave after wave; `cost` is the wave
  std::vector<int> wave_tasks_;            // where each wave's begin, and the end
  int num_fetched_waves_ = 0;              // of the layer that is attended to now or next
  uint64_t wave_copied_[2] = {0, 0};       // the list of copies of the last wave in each half
  int64_t staged_bytes_ = 0;
  CopyThread copy_thread_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(size_t arena_bytes, int num_threads, bool reference_mode, size_t host_arena_bytes) {
  return std::make_unique<CpuDevice>(arena_bytes, num_threads, reference_mode, host_arena_bytes);
}

double cgroup_cpus(const std::string& membership, const std::string& mount) {
  double cpus = std::numeric_limits<double>::infinity();
  std::ifstream memberships(membership);
  for (std::string line; std::getline(memberships, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool is_v2 = line.compare(0, first, "0") == 0 && controllers.empty();
    if (!is_v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    // A path out of the cgroup namespace ("/..") is not under the mount: only the mount's own quota is known.
    std::string path = line.substr(second + 1);
    if (path.find("/..") != std::string::npos || !path.starts_with('/')) path.clear();
    while (true) {
      const std::string folder = mount + (is_v2 ? "" : "/" + controllers) + path;
      // Microseconds; v2 says "max", v1 -1 when there is no quota, and then no number above 0 is read.
      double quota = 0, period = 0;
      if (is_v2) {
        std::ifstream(folder + "/cpu.max") >> quota >> period;
      } else {
        std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(folder + "/cpu.cfs_period_us") >> period;
      }
      if (quota > 0 && period > 0) cpus = std::min(cpus, quota / period);
      if (path.empty()) break;
      path.erase(path.rfind('/'));
    }
  }
  return cpus;
}

int available_cpus() {
  cpu_set_t set;  // too small for a machine of more than 1,024 CPUs
  const double count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
  return static_cast<int>(std::max(1.0, std::min(count, cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup"))));
}

}  // namespace motet
