#include "model.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>

#include "mapped_weights.h"
#include "weight_stream.h"

namespace motet {
namespace {

// Pages are at least this big, so that a row of A or a tile of B fits whatever the model: in f32 ranks up to 1024, and half of
// that when int8 KV halves the blocks.
constexpr size_t min_page_bytes(KvType kv_type) { return (kv_type == KvType::kInt8 ? 128 : 256) * 1024; }
// Rows of logits computed at a time: bounds their memory to kLogitRows · vocab floats.
constexpr int kLogitRows = 32;

const char* const kTargetNames[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"};

int64_t padded(int64_t n) { return num_tiles(n) * kTileColumns; }

std::string where(const PackedTensorSpec& t) {
  return "tensor '" + t.role + "'" + (t.layer < 0 ? "" : " of layer " + std::to_string(t.layer));
}

}  // namespace

const char* target_name(Target target) { return kTargetNames[static_cast<int>(target)]; }

Model::Model(const std::string& packed_path, ModelDims dims, const std::vector<PackedTensorSpec>& tensors, bool reference_mode, KvType kv_type,
             size_t device_memory_bytes, int num_threads, bool has_int8_adapters, size_t host_memory_bytes, size_t weight_memory_bytes)
    : dims_(std::move(dims)), kv_type_(kv_type), has_int8_adapters_(has_int8_adapters) {
  if (kv_type == KvType::kInt8 && dims_.head_dim > kMaxHeadDimInt8)
    throw RuntimeError("KV of type int8: expected a head dimension of at most " + std::to_string(kMaxHeadDimInt8) + ", got " +
                       std::to_string(dims_.head_dim));
  const size_t kv_bytes = 2 * dims_.num_layers * kv_side_bytes(kv_type, dims_.num_kv_heads, dims_.head_dim);
  page_bytes_ = (std::max(kv_bytes, min_page_bytes(kv_type)) + 4095) / 4096 * 4096;
  num_pages_ = static_cast<int64_t>(device_memory_bytes / page_bytes_);
  if (num_pages_ < 1)
    throw RuntimeError("device memory: expected at least one page of " + std::to_string(page_bytes_) + " bytes, got " +
                       std::to_string(device_memory_bytes) + " bytes");
  num_host_pages_ = static_cast<int64_t>(host_memory_bytes / page_bytes_);
  if (host_memory_bytes > 0 && num_host_pages_ < 1)
    throw RuntimeError("host memory: expected 0 or at least one page of " + std::to_string(page_bytes_) + " bytes, got " +
                       std::to_string(host_memory_bytes) + " bytes");
  FileDescriptor file(::open(packed_path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat st {};
  if (file.get() < 0 || fstat(file.get(), &st) != 0) throw RuntimeError("packed file " + packed_path + ": " + std::strerror(errno));
  file_bytes_ = static_cast<size_t>(st.st_size);
  check_tensors(tensors);
  device_ = make_cpu_device(static_cast<size_t>(num_pages_) * page_bytes_, num_threads, reference_mode,
                            static_cast<size_t>(num_host_pages_) * page_bytes_);
  if (weight_memory_bytes > 0 && weight_memory_bytes < file_bytes_)
    stream_ = std::make_unique<WeightStream>(std::move(file), packed_path, tensors, dims_.num_layers, weight_memory_bytes, *device_);
  else
    map(packed_path, file.get());
  bind(tensors);
  buffers_.resize(10);
  angles_.resize(dims_.rope_tables.size());
}

Model::~Model() = default;

void Model::map(const std::string& path, int fd) {
  map_ = map_weights(fd, file_bytes_);
  if (!map_) throw RuntimeError("packed file " + path + ": cannot be mapped: " + std::strerror(errno));
}

void Model::check_tensors(const std::vector<PackedTensorSpec>& tensors) const {
  for (const auto& t : tensors) {
    const size_t expected = t.is_vector ? static_cast<size_t>(t.in_features) * 4 : packed_bytes(t.format, t.out_features, t.in_features);
    if (t.offset_bytes < 0 || t.offset_bytes % 64 != 0 || t.size_bytes < 0 || static_cast<size_t>(t.size_bytes) != expected ||
        static_cast<size_t>(t.offset_bytes) > file_bytes_ || expected > file_bytes_ - static_cast<size_t>(t.offset_bytes))
      throw RuntimeError(where(t) + ": expected " + std::to_string(expected) + " bytes inside a file of " + std::to_string(file_bytes_) +
                         ", got offset " + std::to_string(t.offset_bytes) + " and size " + std::to_string(t.size_bytes));
  }
}

// Finds each role's tensor, and refuses shapes that the dimensions do not allow: after this every pointer is good.
void Model::bind(const std::vector<PackedTensorSpec>& tensors) {
  std::map<std::pair<int, std::string>, const PackedTensorSpec*> found;
  for (const auto& t : tensors) found[{t.layer, t.role}] = &t;
  const auto bytes_of = [&](const PackedTensorSpec& t) {
    return stream_ ? stream_->resident(static_cast<size_t>(&t - tensors.data())) : map_.get() + t.offset_bytes;
  };
  auto find = [&](int layer, const std::string& role, bool required) -> const PackedTensorSpec* {
    const auto it = found.find({layer, role});
    if (it != found.end()) return it->second;
    if (required) throw RuntimeError("tensor '" + role + "'" + (layer < 0 ? "" : " of layer " + std::to_string(layer)) + ": missing");
    return nullptr;
  };
  auto vector = [&](int layer, const std::string& role, int64_t n, bool required) -> const float* {
    const PackedTensorSpec* t = find(layer, role, required);
    if (!t) return nullptr;
    if (!t->is_vector || t->in_features != n)
      throw RuntimeError(where(*t) + ": expected a vector of " + std::to_string(n) + ", got [" + std::to_string(t->out_features) + ", " +
                         std::to_string(t->in_features) + "]");
    return reinterpret_cast<const float*>(bytes_of(*t));
  };
  auto matrix = [&](int layer, const std::string& role, int64_t n, int64_t k, bool required) -> PackedMatrix {
    const PackedTensorSpec* t = find(layer, role, required);
    if (!t) return {};
    if (t->is_vector || t->out_features != n || t->in_features != k)
      throw RuntimeError(where(*t) + ": expected a matrix [" + std::to_string(n) + ", " + std::to_string(k) + "], got [" +
                         std::to_string(t->out_features) + ", " + std::to_string(t->in_features) + "]");
    return {t->format, static_cast<int32_t>(n), static_cast<int32_t>(k), bytes_of(*t)};
  };
  const int64_t hidden = dims_.hidden_size, inter = dims_.intermediate_size;
  const int64_t q = int64_t{dims_.num_heads} * dims_.head_dim, kv = int64_t{dims_.num_kv_heads} * dims_.head_dim;
  embedding_ = matrix(-1, "embedding", dims_.vocab_size, hidden, true);
  final_norm_ = vector(-1, "final_norm", hidden, true);
  lm_head_ = matrix(-1, "lm_head", dims_.vocab_size, hidden, false);
  if (!lm_head_.data) lm_head_ = embedding_;
  head_ = {Target::kLmHead, &lm_head_, nullptr, nullptr, 0};
  const std::pair<int64_t, int64_t> shapes[kNumLayerTargets] = {{q, hidden},     {kv, hidden},    {kv, hidden},   {hidden, q},
                                                                {inter, hidden}, {inter, hidden}, {hidden, inter}};
  const char* const biases[kNumLayerTargets] = {"q_bias", "k_bias", "v_bias", "o_bias", nullptr, nullptr, nullptr};
  layers_.resize(dims_.num_layers);
  for (int l = 0; l < dims_.num_layers; ++l) {
    Layer& layer = layers_[l];
    layer.attention_norm = vector(l, "attention_norm", hidden, true);
    layer.post_attention_norm = vector(l, "post_attention_norm", hidden, false);
    layer.mlp_norm = vector(l, "mlp_norm", hidden, true);
    layer.post_mlp_norm = vector(l, "post_mlp_norm", hidden, false);
    layer.q_norm = vector(l, "q_norm", dims_.head_dim, false);
    layer.k_norm = vector(l, "k_norm", dims_.head_dim, false);
    for (int t = 0; t < kNumLayerTargets; ++t) {
      layer.projections[t] = matrix(l, kTargetNames[t], shapes[t].first, shapes[t].second, true);
      layer.tensors[t] = static_cast<size_t>(found[{l, kTargetNames[t]}] - tensors.data());
      if (biases[t]) layer.biases[t] = vector(l, biases[t], shapes[t].first, false);
    }
    for (const Target t : {Target::kQ, Target::kK, Target::kV}) layer.qkv[static_cast<int>(t)] = {t, &layer.projections[static_cast<int>(t)], nullptr, nullptr, 0};
  }
}

const PackedMatrix& Model::matrix(int layer, Target target) const {
  return target == Target::kLmHead ? lm_head_ : layers_[layer].projections[static_cast<int>(target)];
}

HeldMatrix Model::hold_matrix(int layer, Target target) const {
  const PackedMatrix& m = matrix(layer, target);
  if (layer < 0 || !is_streamed(layer)) return {m, nullptr};
  auto bytes = stream_->read_copy(layers_[layer].tensors[static_cast<int>(target)]);
  const uint8_t* const data = bytes.get();
  return {{m.format, m.out_features, m.in_features, data}, std::move(bytes)};
}

namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw RuntimeError("batch: " + what);
}

}  // namespace

// Everything a step will index is checked here, so that the operations need no checks of their own.
void Model::check(const Batch& b) const {
  auto starts = [&](std::span<const int32_t> s, size_t entries, size_t total, const char* name) {
    require(s.size() == entries + 1 && s[0] == 0 && static_cast<size_t>(s.back()) == total,
            std::string(name) + ": expected " + std::to_string(entries + 1) + " entries from 0 to " + std::to_string(total));
    for (size_t i = 0; i < entries; ++i) require(s[i] <= s[i + 1], std::string(name) + ": expected ascending entries");
  };
  const size_t num_tokens = b.token_ids.size(), num_samples = b.sample_rows.size();
  require(num_tokens > 0 && b.positions.size() == num_tokens, "positions: expected one per token, at least one token");
  require(!b.sequence_starts.empty(), "sequenceStarts: expected at least one entry");
  const size_t num_sequences = b.sequence_starts.size() - 1;
  starts(b.sequence_starts, num_sequences, num_tokens, "sequenceStarts");
  starts(b.block_starts, num_sequences, b.block_ids.size(), "blockStarts");
  starts(b.adapter_starts, num_sequences, b.adapter_handles.size(), "adapterStarts");
  require(b.adapter_weights.size() == b.adapter_handles.size(), "adapterWeights: expected one per handle");
  for (const int32_t id : b.token_ids)
    require(id >= 0 && id < dims_.vocab_size, "tokenIds: expected 0 to " + std::to_string(dims_.vocab_size - 1) + ", got " + std::to_string(id));
  for (size_t s = 0; s < num_sequences; ++s) {
    const int32_t begin = b.sequence_starts[s], end = b.sequence_starts[s + 1];
    require(begin < end, "sequenceStarts: expected at least one row per sequence");
    require(b.positions[begin] >= 0 && b.positions[begin] < dims_.max_positions,
            "positions: expected 0 to " + std::to_string(dims_.max_positions - 1) + ", got " + std::to_string(b.positions[begin]));
    for (int32_t r = begin + 1; r < end; ++r) require(b.positions[r] == b.positions[r - 1] + 1, "positions: expected consecutive ones in a sequence");
    require(b.positions[end - 1] < dims_.max_positions, "positions: expected below " + std::to_string(dims_.max_positions) + ", got " +
                                                            std::to_string(b.positions[end - 1]));
    require(b.block_starts[s + 1] - b.block_starts[s] > b.positions[end - 1] / kBlockTokens, "blockIds: too few for position " +
                                                                                               std::to_string(b.positions[end - 1]));
  }
  check_blocks(b);
  for (size_t i = 0; i < num_samples; ++i)
    require(b.sample_rows[i] >= 0 && static_cast<size_t>(b.sample_rows[i]) < num_tokens && (i == 0 || b.sample_rows[i] > b.sample_rows[i - 1]),
            "sampleRows: expected ascending row indices");
  for (size_t i = 0; i < b.hidden_rows.size(); ++i)
    require(b.hidden_rows[i] >= 0 && static_cast<size_t>(b.hidden_rows[i]) < num_tokens && (i == 0 || b.hidden_rows[i] > b.hidden_rows[i - 1]),
            "hiddenRows: expected ascending row indices");
  for (const size_t n : {b.temperature.size(), b.top_p.size(), b.min_p.size(), b.repetition_penalty.size(), b.presence_penalty.size(),
                         b.frequency_penalty.size(), b.top_k.size(), b.num_top.size(), b.seeds.size(), b.history_prompt_counts.size()})
    require(n == num_samples, "sampling parameters: expected one per sample");
  require(b.matchers.empty() || b.matchers.size() == num_samples, "matchers: expected one per sample, or none");
  starts(b.bias_starts, num_samples, b.bias_ids.size(), "biasStarts");
  require(b.bias_values.size() == b.bias_ids.size(), "biasValues: expected one per biasIds");
  starts(b.history_starts, num_samples, b.history_ids.size(), "historyStarts");
  for (const auto& ids : {b.bias_ids, b.history_ids})
    for (const int32_t id : ids) require(id >= 0 && id < dims_.vocab_size, "biasIds and historyIds: expected token ids, got " + std::to_string(id));
  for (size_t i = 0; i < num_samples; ++i) {
    require(b.history_prompt_counts[i] >= 0 && b.history_prompt_counts[i] <= b.history_starts[i + 1] - b.history_starts[i],
            "historyPromptCounts: expected at most the sample's history");
    require(b.num_top[i] >= 0 && b.num_top[i] <= dims_.vocab_size, "numTop: expected 0 to the vocabulary size");
  }
}

void Model::check_blocks(const Batch& b) const {
  const int64_t end = num_pages_ + num_host_pages_;
  bool has_host_blocks = false;
  for (int s = 0; s < b.num_sequences(); ++s) {
    const int32_t first_written = b.block_starts[s] + b.positions[b.sequence_starts[s]] / kBlockTokens;
    for (int32_t i = b.block_starts[s]; i < b.block_starts[s + 1]; ++i) {
      const int32_t id = b.block_ids[i];
      require(id >= 0 && id < end, "blockIds: expected 0 to " + std::to_string(end - 1) + ", got " + std::to_string(id));
      require(id < num_pages_ || i < first_written, "blockIds: expected a page of the device for block " + std::to_string(i - b.block_starts[s]) +
                                                        " of sequence " + std::to_string(s) + ", which this step writes or a later one, got host page " +
                                                        std::to_string(id - num_pages_));
      has_host_blocks |= id >= num_pages_;
    }
  }
  if (b.staging_pages.empty() && !has_host_blocks) return;
  require(!has_host_blocks || static_cast<int64_t>(b.staging_pages.size()) >= min_staging_pages(),
          "stagingPages: expected at least " + std::to_string(min_staging_pages()) + " for a step with blocks in host pages, got " +
              std::to_string(b.staging_pages.size()));
  // Slots are counted in units of 4 KiB by 32 bits, which is 8 TiB.
  const int64_t num_stageable = std::min<int64_t>(num_pages_, (int64_t{INT32_MAX} << 12) / static_cast<int64_t>(page_bytes_));
  std::vector<bool> is_taken(num_pages_);
  for (const int32_t id : b.block_ids)
    if (id < num_pages_) is_taken[id] = true;
  for (const int32_t id : b.staging_pages) {
    require(id >= 0 && id < num_stageable, "stagingPages: expected 0 to " + std::to_string(num_stageable - 1) + ", got " + std::to_string(id));
    require(!is_taken[id], "stagingPages: expected distinct pages that are no blocks of the step, got " + std::to_string(id));
    is_taken[id] = true;
  }
}

namespace {

// Groups rows by adapter, wave after wave. rows_of gives a sequence's rows as [begin, end); see LoraPlan.
template <typename RowsOf>
void plan_lora(LoraPlan& plan, const Batch& batch, const std::vector<const Adapter*>& adapters, RowsOf rows_of) {
  plan.groups.clear(), plan.rows.clear(), plan.weights.clear(), plan.runs.clear();
  for (int s = 0; s < batch.num_sequences(); ++s) {
    if (batch.adapter_starts[s] == batch.adapter_starts[s + 1]) continue;
    const auto [begin, end] = rows_of(s);
    if (begin == end) continue;
    for (int32_t i = batch.adapter_starts[s], wave = 0; i < batch.adapter_starts[s + 1]; ++i, ++wave)
      plan.runs.push_back({wave, adapters[i], begin, end, batch.adapter_weights[i]});
  }
  std::sort(plan.runs.begin(), plan.runs.end(), [](const LoraPlan::Run& a, const LoraPlan::Run& b) {
    if (a.wave != b.wave) return a.wave < b.wave;
    if (a.adapter->shape != b.adapter->shape) return a.adapter->shape < b.adapter->shape;  // those are read side by side
    if (a.adapter != b.adapter) return std::less<>()(a.adapter, b.adapter);
    return a.row_begin < b.row_begin;
  });
  for (const auto& run : plan.runs) {
    if (plan.groups.empty() || plan.groups.back().adapter != run.adapter || plan.groups.back().wave != run.wave)
      plan.groups.push_back({run.adapter, run.wave, static_cast<int32_t>(plan.rows.size()), 0});
    plan.groups.back().num_rows += run.row_end - run.row_begin;
    for (int32_t r = run.row_begin; r < run.row_end; ++r) plan.rows.push_back(r);
    plan.weights.insert(plan.weights.end(), run.row_end - run.row_begin, run.weight);
  }
}

}  // namespace

void Model::step(const Batch& batch, const std::vector<const Adapter*>& adapters, StepOutput& output) {
  clock_.start();
  check(batch);
  const int64_t staged_bytes = device_->staged_bytes();
  try {
    run(batch, adapters, output);
  } catch (...) {  // the caller's pages are its own again: nothing may be on its way into them
    device_->synchronize();
    throw;
  }
  output.staged_bytes = device_->staged_bytes() - staged_bytes;
}

void Model::run(const Batch& batch, const std::vector<const Adapter*>& adapters, StepOutput& output) {
  const int num_tokens = batch.num_tokens();
  const size_t rows = static_cast<size_t>(num_tokens);
  const size_t q_dim = padded(int64_t{dims_.num_heads} * dims_.head_dim), kv_dim = padded(int64_t{dims_.num_kv_heads} * dims_.head_dim);
  const size_t hidden = padded(dims_.hidden_size), inter = padded(dims_.intermediate_size);
  float** const slots[] = {&act_.x, &act_.h, &act_.q, &act_.k, &act_.v, &act_.attn, &act_.gate, &act_.up, &act_.o};
  const size_t widths[] = {hidden, hidden, q_dim, kv_dim, kv_dim, q_dim, inter, inter, hidden};
  for (size_t i = 0; i < std::size(slots); ++i) {
    device_->grow(buffers_[i], rows * widths[i]);
    *slots[i] = buffers_[i].data.get();
  }
  plan_lora(lora_, batch, adapters, [&](int s) { return std::pair(batch.sequence_starts[s], batch.sequence_starts[s + 1]); });
  // Angles as transformers computes them: the product in f32, cos and sin of that number.
  const int half = dims_.head_dim / 2;
  for (size_t t = 0; t < angles_.size(); ++t) {
    const auto& table = dims_.rope_tables[t];
    angles_[t].cos.resize(rows * half);
    angles_[t].sin.resize(rows * half);
    for (size_t r = 0; r < rows; ++r) {
      for (int i = 0; i < half; ++i) {
        const float angle = static_cast<float>(batch.positions[r]) * table.inverse_frequencies[i];
        angles_[t].cos[r * half + i] = std::cos(angle) * table.attention_factor;
        angles_[t].sin[r * half + i] = std::sin(angle) * table.attention_factor;
      }
    }
  }

  plan_last(batch, adapters);

  // Whatever ends the step before its last layer leaves the ring in the middle.
  const auto rewind = [](WeightStream* stream) { stream->rewind(); };
  std::unique_ptr<WeightStream, decltype(rewind)> unless_done(stream_.get());
  if (stream_) stream_->begin_step();
  device_->begin(batch, num_pages_);
  fetch_ahead(0, batch);
  clock_.lap(StepPart::kPlan);
  device_->embed(act_.x, embedding_, batch.token_ids, dims_.embedding_scale);
  clock_.lap(StepPart::kEmbed);
  for (int l = 0; l < dims_.num_layers; ++l) run_layer(l, batch);
  unless_done.release();
  copy_hidden(batch, output);
  sample(batch, adapters, output);
  device_->synchronize();
}

// Which rows the last layer goes on with after their keys and values: those of each sequence from the first on that samples or is
// read.
void Model::plan_last(const Batch& b, const std::vector<const Adapter*>& adapters) {
  LastRows& last = last_;
  last.rows.clear(), last.sequence_starts.assign(1, 0), last.block_starts.assign(1, 0), last.block_ids.clear();
  const auto first_in = [](std::span<const int32_t> rows, int32_t begin) {
    const auto it = std::lower_bound(rows.begin(), rows.end(), begin);
    return it == rows.end() ? INT32_MAX : *it;
  };
  last.begins.clear();
  for (int s = 0; s < b.num_sequences(); ++s) {
    const int32_t end = b.sequence_starts[s + 1];
    const int32_t begin = std::min({first_in(b.sample_rows, b.sequence_starts[s]), first_in(b.hidden_rows, b.sequence_starts[s]), end});
    last.begins.push_back(static_cast<int32_t>(last.rows.size()));
    if (begin == end) continue;
    for (int32_t r = begin; r < end; ++r) last.rows.push_back(r);
    last.sequence_starts.push_back(static_cast<int32_t>(last.rows.size()));
    last.block_ids.insert(last.block_ids.end(), b.block_ids.begin() + b.block_starts[s], b.block_ids.begin() + b.block_starts[s + 1]);
    last.block_starts.push_back(static_cast<int32_t>(last.block_ids.size()));
  }
  const size_t num_rows = last.rows.size();
  last.begins.push_back(static_cast<int32_t>(num_rows));
  last.is_all = num_rows == b.token_ids.size();
  const auto place = [&](int32_t row) { return static_cast<int32_t>(std::lower_bound(last.rows.begin(), last.rows.end(), row) - last.rows.begin()); };
  last.sample_rows.clear(), last.hidden_rows.clear();
  for (const int32_t r : b.sample_rows) last.sample_rows.push_back(last.is_all ? r : place(r));
  for (const int32_t r : b.hidden_rows) last.hidden_rows.push_back(last.is_all ? r : place(r));
  if (last.is_all) return;

  last.token_ids.clear(), last.positions.clear();
  const RopeAngles& angles = angles_[dims_.rope_table_index.back()];
  const int half = dims_.head_dim / 2;
  last.angles.cos.resize(num_rows * half);
  last.angles.sin.resize(num_rows * half);
  for (size_t i = 0; i < num_rows; ++i) {
    const int32_t r = last.rows[i];
    last.token_ids.push_back(b.token_ids[r]);
    last.positions.push_back(b.positions[r]);
    std::copy_n(angles.cos.begin() + int64_t{r} * half, half, last.angles.cos.begin() + i * half);
    std::copy_n(angles.sin.begin() + int64_t{r} * half, half, last.angles.sin.begin() + i * half);
  }
  plan_lora(last.lora, b, adapters, [&](int s) { return std::pair(last.begins[s], last.begins[s + 1]); });
  last.batch = {};
  last.batch.token_ids = last.token_ids;
  last.batch.positions = last.positions;
  last.batch.sequence_starts = last.sequence_starts;
  last.batch.block_starts = last.block_starts;
  last.batch.block_ids = last.block_ids;
  last.batch.staging_pages = b.staging_pages;
}

// Attention over layer l comes next; the last one has rows of its own.
void Model::fetch_ahead(int l, const Batch& batch) {
  if (l == dims_.num_layers) return;
  const bool is_cut = l + 1 == dims_.num_layers && !last_.is_all;
  if (is_cut && last_.rows.empty()) return;
  if (is_cut) device_->begin(last_.batch, num_pages_);
  device_->fetch_ahead(kv_layer(l), is_cut ? last_.batch : batch, dims_.sliding_windows[l]);
}

KvLayer Model::kv_layer(int l) const {
  const size_t side_bytes = kv_side_bytes(kv_type_, dims_.num_kv_heads, dims_.head_dim);
  return {device_->arena(), page_bytes_, 2 * l * side_bytes, (2 * l + 1) * side_bytes, kv_type_, dims_.num_kv_heads, dims_.head_dim};
}

bool Model::is_streamed(int l) const { return stream_ && stream_->is_streamed(l); }

// Where a layer that streams has its matrices now; null: nowhere.
void Model::set_bytes(int l, const uint8_t* slot) {
  Layer& layer = layers_[l];
  for (int t = 0; t < kNumLayerTargets; ++t) layer.projections[t].data = slot ? slot + stream_->slot_offset(layer.tensors[t]) : nullptr;
}

// Weights only: what a device may fetch ahead, if they are there. After the last layer comes the head.
std::span<const Projection> Model::first_of_layer(int l) {
  if (l == dims_.num_layers) return {&head_, 1};
  if (is_streamed(l)) {
    const uint8_t* const slot = stream_->peek(l);
    if (!slot) return {};
    set_bytes(l, slot);
  }
  return layers_[l].qkv;
}

void Model::run_layer(int l, const Batch& batch) {
  const Layer& layer = layers_[l];
  if (is_streamed(l)) {
    set_bytes(l, stream_->await(l));
    clock_.lap(StepPart::kWeights);
  }
  auto& [x, h, q, k, v, attn, gate, up, o] = act_;
  const int hidden = dims_.hidden_size, head_dim = dims_.head_dim;
  const int64_t ldh = padded(hidden), ldq = padded(int64_t{dims_.num_heads} * head_dim), ldkv = padded(int64_t{dims_.num_kv_heads} * head_dim);
  const int64_t ldi = padded(dims_.intermediate_size);
  auto projection = [&](Target t, float* y, int64_t ldy) {
    return Projection{t, &layer.projections[static_cast<int>(t)], layer.biases[static_cast<int>(t)], y, ldy};
  };
  const Projection qkv[] = {projection(Target::kQ, q, ldq), projection(Target::kK, k, ldkv), projection(Target::kV, v, ldkv)};
  const Projection out[] = {projection(Target::kO, o, ldh)};
  const Projection gate_up[] = {projection(Target::kGate, gate, ldi), projection(Target::kUp, up, ldi)};
  const Projection down[] = {projection(Target::kDown, o, ldh)};
  const KvLayer kv = kv_layer(l);
  const RopeAngles& angles = angles_[dims_.rope_table_index[l]];
  // In the last layer only some rows have queries, and all that comes of them.
  const bool is_cut = l + 1 == dims_.num_layers && !last_.is_all;
  const int all_rows = batch.num_tokens(), rows = is_cut ? static_cast<int>(last_.rows.size()) : all_rows;
  const LoraPlan& lora = is_cut ? last_.lora : lora_;

  device_->rmsnorm(h, ldh, x, ldh, layer.attention_norm, all_rows, hidden, dims_.norm_eps);
  clock_.lap(StepPart::kNorm);
  if (is_cut) {
    device_->project(std::span(qkv).subspan(1), h, ldh, all_rows, l, lora_, {});
    device_->gather_rows(o, h, ldh, last_.rows);
    device_->gather_rows(h, x, ldh, last_.rows);
    std::swap(x, h);
    if (rows > 0) device_->project(std::span(qkv).first(1), o, ldh, rows, l, lora, out);
  } else {
    device_->project(qkv, h, ldh, rows, l, lora, out);
  }
  clock_.lap(StepPart::kQkv);
  // Heads of a row are adjacent, so a norm per head is a norm over rows · heads short rows.
  auto norm_heads = [&](float* y, int64_t ld, int num_rows, int num_heads, const float* weight) {
    for (int i = 0; i < num_heads; ++i) device_->rmsnorm(y + i * head_dim, ld, y + i * head_dim, ld, weight, num_rows, head_dim, dims_.norm_eps);
  };
  if (layer.q_norm) norm_heads(q, ldq, rows, dims_.num_heads, layer.q_norm);
  if (layer.k_norm) norm_heads(k, ldkv, all_rows, dims_.num_kv_heads, layer.k_norm);
  clock_.lap(StepPart::kNorm);
  device_->rope(q, ldq, dims_.num_heads, head_dim, rows, is_cut ? last_.angles : angles);
  device_->rope(k, ldkv, dims_.num_kv_heads, head_dim, all_rows, angles);
  clock_.lap(StepPart::kRope);
  device_->store_kv(kv, batch, k, ldkv, v, ldkv);
  clock_.lap(StepPart::kKvWrite);
  if (rows > 0) {
    device_->attention(kv, is_cut ? last_.batch : batch, q, ldq, attn, ldq, dims_.num_heads, dims_.sliding_windows[l], dims_.attention_scale);
    fetch_ahead(l + 1, batch);
    clock_.lap(StepPart::kAttention);
    device_->project(out, attn, ldq, rows, l, lora, gate_up);
    clock_.lap(StepPart::kOut);
    if (layer.post_attention_norm) device_->rmsnorm(o, ldh, o, ldh, layer.post_attention_norm, rows, hidden, dims_.norm_eps);
    device_->add(x, o, ldh, rows);

    device_->rmsnorm(h, ldh, x, ldh, layer.mlp_norm, rows, hidden, dims_.norm_eps);
    clock_.lap(StepPart::kNorm);
    device_->project_gated(gate_up, h, ldh, rows, l, lora, down, dims_.gelu);
    clock_.lap(StepPart::kGateUp);
    device_->project(down, gate, ldi, rows, l, lora, first_of_layer(l + 1));
    clock_.lap(StepPart::kDown);
  }
  if (is_streamed(l)) {
    device_->synchronize();  // nothing reads the slot any more
    stream_->release(l);
    set_bytes(l, nullptr);
  }
  if (rows == 0) return;
  if (layer.post_mlp_norm) device_->rmsnorm(o, ldh, o, ldh, layer.post_mlp_norm, rows, hidden, dims_.norm_eps);
  device_->add(x, o, ldh, rows);
  clock_.lap(StepPart::kNorm);
}

// What the head would read of these rows.
void Model::copy_hidden(const Batch& batch, StepOutput& output) {
  const int num_rows = static_cast<int>(batch.hidden_rows.size()), hidden = dims_.hidden_size;
  output.hidden.resize(static_cast<size_t>(num_rows) * hidden);
  if (num_rows == 0) return;
  const int64_t ldh = padded(hidden);
  device_->gather_rows(act_.h, act_.x, ldh, last_.hidden_rows);
  device_->rmsnorm(act_.h, ldh, act_.h, ldh, final_norm_, num_rows, hidden, dims_.norm_eps);
  device_->synchronize();
  for (int i = 0; i < num_rows; ++i) std::memcpy(output.hidden.data() + static_cast<size_t>(i) * hidden, act_.h + i * ldh, size_t{4} * hidden);
  clock_.lap(StepPart::kNorm);
}

// The head only for rows that sample, a bounded number at a time.
void Model::sample(const Batch& batch, const std::vector<const Adapter*>& adapters, StepOutput& output) {
  const int num_samples = batch.num_samples();
  const int vocab = dims_.vocab_size;
  const int max_top = num_samples ? *std::max_element(batch.num_top.begin(), batch.num_top.end()) : 0;
  output.tokens.resize(num_samples);
  output.logprobs.resize(num_samples);
  output.top_ids.assign(static_cast<size_t>(num_samples) * max_top, -1);
  output.top_logprobs.assign(static_cast<size_t>(num_samples) * max_top, 0);
  output.logits.resize(batch.want_logits ? static_cast<size_t>(num_samples) * vocab : 0);
  const int64_t ldh = padded(dims_.hidden_size), ldl = padded(vocab);
  device_->grow(buffers_[9], std::min<size_t>(num_samples, kLogitRows) * ldl);
  float* const logits = buffers_[9].data.get();
  for (int first = 0; first < num_samples; first += kLogitRows) {
    const int n = std::min(kLogitRows, num_samples - first);
    const auto rows = batch.sample_rows.subspan(first, n);
    device_->gather_rows(act_.h, act_.x, ldh, std::span(last_.sample_rows).subspan(first, n));
    device_->rmsnorm(act_.h, ldh, act_.h, ldh, final_norm_, n, dims_.hidden_size, dims_.norm_eps);
    plan_lora(head_lora_, batch, adapters, [&](int s) {
      const auto at = [&](int32_t row) { return static_cast<int32_t>(std::lower_bound(rows.begin(), rows.end(), row) - rows.begin()); };
      return std::pair(at(batch.sequence_starts[s]), at(batch.sequence_starts[s + 1]));
    });
    const Projection head[] = {{Target::kLmHead, &lm_head_, nullptr, logits, ldl}};
    clock_.lap(StepPart::kNorm);
    device_->project(head, act_.h, ldh, n, -1, head_lora_, first_of_layer(0));
    clock_.lap(StepPart::kHead);
    if (batch.want_logits) {
      device_->synchronize();
      for (int i = 0; i < n; ++i) std::memcpy(output.logits.data() + static_cast<size_t>(first + i) * vocab, logits + i * ldl, size_t{4} * vocab);
    }
    device_->sample(logits, ldl, vocab, batch, first, n, max_top, output);
    clock_.lap(StepPart::kSample);
  }
}

}  // namespace motet
