// A small model, packed here, against a plain forward pass in double precision; and that threads change no bit.
#include "model.h"

#include <gtest/gtest.h>

#include <climits>
#include <cstdio>
#include <cstring>
#include <functional>

#include "pages.h"
#include "reference.h"
#include "temporary_file.h"
#include "weight_stream.h"

namespace motet {
namespace {

using reference::Matrix;
using reference::Random;
using Doubles = std::vector<double>;

constexpr int kLayers = 2, kHidden = 128, kInter = 256, kHeads = 8, kKvHeads = 2, kHeadDim = 16, kVocab = 500, kWindow = 5;
constexpr int kShapes[kNumLayerTargets + 1][2] = {{kHeads * kHeadDim, kHidden},   {kKvHeads* kHeadDim, kHidden}, {kKvHeads * kHeadDim, kHidden},
                                                  {kHidden, kHeads* kHeadDim},    {kInter, kHidden},             {kInter, kHidden},
                                                  {kHidden, kInter},              {kVocab, kHidden}};
constexpr WeightFormat kFormats[kNumLayerTargets] = {WeightFormat::kInt8,       WeightFormat::kInt8Group16, WeightFormat::kBF16,   WeightFormat::kInt4,
                                                     WeightFormat::kInt4MinF32, WeightFormat::kInt8Min,     WeightFormat::kInt4Min};
constexpr int kHead = static_cast<int>(Target::kLmHead);
constexpr int kNumAdapters = 8;

template <typename Bytes>
int64_t append(std::vector<uint8_t>& file, const Bytes& bytes) {
  file.resize((file.size() + 63) / 64 * 64);
  const auto offset = static_cast<int64_t>(file.size());
  file.insert(file.end(), bytes.begin(), bytes.end());
  return offset;
}

// What a projection of one adapter does, in the numbers that its file holds.
struct Change {
  AdapterModuleSpec spec;
  std::vector<float> a, b, magnitude, bias;  // [rank, K], [N, rank], [N], [N]
  std::vector<double> a8, b8;                // a and b as int8 adapters have them
};
using Voice = std::vector<std::pair<int, float>>;  // adapter and weight

struct Layer64 {
  Matrix projections[kNumLayerTargets];
  std::vector<float> attention_norm, mlp_norm, q_bias;
};

// Which rows' logits and hidden states are wanted.
struct Wanted {
  std::function<bool(int32_t row)> logits = [](int32_t) { return true; };
  std::function<bool(int32_t row)> hidden = [](int32_t) { return false; };
};

class SmallModel : public testing::Test {
 protected:
  SmallModel() {
    add_matrix(embedding_, "embedding", -1, WeightFormat::kF32, kVocab, kHidden);
    add_matrix(lm_head_, "lm_head", -1, WeightFormat::kInt8, kVocab, kHidden);
    add_vector(final_norm_, "final_norm", -1, kHidden);
    for (int l = 0; l < kLayers; ++l) {
      Layer64& layer = layers_[l];
      for (int t = 0; t < kNumLayerTargets; ++t)
        add_matrix(layer.projections[t], target_name(static_cast<Target>(t)), l, kFormats[t], kShapes[t][0], kShapes[t][1]);
      add_vector(layer.attention_norm, "attention_norm", l, kHidden);
      add_vector(layer.mlp_norm, "mlp_norm", l, kHidden);
      add_vector(layer.q_bias, "q_bias", l, kHeads * kHeadDim);
    }
    dims_ = {kLayers, kHidden, kInter, kHeads, kKvHeads, kHeadDim, kVocab, 1000, 1e-5f, 0.05f, 1.5f, false, {0, kWindow}, {0, 0}, {{{}, 1}}};
    for (int i = 0; i < kHeadDim / 2; ++i) dims_.rope_tables[0].inverse_frequencies.push_back(static_cast<float>(std::pow(100.0, -i / 8.0)));

    // One adapter with biases on everything, of a rank that is not a whole vector; one with gains on some projections.
    for (int l = 0; l < kLayers; ++l)
      for (int t = 0; t < kNumLayerTargets; ++t) add_change(0, l, t, 20, ElementType::kBF16, false, t % 2 == 0);
    add_change(0, -1, kHead, 3, ElementType::kF32, false, true);
    for (int l = 0; l < kLayers; ++l)
      for (const int t : {0, 3, 6}) add_change(1, l, t, 4, ElementType::kF16, true, t == 3);
  }

  std::unique_ptr<Model> open(bool reference_mode, int num_threads, KvType kv_type = KvType::kF16, bool int8_adapters = false,
                              size_t host_memory_bytes = 0, size_t weight_memory_bytes = 0) {
    const TemporaryFile file("packed", packed_);
    return std::make_unique<Model>(file.path(), dims_, tensors_, reference_mode, reference_mode ? KvType::kF32 : kv_type, 32 << 20, num_threads,
                                   int8_adapters, host_memory_bytes, weight_memory_bytes);
  }

  std::vector<AdapterModuleSpec> specs_of(int adapter) const {
    std::vector<AdapterModuleSpec> specs;
    for (const auto& change : changes_[adapter]) specs.push_back(change.spec);
    return specs;
  }

  std::shared_ptr<Adapter> load(const Model& model, int adapter, const std::vector<int32_t>& pages) const {
    const TemporaryFile file("adapter", adapter_bytes_);
    return load_adapter(model, file.path(), specs_of(adapter), pages);
  }

  std::vector<std::shared_ptr<Adapter>> load_adapters(const Model& model) {
    const TemporaryFile file("adapters", adapter_bytes_);
    std::vector<std::shared_ptr<Adapter>> adapters;
    int32_t page = 64;
    // Both, and then the first again and again, each time as another adapter.
    for (int i = 0; i < kNumAdapters; ++i) {
      const std::vector<AdapterModuleSpec> specs = specs_of(i == 1 ? 1 : 0);
      std::vector<int32_t> pages;
      for (int64_t n = adapter_size(model, specs).num_pages; n > 0; --n) pages.push_back(page++);
      adapters.push_back(load_adapter(model, file.path(), specs, pages));
    }
    return adapters;
  }

  // Sequence s has counts[s] tokens, a block of pages of its own, and voices[s].
  StepOutput run(Model& model, const std::vector<int>& counts, const std::vector<Voice>& voices, const Wanted& wanted = {}) {
    return run_with(model, load_adapters(model), counts, voices, wanted);
  }
  StepOutput run_with(Model& model, const std::vector<std::shared_ptr<Adapter>>& loaded, const std::vector<int>& counts,
                      const std::vector<Voice>& voices, const Wanted& wanted = {}) {
    std::vector<int32_t> hidden_rows, tokens, positions, starts{0}, block_starts{0}, blocks, adapter_starts{0}, handles, rows;
    std::vector<float> weights;
    std::vector<const Adapter*> adapters;
    for (size_t s = 0; s < counts.size(); ++s) {
      for (int i = 0; i < counts[s]; ++i) {
        const auto row = static_cast<int32_t>(tokens.size());
        if (wanted.logits(row)) rows.push_back(row);
        if (wanted.hidden(row)) hidden_rows.push_back(row);
        tokens.push_back(token(i));
        positions.push_back(i);
      }
      starts.push_back(static_cast<int32_t>(tokens.size()));
      for (int i = 0; i <= (counts[s] - 1) / kBlockTokens; ++i) blocks.push_back(static_cast<int32_t>(s * 4 + i));
      block_starts.push_back(static_cast<int32_t>(blocks.size()));
      for (const auto& [adapter, weight] : voices[s]) {
        handles.push_back(adapter);
        weights.push_back(weight);
        adapters.push_back(loaded[adapter].get());
      }
      adapter_starts.push_back(static_cast<int32_t>(handles.size()));
    }
    const size_t n = rows.size();
    const std::vector<float> zeros(n), ones(n, 1);
    const std::vector<int32_t> none(n), no_starts(n + 1);
    const std::vector<uint64_t> seeds(n);
    Batch batch;
    batch.token_ids = tokens, batch.positions = positions, batch.sequence_starts = starts;
    batch.block_starts = block_starts, batch.block_ids = blocks;
    batch.adapter_starts = adapter_starts, batch.adapter_handles = handles, batch.adapter_weights = weights;
    batch.sample_rows = rows, batch.hidden_rows = hidden_rows, batch.temperature = zeros, batch.top_p = ones, batch.min_p = zeros;
    batch.repetition_penalty = ones, batch.presence_penalty = zeros, batch.frequency_penalty = zeros;
    batch.top_k = none, batch.num_top = none, batch.seeds = seeds, batch.bias_starts = no_starts;
    batch.history_starts = no_starts, batch.history_prompt_counts = none;
    batch.want_logits = true;
    StepOutput output;
    model.step(batch, adapters, output);
    return output;
  }

  ModelDims dims_;

  static int32_t token(int i) { return (i * 37 + 11) % kVocab; }

  // Logits of each row of one sequence.
  std::vector<Doubles> forward(int count, const Voice& voice, bool int8_adapters = false) {
    has_int8_adapters_ = int8_adapters;
    std::vector<Doubles> x(count, Doubles(kHidden));
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < kHidden; ++i) x[r][i] = double{embedding_.weight(token(r), i)} * dims_.embedding_scale;
    for (int l = 0; l < kLayers; ++l) {
      const Layer64& layer = layers_[l];
      std::vector<Doubles> q, k, v;
      for (int r = 0; r < count; ++r) {
        const Doubles h = norm(x[r], layer.attention_norm);
        q.push_back(rotate(project(l, 0, h, voice, layer.q_bias), r));
        k.push_back(rotate(project(l, 1, h, voice), r));
        v.push_back(project(l, 2, h, voice));
      }
      for (int r = 0; r < count; ++r) {
        Doubles attended(kHeads * kHeadDim);
        for (int head = 0; head < kHeads; ++head) {
          const int kv = head / (kHeads / kKvHeads) * kHeadDim;
          const int first = dims_.sliding_windows[l] ? std::max(0, r - dims_.sliding_windows[l] + 1) : 0;
          Doubles weight;
          double sum = 0;
          for (int p = first; p <= r; ++p) {
            double dot = 0;
            for (int d = 0; d < kHeadDim; ++d) dot += q[r][head * kHeadDim + d] * k[p][kv + d];
            weight.push_back(std::exp(dot * dims_.attention_scale));
            sum += weight.back();
          }
          for (int p = first; p <= r; ++p)
            for (int d = 0; d < kHeadDim; ++d) attended[head * kHeadDim + d] += weight[p - first] / sum * v[p][kv + d];
        }
        add(x[r], project(l, 3, attended, voice));
        const Doubles h = norm(x[r], layer.mlp_norm);
        Doubles gate = project(l, 4, h, voice);
        const Doubles up = project(l, 5, h, voice);
        for (int i = 0; i < kInter; ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
        add(x[r], project(l, 6, gate, voice));
      }
    }
    std::vector<Doubles> logits;
    for (const auto& row : x) logits.push_back(project(-1, kHead, norm(row, final_norm_), voice));
    return logits;
  }

  // More layers than the plain forward pass knows, for what compares a model with itself. Norms and biases lie between the matrices.
  void add_layers(int count) {
    for (; count > 0; --count) {
      const int l = dims_.num_layers++;
      dims_.sliding_windows.push_back(l % 2 ? kWindow : 0);
      dims_.rope_table_index.push_back(0);
      Matrix matrix;
      std::vector<float> vector;
      add_vector(vector, "attention_norm", l, kHidden);
      for (int t = 0; t < kNumLayerTargets; ++t) {
        if (t == kNumLayerTargets / 2) add_vector(vector, "mlp_norm", l, kHidden);
        add_matrix(matrix, target_name(static_cast<Target>(t)), l, kFormats[(t + l) % kNumLayerTargets], kShapes[t][0], kShapes[t][1]);
      }
      add_vector(vector, "q_bias", l, kHeads * kHeadDim);
      for (const int t : {1, 2, 5}) add_change(1, l, t, 4, ElementType::kF16, true, t == 2);  // gains, for which a load reads the base's weights
    }
  }
  size_t packed_size() const { return packed_.size(); }

 private:
  void add_matrix(Matrix& matrix, const char* role, int layer, WeightFormat format, int n, int k) {
    matrix = reference::random_matrix(random_, format, n, k);
    if (!is_quantized(format))
      for (float& w : matrix.values) w = reference::round_to(ElementType::kBF16, w * 0.25f);
    const auto bytes = reference::pack(matrix);
    const int64_t offset = append(packed_, bytes);
    tensors_.push_back({role, layer, false, format, n, k, offset, static_cast<int64_t>(bytes.size())});
  }
  void add_vector(std::vector<float>& vector, const char* role, int layer, int n) {
    vector = random_.normals(n, 0.3f);
    for (float& w : vector) w += 1;
    const auto bytes = reference::encode(ElementType::kF32, vector);
    const int64_t offset = append(packed_, bytes);
    tensors_.push_back({role, layer, true, WeightFormat::kF32, 1, n, offset, static_cast<int64_t>(bytes.size())});
  }
  void add_change(int adapter, int layer, int target, int rank, ElementType type, bool has_gain, bool has_bias) {
    const int n = kShapes[target][0], k = kShapes[target][1];
    Change change;
    change.spec = {layer, static_cast<Target>(target), rank, 0.5f, type, -1, -1, -1, -1, ElementType::kF32, ElementType::kF32};
    const auto put = [&](std::vector<float>& out, size_t count, float scale, ElementType as) {
      out = random_.normals(count, scale);
      for (float& x : out) x = reference::round_to(as, x);
      return append(adapter_bytes_, reference::encode(as, out));
    };
    change.spec.a_offset = put(change.a, static_cast<size_t>(rank) * k, 0.2f, type);
    change.spec.b_offset = put(change.b, static_cast<size_t>(rank) * n, 0.2f, type);
    if (has_gain) change.spec.magnitude_offset = put(change.magnitude, n, 5, ElementType::kF32);
    if (has_bias) change.spec.bias_offset = put(change.bias, n, 1, ElementType::kF32);
    change.a8.assign(change.a.begin(), change.a.end()), change.b8.assign(change.b.begin(), change.b.end());
    for (int r = 0; r < rank; ++r) {
      round_to_int8(change.a8, static_cast<size_t>(r) * k, 1, k);
      for (int first = 0; first < n; first += kLoraTileColumns)
        round_to_int8(change.b8, static_cast<size_t>(first) * rank + r, rank, std::min(kLoraTileColumns, n - first));
    }
    changes_[adapter].push_back(std::move(change));
  }

  // `count` numbers that share a scale, from `first` on, `step` apart.
  static void round_to_int8(Doubles& numbers, size_t first, size_t step, int count) {
    double greatest = 0;
    for (int i = 0; i < count; ++i) greatest = std::max(greatest, std::fabs(numbers[first + i * step]));
    for (int i = 0; i < count; ++i) {
      double& x = numbers[first + i * step];
      x = std::nearbyint(x * 127 / greatest) * greatest / 127;
    }
  }
  static void add(Doubles& x, const Doubles& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  Doubles norm(const Doubles& x, const std::vector<float>& weight) const {
    double sum = 0;
    for (const double v : x) sum += v * v;
    Doubles out;
    for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] / std::sqrt(sum / static_cast<double>(x.size()) + double{dims_.norm_eps}) * weight[i]);
    return out;
  }
  Doubles rotate(Doubles x, int position) const {
    constexpr int kHalf = kHeadDim / 2;
    for (size_t head = 0; head < x.size(); head += kHeadDim) {
      for (int i = 0; i < kHalf; ++i) {
        const double angle = position * double{dims_.rope_tables[0].inverse_frequencies[i]};
        const double low = x[head + i], high = x[head + i + kHalf];
        x[head + i] = low * std::cos(angle) - high * std::sin(angle);
        x[head + i + kHalf] = high * std::cos(angle) + low * std::sin(angle);
      }
    }
    return x;
  }
  Doubles project(int layer, int target, const Doubles& x, const Voice& voice, const std::vector<float>& bias = {}) const {
    const Matrix& w = target == kHead ? lm_head_ : layers_[layer].projections[target];
    const int n = kShapes[target][0], k = kShapes[target][1];
    Doubles base(n);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < k; ++j) base[i] += double{w.weight(i, j)} * x[j];
    Doubles y = base;
    for (const auto& [adapter, weight] : voice) {
      for (const Change& c : changes_[adapter]) {
        if (c.spec.layer != layer || static_cast<int>(c.spec.target) != target) continue;
        Doubles shrunk(c.spec.rank);
        for (int r = 0; r < c.spec.rank; ++r)
          for (int j = 0; j < k; ++j) shrunk[r] += (has_int8_adapters_ ? c.a8[size_t(r) * k + j] : double{c.a[size_t(r) * k + j]}) * x[j];
        for (int i = 0; i < n; ++i) {
          double delta = c.bias.empty() ? 0 : c.bias[i];
          for (int r = 0; r < c.spec.rank; ++r)
            delta += (has_int8_adapters_ ? c.b8[size_t(i) * c.spec.rank + r] : double{c.b[size_t(i) * c.spec.rank + r]}) * shrunk[r];
          delta *= c.spec.scaling;
          if (!c.magnitude.empty()) {
            double sum = 0;
            for (int j = 0; j < k; ++j) {
              double changed = w.weight(i, j);
              for (int r = 0; r < c.spec.rank; ++r)
                changed += double{c.spec.scaling} * c.b[size_t(i) * c.spec.rank + r] * c.a[size_t(r) * k + j];
              sum += changed * changed;
            }
            const double gain = c.magnitude[i] / std::sqrt(sum);
            delta = gain * delta + (gain - 1) * base[i];
          }
          y[i] += weight * delta;
        }
      }
    }
    for (size_t i = 0; i < bias.size(); ++i) y[i] += bias[i];
    return y;
  }

  Random random_{2024};
  Matrix embedding_, lm_head_;
  std::vector<float> final_norm_;
  Layer64 layers_[kLayers];
  std::vector<Change> changes_[2];
  bool has_int8_adapters_ = false;
  std::vector<uint8_t> packed_, adapter_bytes_;
  std::vector<PackedTensorSpec> tensors_;
};

// Base, one adapter, the same with other weights, both, and the same adapter twice in one row; one row and many.
const std::vector<int> kCounts = {18, 1, 7, 9, 3, 34};
const std::vector<Voice> kVoices = {{}, {{0, 1.0f}}, {{0, -0.5f}}, {{0, 0.7f}, {1, 0.4f}, {0, 0.2f}}, {{1, 1.0f}}, {{1, 0.5f}, {0, 1.0f}}};

class ReferenceMode : public SmallModel {
 protected:
  // Greatest difference of a logit, as a share of the greatest logit of its row.
  void expect_matches(const StepOutput& output, bool int8_adapters) {
    size_t row = 0;
    for (size_t s = 0; s < kCounts.size(); ++s) {
      const auto expected = forward(kCounts[s], kVoices[s], int8_adapters);
      for (int r = 0; r < kCounts[s]; ++r, ++row) {
        double greatest = 0, error = 0;
        for (int i = 0; i < kVocab; ++i) {
          greatest = std::max(greatest, std::fabs(expected[r][i]));
          error = std::max(error, std::fabs(expected[r][i] - double{output.logits[row * kVocab + i]}));
        }
        EXPECT_LT(error, 1e-4 * greatest) << "sequence " << s << " row " << r;
      }
    }
  }
};

TEST_F(ReferenceMode, MatchesDoublePrecision) { expect_matches(run(*open(true, 2), kCounts, kVoices), false); }

// Two numbers that round to other integers than in the test's arithmetic would show: rounding is the same.
TEST_F(ReferenceMode, MatchesDoublePrecisionWithAdaptersRoundedToInt8) {
  const auto model = open(true, 2, KvType::kF32, true), as_they_are = open(true, 2);
  const StepOutput output = run(*model, kCounts, kVoices);
  expect_matches(output, true);
  const size_t base_rows = static_cast<size_t>(kCounts[0]) * kVocab;
  const std::vector<float> others = run(*as_they_are, kCounts, kVoices).logits;
  EXPECT_EQ(std::memcmp(output.logits.data(), others.data(), base_rows * sizeof(float)), 0);
  EXPECT_NE(std::memcmp(output.logits.data() + base_rows, others.data() + base_rows, (others.size() - base_rows) * sizeof(float)), 0);
}

// Half the bytes, and a few for scales: more adapters fit.
TEST_F(SmallModel, Int8AdaptersTakeFewerPages) {
  std::vector<AdapterModuleSpec> specs;
  for (int l = 0; l < kLayers; ++l)
    for (int t = 0; t < kNumLayerTargets; ++t) specs.push_back({l, static_cast<Target>(t), 500, 1, ElementType::kBF16, 0, 0, -1, -1, ElementType::kF32, ElementType::kF32});
  const int64_t pages = adapter_size(*open(false, 1), specs).num_pages, int8_pages = adapter_size(*open(false, 1, KvType::kF16, true), specs).num_pages;
  EXPECT_LE(int8_pages, pages * 6 / 10);
  EXPECT_GE(int8_pages, pages / 2);
}

// What fragments is the end of a page where the next piece did not fit.
TEST_F(SmallModel, AdaptersWasteLessThanAPieceOfEachPage) {
  const auto model = open(false, 1);
  std::vector<AdapterModuleSpec> specs;
  for (int l = 0; l < kLayers; ++l)
    for (int t = 0; t < kNumLayerTargets; ++t) specs.push_back({l, static_cast<Target>(t), 500, 1, ElementType::kBF16, 0, 0, -1, -1, ElementType::kF32, ElementType::kF32});
  const auto [num_pages, num_bytes] = adapter_size(*model, specs);
  const int64_t page_bytes = model->page_bytes(), piece_bytes = int64_t{500} * 64 * 2;
  EXPECT_GT(num_pages, 1);
  EXPECT_LE(num_bytes, num_pages * page_bytes);
  EXPECT_GT(num_bytes, (num_pages - 1) * (page_bytes - piece_bytes));
}

TEST_F(SmallModel, GivesTheSameBitsOnAnyNumberOfThreads) {
  struct Mode {
    bool reference;
    KvType kv_type;
    bool int8_adapters;
  };
  for (const Mode& mode : {Mode{false, KvType::kF16, false}, {false, KvType::kInt8, true}, {true, KvType::kF32, false}}) {
    std::vector<float> first;
    for (const int num_threads : {1, 2, 3, 7}) {
      const auto model = open(mode.reference, num_threads, mode.kv_type, mode.int8_adapters);
      const std::vector<float> logits = run(*model, kCounts, kVoices).logits;
      if (first.empty()) first = logits;
      ASSERT_EQ(logits.size(), first.size());
      EXPECT_EQ(std::memcmp(logits.data(), first.data(), logits.size() * sizeof(float)), 0) << num_threads << " threads";
    }
  }
}

TEST_F(SmallModel, GivesTheSameBitsHoweverManyLayersStream) {
  add_layers(7);
  for (const bool reference_mode : {false, true}) {
    const KvType kv_type = reference_mode ? KvType::kF32 : KvType::kF16;
    const auto mapped = open(reference_mode, 2);
    const StepOutput expected = run(*mapped, kCounts, kVoices), one_row = run(*mapped, {1}, {{}});
    EXPECT_EQ(mapped->stream(), nullptr);
    EXPECT_EQ(open(reference_mode, 2, kv_type, false, 0, packed_size())->stream(), nullptr);
    size_t least = 0;
    try {
      open(reference_mode, 2, kv_type, false, 0, 1);
      FAIL() << "a budget of one byte is enough";
    } catch (const RuntimeError& e) {
      ASSERT_EQ(std::sscanf(e.what(), "weight memory: expected at least %zu bytes", &least), 1) << e.what();
    }
    EXPECT_THROW(open(reference_mode, 2, kv_type, false, 0, least - 1), RuntimeError);
    std::vector<bool> residents(9, true);
    for (const size_t budget : {least, (least + packed_size()) / 2, packed_size() - 1}) {
      const auto model = open(reference_mode, 2, kv_type, false, 0, budget);
      ASSERT_NE(model->stream(), nullptr);
      const auto& plan = model->stream()->plan();
      EXPECT_LE(plan.resident_bytes + kNumWeightSlots * plan.slot_bytes, budget);
      EXPECT_NE(plan.is_resident, residents);  // of the budget before
      residents = plan.is_resident;
      const auto adapters = load_adapters(*model);
      // One row and many in turn: only few rows look ahead. The ring goes on from where the step before has left it.
      for (int i = 0; i < 3; ++i) {
        const StepOutput many = run_with(*model, adapters, kCounts, kVoices), one = run_with(*model, adapters, {1}, {{}});
        EXPECT_EQ(std::memcmp(many.logits.data(), expected.logits.data(), expected.logits.size() * sizeof(float)), 0) << budget << " bytes, step " << i;
        EXPECT_EQ(std::memcmp(one.logits.data(), one_row.logits.data(), one_row.logits.size() * sizeof(float)), 0) << budget << " bytes, step " << i;
      }
    }
  }
}

TEST_F(SmallModel, Int8KvHasSmallerPagesAndStaysCloseToF16) {
  const auto f16 = open(false, 2), int8 = open(false, 2, KvType::kInt8);
  EXPECT_EQ(f16->page_bytes(), 256u * 1024);
  EXPECT_EQ(int8->page_bytes(), 128u * 1024);
  const std::vector<float> a = run(*f16, kCounts, kVoices).logits, b = run(*int8, kCounts, kVoices).logits;
  double squares = 0, errors = 0;
  for (size_t i = 0; i < a.size(); ++i) squares += double{a[i]} * a[i], errors += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
  EXPECT_GT(errors, 0);
  EXPECT_LT(std::sqrt(errors / squares), 0.06);  // of random weights, whose logits hang on every bit
}

TEST_F(SmallModel, RefusesInt8KvOfHeadsThatOverflowItsScores) {
  dims_.head_dim = 528;
  EXPECT_THROW(open(false, 1, KvType::kInt8), RuntimeError);
}

// More rows than one pass over the weights takes: a sequence with adapters goes on in the next one.
TEST_F(SmallModel, ManyRowsGiveTheBitsOfEachSequenceAlone) {
  const std::vector<int> counts(12, 30);
  ASSERT_GT(12 * 30, pass_rows(kHidden, kActivationGroup));
  std::vector<Voice> voices;
  for (size_t s = 0; s < counts.size(); ++s) voices.push_back(kVoices[(s + 3) % kVoices.size()]);
  const auto model = open(false, 3);
  const std::vector<float> together = run(*model, counts, voices).logits;
  for (size_t s = 0; s < counts.size(); ++s) {
    const std::vector<float> alone = run(*model, {30}, {voices[s]}).logits;
    EXPECT_EQ(std::memcmp(&together[s * 30 * kVocab], alone.data(), alone.size() * sizeof(float)), 0) << "sequence " << s;
  }
}

// In the last layer rows that nobody reads end with their keys and values.
TEST_F(SmallModel, RowsThatAreWantedHaveTheSameBitsWhateverElseIs) {
  constexpr int32_t kRows = 18 + 1 + 7 + 9 + 3 + 34;
  const auto none = [](int32_t) { return false; };
  const auto all = [](int32_t) { return true; };
  const auto ends = [](int32_t row) { return row == 17 || row == 18 || row == 25 || row == 34 || row == 37 || row == 71; };
  const auto some = [](int32_t row) { return row == 3 || row == 20 || (row >= 40 && row < 43); };
  for (const auto& [reference_mode, last_window] : {std::pair(false, kWindow), {false, 0}, {true, 0}}) {
    dims_.sliding_windows.back() = last_window;  // 0: as in the layer before
    const auto whole = open(reference_mode, 2);
    const StepOutput expected = run(*whole, kCounts, kVoices, {all, all});
    for (const Wanted& wanted : {Wanted{ends, none}, {none, ends}, {ends, some}, {some, ends}, {some, none}, {some, all}, {all, some}, {none, none}}) {
      for (const int num_threads : {1, 3}) {
        const auto model = open(reference_mode, num_threads);
        const StepOutput output = run(*model, kCounts, kVoices, wanted);
        const float *logits = output.logits.data(), *hidden = output.hidden.data();
        for (int32_t row = 0; row < kRows; ++row) {
          if (wanted.logits(row)) {
            EXPECT_EQ(std::memcmp(logits, &expected.logits[size_t(row) * kVocab], kVocab * sizeof(float)), 0) << "row " << row;
            logits += kVocab;
          }
          if (wanted.hidden(row)) {
            EXPECT_EQ(std::memcmp(hidden, &expected.hidden[size_t(row) * kHidden], kHidden * sizeof(float)), 0) << "row " << row;
            hidden += kHidden;
          }
        }
        EXPECT_EQ(logits, output.logits.data() + output.logits.size());
        EXPECT_EQ(hidden, output.hidden.data() + output.hidden.size());
      }
    }
  }
}

// Adapters of one row each are read side by side, however many are left over.
TEST_F(SmallModel, AdaptersSideBySideGiveTheBitsOfOneAlone) {
  for (const bool int8_adapters : {false, true}) {
    const auto model = open(false, 2, KvType::kF16, int8_adapters);
    const std::vector<float> alone = run(*model, {1}, {{{0, 0.6f}}}).logits;
    for (const int count : {2, 4, 6}) {
      std::vector<Voice> voices = {{{1, 1.0f}}};
      for (int i = 0; i < count; ++i) voices.push_back({{2 + i, 0.6f}});
      const std::vector<float> together = run(*model, std::vector<int>(voices.size(), 1), voices).logits;
      for (int i = 1; i <= count; ++i)
        EXPECT_EQ(std::memcmp(&together[size_t(i) * kVocab], alone.data(), kVocab * sizeof(float)), 0) << count << " adapters, row " << i;
    }
  }
}

// Down to the host arena and up to other pages, not one after another: the adapter is what it was, to the bit.
TEST_F(SmallModel, AnAdapterThatWasInTheHostArenaGivesTheSameBits) {
  for (const bool int8_adapters : {false, true}) {
    const auto model = open(false, 2, KvType::kF16, int8_adapters, 8 << 20);
    EXPECT_EQ(model->num_host_pages(), static_cast<int64_t>((8u << 20) / model->page_bytes()));
    std::vector<int32_t> pages, host_pages, other_pages;
    for (int32_t i = 0; i < static_cast<int32_t>(adapter_size(*model, specs_of(0)).num_pages); ++i) {
      pages.push_back(64 + i), host_pages.push_back(i * 5 % 16), other_pages.push_back(100 - 3 * i);
    }
    const std::vector<float> expected = run_with(*model, {load(*model, 0, pages)}, kCounts, {{}, {{0, 1.0f}}, {}, {{0, 2.0f}}, {}, {}}).logits;
    copy_pages(*model, Tier::kDevice, pages, host_pages);
    clear_pages(*model, Tier::kDevice, pages);
    copy_pages(*model, Tier::kHost, host_pages, other_pages);
    const auto attached = attach_adapter(*model, specs_of(0), other_pages);
    EXPECT_EQ(run_with(*model, {attached}, kCounts, {{}, {{0, 1.0f}}, {}, {{0, 2.0f}}, {}, {}}).logits, expected);
  }
}

// Runs rows [begin, end) of one sequence; returns their logits, or the last one's.
std::vector<float> run_rows(Model& model, int begin, int end, const std::vector<int32_t>& blocks, const std::vector<int32_t>& staging, int32_t (*token)(int),
                            int64_t* staged_bytes = nullptr, bool only_last = false) {
  std::vector<int32_t> tokens, positions, rows;
  for (int i = begin; i < end; ++i) {
    tokens.push_back(token(i)), positions.push_back(i);
    if (!only_last || i + 1 == end) rows.push_back(i - begin);
  }
  const std::vector<int32_t> starts{0, end - begin}, block_starts{0, static_cast<int32_t>(blocks.size())}, no_adapters{0, 0};
  const size_t n = rows.size();
  const std::vector<float> zeros(n), ones(n, 1);
  const std::vector<int32_t> none(n), no_starts(n + 1);
  const std::vector<uint64_t> seeds(n);
  Batch batch;
  batch.token_ids = tokens, batch.positions = positions, batch.sequence_starts = starts;
  batch.block_starts = block_starts, batch.block_ids = blocks, batch.staging_pages = staging, batch.adapter_starts = no_adapters;
  batch.sample_rows = rows, batch.temperature = zeros, batch.top_p = ones, batch.min_p = zeros;
  batch.repetition_penalty = ones, batch.presence_penalty = zeros, batch.frequency_penalty = zeros;
  batch.top_k = none, batch.num_top = none, batch.seeds = seeds, batch.bias_starts = no_starts;
  batch.history_starts = no_starts, batch.history_prompt_counts = none;
  batch.want_logits = true;
  StepOutput output;
  model.step(batch, {}, output);
  if (staged_bytes) *staged_bytes = output.staged_bytes;
  return output.logits;
}

// A sequence of 40 blocks with never more than 10 of them on the device: older ones go down as new ones come.
TEST_F(SmallModel, ASequenceBiggerThanItsDevicePagesGivesTheSameBits) {
  constexpr int kTokens = 640, kChunk = 90, kWindowBlocks = 10;
  add_layers(1);  // so that the last one has no window
  const std::pair<KvType, bool> cases[] = {{KvType::kF16, false}, {KvType::kF16, true}, {KvType::kInt8, false}, {KvType::kF32, false}, {KvType::kF32, true}};
  for (const auto& [type, only_last] : cases) {
    std::vector<int32_t> all;
    for (int i = 0; i < kTokens / kBlockTokens; ++i) all.push_back(i);
    const bool reference = type == KvType::kF32;
    const auto whole = open(reference, 1, type), model = open(reference, 2, type, false, 12 << 20);
    const std::vector<float> expected = run_rows(*whole, 0, kTokens, all, {}, token);
    const std::vector<int32_t> staging = {50, 60};
    ASSERT_LE(model->min_staging_pages(), 2);
    std::vector<int32_t> table;
    std::vector<float> logits, expected_of_rows;
    int num_on_host = 0;
    for (int begin = 0, end; begin < kTokens; begin = end) {
      end = begin + kChunk > 600 ? begin + 1 : begin + kChunk;  // decodes at the end
      const int num_blocks = (end - 1) / kBlockTokens + 1;
      while (static_cast<int>(table.size()) < num_blocks) {
        if (static_cast<int>(table.size()) - num_on_host == kWindowBlocks) {
          const std::vector<int32_t> from = {table[num_on_host]}, to = {(num_on_host * 7) % 48};
          copy_pages(*model, Tier::kDevice, from, to);
          clear_pages(*model, Tier::kDevice, from);
          table[num_on_host++] = static_cast<int32_t>(model->num_pages()) + to[0];
        }
        table.push_back(static_cast<int32_t>(table.size()) % kWindowBlocks);
      }
      int64_t staged_bytes = -1;
      const std::vector<float> rows = run_rows(*model, begin, end, table, staging, token, &staged_bytes, only_last);
      logits.insert(logits.end(), rows.begin(), rows.end());
      expected_of_rows.insert(expected_of_rows.end(), expected.begin() + int64_t{only_last ? end - 1 : begin} * kVocab, expected.begin() + int64_t{end} * kVocab);
      // All of them in the first and the last layer; in the second its window hides them, but from the first rows of a chunk.
      const auto slice = static_cast<int64_t>(2 * kv_side_bytes(type, kKvHeads, kHeadDim));
      EXPECT_GE(staged_bytes, 2 * num_on_host * slice);
      EXPECT_EQ(staged_bytes > 0, num_on_host > 0);
    }
    EXPECT_GE(num_on_host, 30);
    ASSERT_EQ(logits.size(), expected_of_rows.size());
    EXPECT_EQ(std::memcmp(logits.data(), expected_of_rows.data(), logits.size() * sizeof(float)), 0) << "type " << static_cast<int>(type);
  }
}

TEST_F(SmallModel, RefusesHostPagesThatAreWrittenOrHaveNoStagingByName) {
  const auto model = open(false, 1, KvType::kF16, false, 2 << 20);
  const int32_t host = static_cast<int32_t>(model->num_pages());
  const auto refusal = [&](int begin, const std::vector<int32_t>& blocks, const std::vector<int32_t>& staging) -> std::string {
    try {
      run_rows(*model, begin, begin + 3, blocks, staging, token);
    } catch (const RuntimeError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(refusal(16, {host, 1}, {2}), "");
  EXPECT_NE(refusal(15, {host, 1}, {2}).find("blockIds: expected a page of the device for block 0 of sequence 0"), std::string::npos);
  EXPECT_NE(refusal(16, {0, 1, host + 3}, {2}).find("got host page 3"), std::string::npos);
  EXPECT_NE(refusal(16, {host + 8, 1}, {2}).find("blockIds: expected 0 to 135, got 136"), std::string::npos);
  EXPECT_NE(refusal(16, {host, 1}, {}).find("stagingPages: expected at least 1"), std::string::npos);
  EXPECT_NE(refusal(16, {host, 1}, {1}).find("stagingPages: expected distinct pages"), std::string::npos);
  EXPECT_NE(refusal(16, {host, 1}, {2, 2}).find("stagingPages: expected distinct pages"), std::string::npos);
  EXPECT_NE(refusal(16, {0, 1}, {host}).find("stagingPages: expected 0 to 127"), std::string::npos);
}

// Nor in the gaps between its pieces: what a page held before belongs to somebody else.
TEST_F(SmallModel, AnAdapterLeavesNothingOfWhatItsPagesHeld) {
  const auto model = open(false, 1);
  std::vector<int32_t> pages, other_pages;
  for (int64_t n = adapter_size(*model, specs_of(1)).num_pages; n > 0; --n) pages.push_back(n), other_pages.push_back(20 + n);
  const size_t page_bytes = model->page_bytes();
  uint8_t* arena = model->device().arena();
  for (const int32_t page : pages) std::memset(arena + page * page_bytes, 0xAB, page_bytes);
  load(*model, 1, pages);
  load(*model, 1, other_pages);
  for (size_t i = 0; i < pages.size(); ++i)
    EXPECT_EQ(std::memcmp(arena + pages[i] * page_bytes, arena + other_pages[i] * page_bytes, page_bytes), 0) << "page " << i;
}

TEST_F(SmallModel, PagesAreCopiedAndClearedAlone) {
  const auto model = open(false, 1, KvType::kF16, false, 2 << 20);
  const size_t page_bytes = model->page_bytes();
  std::vector<uint8_t> written(3 * page_bytes), read(3 * page_bytes);
  for (size_t i = 0; i < written.size(); ++i) written[i] = static_cast<uint8_t>(i * 7 + i / page_bytes);
  const std::vector<int32_t> host_pages = {6, 7, 2}, device_pages = {3, 4, 9}, others = {0, 1, 5};
  write_host_pages(*model, host_pages, written.data());
  copy_pages(*model, Tier::kHost, host_pages, device_pages);
  clear_pages(*model, Tier::kHost, std::vector<int32_t>{7});
  copy_pages(*model, Tier::kDevice, device_pages, others);
  read_host_pages(*model, others, read.data());
  EXPECT_EQ(read, written);
  read_host_pages(*model, host_pages, read.data());
  for (size_t i = 0; i < read.size(); ++i) ASSERT_EQ(read[i], i / page_bytes == 1 ? 0 : written[i]) << i;
}

TEST_F(SmallModel, RefusesPagesThatAreNotThereOrTwice) {
  for (const std::vector<int32_t>& pages : {std::vector<int32_t>{8}, {-1}, {1, 1}}) EXPECT_THROW(check_pages(pages, 8, "from"), AdapterError);
  check_pages(std::vector<int32_t>{7, 0}, 8, "from");
  EXPECT_THROW(open(false, 1, KvType::kF16, false, 1000), RuntimeError);
}

TEST_F(SmallModel, RunsWithoutSamples) {
  const auto model = open(false, 2);
  const StepOutput output = run(*model, {5}, {{{0, 1.0f}}}, {[](int32_t) { return false; }});
  EXPECT_TRUE(output.tokens.empty());
  EXPECT_TRUE(output.logits.empty());
}

TEST_F(SmallModel, RefusesPositionsAtTheEndOfTheIntegers) {
  const auto model = open(false, 1);
  const std::vector<int32_t> tokens = {1, 2}, positions = {INT_MAX, INT_MIN}, starts = {0, 2}, blocks = {0}, block_starts = {0, 1}, none = {0, 0};
  Batch batch;
  batch.token_ids = tokens, batch.positions = positions, batch.sequence_starts = starts;
  batch.block_starts = block_starts, batch.block_ids = blocks, batch.adapter_starts = none;
  StepOutput output;
  EXPECT_THROW(model->step(batch, {}, output), RuntimeError);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which ends the program instead
TEST(CpuDevice, ABufferThatCouldNotGrowGrowsLater) {
  const auto device = make_cpu_device(4096, 1, false);
  Buffer buffer;
  device->grow(buffer, 16);
  EXPECT_THROW(device->grow(buffer, size_t{1} << 58), std::bad_alloc);
  device->grow(buffer, 8);
  ASSERT_NE(buffer.data, nullptr);
  EXPECT_EQ(buffer.data.get()[7], 0);
}
#endif

}  // namespace
}  // namespace motet
