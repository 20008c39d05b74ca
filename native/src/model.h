// The base model: its weights, mapped or streamed (weight_stream.h), and the forward pass of one step. Differences between model families are data
// (which norms and biases exist, windows, rope tables), never subclasses.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "adapter.h"
#include "batch.h"
#include "device.h"
#include "step_clock.h"
#include "weights.h"

namespace motet {

// As ModelDims of native/index.ts.
struct ModelDims {
  int32_t num_layers = 0, hidden_size = 0, intermediate_size = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int32_t vocab_size = 0, max_positions = 0;
  float norm_eps = 0, attention_scale = 0, embedding_scale = 1;
  bool gelu = false;
  std::vector<int32_t> sliding_windows, rope_table_index;  // [numLayers]
  struct RopeTable { std::vector<float> inverse_frequencies; float attention_factor = 1; };
  std::vector<RopeTable> rope_tables;
};

struct PackedTensorSpec {
  std::string role;
  int32_t layer = -1;
  bool is_vector = false;
  WeightFormat format = WeightFormat::kF32;
  int64_t out_features = 0, in_features = 0, offset_bytes = 0, size_bytes = 0;
};

struct RuntimeError : std::runtime_error { using std::runtime_error::runtime_error; };

struct Layer {
  // Matrices of a layer that streams have data while it is in the ring and its step needs it.
  const float *attention_norm = nullptr, *post_attention_norm = nullptr, *mlp_norm = nullptr, *post_mlp_norm = nullptr;
  const float *q_norm = nullptr, *k_norm = nullptr;
  PackedMatrix projections[kNumLayerTargets];               // by Target
  size_t tensors[kNumLayerTargets] = {};                    // their indices in what the model was opened with
  const float* biases[kNumLayerTargets] = {};
  Projection qkv[3];  // without where their results go
};

class WeightStream;

// A matrix with bytes that stay while it is held.
struct HeldMatrix {
  PackedMatrix matrix;
  std::shared_ptr<const uint8_t> bytes;  // null: the model's
};

class Model {
 public:
  // Maps `packed_path` read-only, or, with weight_memory_bytes below its size, keeps at most that much of it in memory and streams the rest;
  // reference mode keeps activations in f32. Throws RuntimeError naming the tensor that is missing, misplaced or misshapen.
  Model(const std::string& packed_path, ModelDims dims, const std::vector<PackedTensorSpec>& tensors, bool reference_mode, KvType kv_type,
        size_t device_memory_bytes, int num_threads, bool has_int8_adapters = false, size_t host_memory_bytes = 0,
        size_t weight_memory_bytes = 0);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Runs one step. adapters: one per batch.adapter_handles entry. Throws RuntimeError, before anything is written, when the
  // batch refers to what does not exist.
  void step(const Batch& batch, const std::vector<const Adapter*>& adapters, StepOutput& output);

  const ModelDims& dims() const { return dims_; }
  // Its shape and format, for any thread.
  const PackedMatrix& matrix(int layer, Target target) const;
  // With its bytes, for any thread: read from the file when the layer streams. Throws IoError.
  HeldMatrix hold_matrix(int layer, Target target) const;
  Device& device() const { return *device_; }
  size_t page_bytes() const { return page_bytes_; }
  int64_t num_pages() const { return num_pages_; }
  // Of the host arena, in pages of the same size; 0: there is none.
  int64_t num_host_pages() const { return num_host_pages_; }
  // Least staging pages of a step that reads blocks in the host arena.
  int64_t min_staging_pages() const { return staging_shape(page_bytes_, kv_side_bytes(kv_type_, dims_.num_kv_heads, dims_.head_dim)).min_pages(); }
  // Adapters are quantised to int8 when they are loaded; else they stay as their files have them.
  bool has_int8_adapters() const { return has_int8_adapters_; }
  size_t weight_bytes() const { return file_bytes_; }
  // Null: all weights are mapped.
  const WeightStream* stream() const { return stream_.get(); }
  const StepClock& clock() const { return clock_; }

 private:
  void map(const std::string& packed_path, int fd);
  void check_tensors(const std::vector<PackedTensorSpec>& tensors) const;
  void bind(const std::vector<PackedTensorSpec>& tensors);
  void check(const Batch& batch) const;
  void check_blocks(const Batch& batch) const;
  KvLayer kv_layer(int layer) const;
  void run(const Batch& batch, const std::vector<const Adapter*>& adapters, StepOutput& output);
  void plan_last(const Batch& batch, const std::vector<const Adapter*>& adapters);
  void fetch_ahead(int layer, const Batch& batch);
  void run_layer(int layer, const Batch& batch);
  bool is_streamed(int layer) const;
  void set_bytes(int layer, const uint8_t* slot);
  std::span<const Projection> first_of_layer(int layer);
  void copy_hidden(const Batch& batch, StepOutput& output);
  void sample(const Batch& batch, const std::vector<const Adapter*>& adapters, StepOutput& output);

  ModelDims dims_;
  KvType kv_type_;
  bool has_int8_adapters_;
  std::unique_ptr<Device> device_;
  size_t file_bytes_ = 0;
  std::shared_ptr<const uint8_t> map_;     // null: weights stream
  std::unique_ptr<WeightStream> stream_;  // after the device, whose memory it has
  size_t page_bytes_ = 0;
  int64_t num_pages_ = 0, num_host_pages_ = 0;
  PackedMatrix embedding_, lm_head_;
  const float* final_norm_ = nullptr;
  std::vector<Layer> layers_;
  Projection head_;

  // Activations of the running step, [numTokens, …] f32; rows padded to whole tiles. Grown, never shrunk.
  std::vector<Buffer> buffers_;
  struct Activations { float *x, *h, *q, *k, *v, *attn, *gate, *up, *o; } act_{};
  std::vector<RopeAngles> angles_;
  StepClock clock_;
  LoraPlan lora_, head_lora_;

  // The rows that the last layer goes on with, where act_.x has them and nothing else afterwards: a prompt's other rows are over with
  // their keys and values.
  struct LastRows {
    bool is_all = true;                              // of the batch; then only the last two are filled
    Batch batch;                                     // for the device's attention: of the sequences that have such rows
    std::vector<int32_t> rows, token_ids, positions, sequence_starts, block_starts, block_ids;
    std::vector<int32_t> begins;                     // [numSequences + 1] of the whole batch, in `rows`
    RopeAngles angles;
    LoraPlan lora;
    std::vector<int32_t> sample_rows, hidden_rows;   // as the batch's, in act_.x
  } last_;
};

}  // namespace motet
