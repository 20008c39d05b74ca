// The seam between the model and what computes it: memory (one arena of a given byte size, scratch buffers), copies with
// events, and the operations of a forward pass over rows. `cpu_device.cc` implements it; a GPU will be another file.
// Operations are enqueued in order and each sees the results of those before it; `synchronize` waits for all.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "adapter.h"
#include "batch.h"
#include "kernels/kernels.h"
#include "weights.h"

namespace motet {

// A grow-only array of floats in device memory, 64-byte aligned.
struct Buffer {
  std::unique_ptr<float, void (*)(float*)> data{nullptr, nullptr};
  size_t num_floats = 0;
};

// cos and sin of one rope table for the rows of this step: [numTokens, headDim / 2] each.
struct RopeAngles {
  std::vector<float> cos, sin;
};

// The rows of a step that one adapter changes, with each row's weight. Wave w holds the w-th adapter of every row, so that
// a row's deltas are added in the row's own order whatever the batch.
struct LoraGroup {
  const Adapter* adapter;
  int32_t wave;
  int32_t first, num_rows;  // in the plan's rows and weights
};
// Used again step after step: its memory stays.
struct LoraPlan {
  // A run of rows with the same adapter in the same wave.
  struct Run {
    int32_t wave;
    const Adapter* adapter;
    int32_t row_begin, row_end;
    float weight;
  };
  std::vector<LoraGroup> groups;  // wave after wave
  std::vector<int32_t> rows;
  std::vector<float> weights;
  std::vector<Run> runs;  // what groups are made from
};

// y = x · wᵀ (+ deltas of the plan's adapters) (+ bias): one of the projections that share an input.
struct Projection {
  Target target;
  const PackedMatrix* weight;
  const float* bias;  // [outFeatures] or null
  float* y;           // [numRows, ldy], whole tiles
  int64_t ldy;
};

using Event = uint64_t;

// Keys and values of one layer are brought from the host arena to pages of the device arena that a step is given for it: the
// staging area. It is cut into slots for one block each, its keys and then its values, and the slots into two halves of
// whole partitions: one is filled while attention reads the other. Units are what a slot's place is counted in.
struct StagingShape {
  size_t unit_bytes, slot_bytes;
  int slots_per_page;
  // In each half, of a staging area of so many pages.
  int64_t partitions_per_half(int64_t num_pages) const { return num_pages * slots_per_page / 2 / (kPartitionTokens / kBlockTokens); }
  // The least that has room for one partition in each half.
  int64_t min_pages() const { return (2 * kPartitionTokens / kBlockTokens + slots_per_page - 1) / slots_per_page; }
};
// side_bytes: kv_side_bytes, the keys or the values of one block.
constexpr StagingShape staging_shape(size_t page_bytes, size_t side_bytes) {
  const size_t divisor = page_bytes & (~page_bytes + 1), unit = divisor < 4096 ? divisor : 4096;
  const size_t slot_bytes = (2 * side_bytes + unit - 1) / unit * unit;
  return {unit, slot_bytes, static_cast<int>(page_bytes / slot_bytes)};
}

class Device {
 public:
  virtual ~Device() = default;

  virtual uint8_t* arena() const = 0;
  virtual size_t arena_bytes() const = 0;
  virtual int num_threads() const = 0;

  // The arena behind it in host memory, null without one: pinned where a device copies from it.
  virtual uint8_t* host_arena() const = 0;

  // Memory beside the arena, zeroed, in whole pages, given back with the pointer.
  virtual std::shared_ptr<uint8_t> allocate(size_t num_bytes) = 0;

  // Copies host bytes into the arena. The source may be reused, and the bytes be relied on, after wait(event). Copies may be
  // asked for on any thread, beside the operations of a step.
  virtual Event copy_to_arena(uint8_t* target, const void* source, size_t num_bytes) = 0;
  virtual Event copy_from_arena(void* target, const uint8_t* source, size_t num_bytes) = 0;
  virtual Event clear_arena(uint8_t* target, size_t num_bytes) = 0;
  virtual void wait(Event event) = 0;
  virtual void grow(Buffer& buffer, size_t num_floats) = 0;

  // Called once before the operations of a step. Block ids from num_pages on are pages of the host arena.
  virtual void begin(const Batch&, int64_t num_pages) = 0;
  // Says that attention over this layer comes next: blocks that it reads from the host arena may be brought to the staging
  // area from now on. Attention fetches for itself what nobody did.
  virtual void fetch_ahead(const KvLayer& kv, const Batch& batch, int window) = 0;
  // Bytes of KV brought to staging areas so far.
  virtual int64_t staged_bytes() const = 0;

  // x[r] = embedding[tokens[r]] · scale
  virtual void embed(float* x, const PackedMatrix& embedding, std::span<const int32_t> tokens, float scale) = 0;
  virtual void rmsnorm(float* y, int64_t ldy, const float* x, int64_t ldx, const float* weight, int num_rows, int n, float eps) = 0;
  // All projections of the same rows x [numRows, K]; layer picks the adapters' modules. `next` are those that follow, none when
  // nobody knows: a device may fetch their weights ahead.
  virtual void project(std::span<const Projection> projections, const float* x, int64_t ldx, int num_rows, int layer, const LoraPlan& lora,
                       std::span<const Projection> next) = 0;
  // The two projections of a gated MLP, and then the first's y = act(y) · the second's y.
  virtual void project_gated(std::span<const Projection> gate_up, const float* x, int64_t ldx, int num_rows, int layer, const LoraPlan& lora,
                             std::span<const Projection> next, bool gelu) = 0;
  virtual void rope(float* x, int64_t ldx, int num_heads, int head_dim, int num_rows, const RopeAngles& angles) = 0;
  // Stores each row's keys and values in its sequence's blocks.
  virtual void store_kv(const KvLayer& kv, const Batch& batch, const float* k, int64_t ldk, const float* v, int64_t ldv) = 0;
  virtual void attention(const KvLayer& kv, const Batch& batch, const float* q, int64_t ldq, float* out, int64_t ldo, int num_heads,
                         int window, float scale) = 0;
  virtual void add(float* y, const float* x, int64_t ld, int num_rows) = 0;
  virtual void gather_rows(float* y, const float* x, int64_t ld, std::span<const int32_t> rows) = 0;
  // Samples rows [0, n) of logits (overwritten), which are the batch's samples first_sample + i.
  virtual void sample(float* logits, int64_t ldl, int vocab, const Batch& batch, int first_sample, int num_samples, int max_top,
                      StepOutput& output) = 0;
  virtual void synchronize() = 0;
};

// arena_bytes and host_arena_bytes of zeroed memory; num_threads 0: one per CPU that this process may use. In reference mode
// projections keep activations in f32 instead of int8 groups.
std::unique_ptr<Device> make_cpu_device(size_t arena_bytes, int num_threads, bool reference_mode, size_t host_arena_bytes = 0);

// CPUs of this process: affinity mask, cut by the quotas of its cgroup and of those around it, at least 1.
int available_cpus();
// The least such quota in CPUs; infinite when there is none. `membership` is a /proc/self/cgroup, of v1 (cpu.cfs_quota_us)
// or v2 (cpu.max); `mount` where the hierarchies are mounted.
double cgroup_cpus(const std::string& membership, const std::string& mount);

}  // namespace motet
