#include "translate.h"

#include <algorithm>
#include <cmath>

namespace motet {
namespace {

const char* const kWeightFormatNames[kNumWeightFormats] = {"f32",          "f16",  "bf16",     "int4",         "int4_min",
                                                            "int4_min_f32", "int8", "int8_min", "int8_min_f32", "int8_group16"};
constexpr double kMaxSafeInteger = 9007199254740991.0;

ElementType to_element_type(const Napi::Env& env, const std::string& name, const char* key) {
  if (name == "f32") return ElementType::kF32;
  if (name == "f16") return ElementType::kF16;
  if (name == "bf16") return ElementType::kBF16;
  throw Napi::TypeError::New(env, std::string(key) + ": expected 'f32', 'f16' or 'bf16', got '" + name + "'");
}

template <typename T>
constexpr napi_typedarray_type array_type() {
  if constexpr (std::is_same_v<T, int32_t>) return napi_int32_array;
  else if constexpr (std::is_same_v<T, float>) return napi_float32_array;
  else if constexpr (std::is_same_v<T, double>) return napi_float64_array;
  else return napi_biguint64_array;
}
template <typename T>
constexpr const char* array_name() {
  if constexpr (std::is_same_v<T, int32_t>) return "an Int32Array";
  else if constexpr (std::is_same_v<T, float>) return "a Float32Array";
  else if constexpr (std::is_same_v<T, double>) return "a Float64Array";
  else return "a BigUint64Array";
}

}  // namespace

Fields::Fields(const Napi::Value& value, const std::string& name) : name_(name) {
  if (!value.IsObject()) throw Napi::TypeError::New(value.Env(), name + ": expected an object");
  object_ = value.As<Napi::Object>();
}

void Fields::refuse(const char* key, const std::string& expected) const {
  throw Napi::TypeError::New(object_.Env(), name_ + "." + key + ": expected " + expected + ", got " + get(key).ToString().Utf8Value().substr(0, 80));
}

Napi::Value Fields::get(const char* key) const { return object_.Get(key); }

double Fields::number(const char* key, double low, double high) const {
  const Napi::Value value = get(key);
  const double v = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : std::nan("");
  if (!(v >= low && v <= high)) refuse(key, "a number from " + std::to_string(low) + " to " + std::to_string(high));
  return v;
}

int64_t Fields::integer(const char* key, int64_t low, int64_t high) const {
  const Napi::Value value = get(key);
  const double v = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : std::nan("");
  if (!(v >= static_cast<double>(low) && v <= static_cast<double>(high)) || v != std::floor(v))
    refuse(key, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
  return static_cast<int64_t>(v);
}

std::string Fields::text(const char* key) const {
  if (!get(key).IsString()) refuse(key, "a string");
  return get(key).As<Napi::String>().Utf8Value();
}

bool Fields::boolean(const char* key) const {
  if (!get(key).IsBoolean()) refuse(key, "a boolean");
  return get(key).As<Napi::Boolean>().Value();
}

bool Fields::is_null(const char* key) const { return get(key).IsNull() || get(key).IsUndefined(); }

Napi::Array Fields::array(const char* key) const {
  if (!get(key).IsArray()) refuse(key, "an array");
  return get(key).As<Napi::Array>();
}

template <typename T>
std::span<const T> Fields::view(const char* key) const {
  const Napi::Value value = get(key);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != array_type<T>()) refuse(key, array_name<T>());
  const auto array = value.As<Napi::TypedArrayOf<T>>();
  return {array.Data(), array.ElementLength()};
}

WeightFormat to_weight_format(const Napi::Env& env, const std::string& name, bool* is_vector) {
  if (is_vector) *is_vector = name == "vector";
  if (is_vector && *is_vector) return WeightFormat::kF32;
  for (int i = 0; i < kNumWeightFormats; ++i)
    if (name == kWeightFormatNames[i]) return static_cast<WeightFormat>(i);
  throw Napi::TypeError::New(env, "format: unknown weight format '" + name + "'");
}

SourceType to_source_type(const Napi::Env& env, const std::string& name) {
  for (int i = 0; i < kNumSourceTypes; ++i)
    if (name == source_info(static_cast<SourceType>(i)).name) return static_cast<SourceType>(i);
  throw Napi::TypeError::New(env, "type: unknown source type '" + name + "'");
}

PackJob to_pack_job(const Napi::Value& value) {
  const Fields f(value, "job");
  PackJob job;
  job.source_path = f.text("sourcePath");
  job.output_path = f.text("outputPath");
  job.source_offset_bytes = f.integer("sourceOffsetBytes", 0, INT64_MAX / 2);
  job.output_offset_bytes = f.integer("outputOffsetBytes", 0, INT64_MAX / 2);
  job.source_type = to_source_type(value.Env(), f.text("sourceType"));
  job.out_features = f.integer("outFeatures", 1, INT32_MAX);
  job.in_features = f.integer("inFeatures", 1, INT32_MAX);
  job.addend = static_cast<float>(f.number("addend", -1e30, 1e30));
  job.target = to_weight_format(value.Env(), f.text("target"), &job.is_vector);
  if (!f.is_null("rows")) {
    const auto rows = f.view<int32_t>("rows");
    if (static_cast<int64_t>(rows.size()) != job.out_features) throw Napi::RangeError::New(value.Env(), "job.rows: expected one entry per output feature");
    for (const int32_t row : rows)
      if (row < 0 || row >= job.out_features) throw Napi::RangeError::New(value.Env(), "job.rows: expected row indices, got " + std::to_string(row));
    job.rows.assign(rows.begin(), rows.end());
  }
  return job;
}

namespace {

ModelDims to_dims(const Napi::Value& value) {
  const Fields f(value, "dims");
  const Napi::Env env = value.Env();
  ModelDims d;
  d.num_layers = static_cast<int32_t>(f.integer("numLayers", 1, 10000));
  d.hidden_size = static_cast<int32_t>(f.integer("hiddenSize", 32, 1 << 20));
  d.intermediate_size = static_cast<int32_t>(f.integer("intermediateSize", 32, 1 << 22));
  d.num_heads = static_cast<int32_t>(f.integer("numHeads", 1, 4096));
  d.num_kv_heads = static_cast<int32_t>(f.integer("numKvHeads", 1, 4096));
  d.head_dim = static_cast<int32_t>(f.integer("headDim", 16, 1024));
  d.vocab_size = static_cast<int32_t>(f.integer("vocabSize", 1, 1 << 24));
  d.max_positions = static_cast<int32_t>(f.integer("maxPositions", 1, 1 << 26));
  d.norm_eps = static_cast<float>(f.number("normEps", 0, 1));
  d.attention_scale = static_cast<float>(f.number("attentionScale", 0, 1e6));
  d.embedding_scale = static_cast<float>(f.number("embeddingScale", 0, 1e6));
  const std::string activation = f.text("activation");
  if (activation != "silu" && activation != "gelu_tanh") throw Napi::TypeError::New(env, "dims.activation: expected 'silu' or 'gelu_tanh', got '" + activation + "'");
  d.gelu = activation == "gelu_tanh";
  if (d.num_heads % d.num_kv_heads != 0) throw Napi::RangeError::New(env, "dims.numHeads: expected a multiple of numKvHeads");
  for (const auto& [name, n] : {std::pair{"hiddenSize", d.hidden_size}, {"intermediateSize", d.intermediate_size}, {"numHeads · headDim", d.num_heads * d.head_dim}})
    if (n % 32 != 0) throw Napi::RangeError::New(env, std::string("dims.") + name + ": expected a multiple of 32, got " + std::to_string(n));
  if (d.head_dim % 16 != 0) throw Napi::RangeError::New(env, "dims.headDim: expected a multiple of 16, got " + std::to_string(d.head_dim));
  const auto windows = f.view<int32_t>("slidingWindows"), index = f.view<int32_t>("ropeTableIndex");
  d.sliding_windows.assign(windows.begin(), windows.end());
  d.rope_table_index.assign(index.begin(), index.end());
  const Napi::Array tables = f.array("ropeTables");
  for (uint32_t i = 0; i < tables.Length(); ++i) {
    const Fields t(tables.Get(i), "dims.ropeTables[" + std::to_string(i) + "]");
    const auto frequencies = t.view<double>("inverseFrequencies");
    if (static_cast<int32_t>(frequencies.size()) != d.head_dim / 2) throw Napi::RangeError::New(env, "dims.ropeTables.inverseFrequencies: expected headDim / 2 entries");
    d.rope_tables.push_back({{frequencies.begin(), frequencies.end()}, static_cast<float>(t.number("attentionFactor", 0, 1e6))});
  }
  if (static_cast<int32_t>(d.sliding_windows.size()) != d.num_layers || static_cast<int32_t>(d.rope_table_index.size()) != d.num_layers)
    throw Napi::RangeError::New(env, "dims.slidingWindows and ropeTableIndex: expected one entry per layer");
  for (const int32_t w : d.sliding_windows)
    if (w < 0) throw Napi::RangeError::New(env, "dims.slidingWindows: expected none below 0");
  for (const int32_t t : d.rope_table_index)
    if (t < 0 || t >= static_cast<int32_t>(d.rope_tables.size())) throw Napi::RangeError::New(env, "dims.ropeTableIndex: expected indices of ropeTables");
  return d;
}

}  // namespace

RuntimeSpec to_runtime_spec(const Napi::Value& value) {
  const Fields f(value, "options");
  RuntimeSpec spec;
  spec.packed_path = f.text("packedPath");
  spec.dims = to_dims(f.object().Get("dims"));
  const std::string activations = f.text("activations");
  if (activations != "int8" && activations != "f32") throw Napi::TypeError::New(value.Env(), "options.activations: expected 'int8' or 'f32', got '" + activations + "'");
  spec.reference_mode = activations == "f32";
  const std::string kv_type = f.text("kvType");
  if (kv_type != "auto" && kv_type != "f16" && kv_type != "int8")
    throw Napi::TypeError::New(value.Env(), "options.kvType: expected 'auto', 'f16' or 'int8', got '" + kv_type + "'");
  if (spec.reference_mode && kv_type != "auto")
    throw Napi::TypeError::New(value.Env(), "options.kvType: expected 'auto' beside activations 'f32', which keep KV in f32, got '" + kv_type + "'");
  spec.kv_type = spec.reference_mode ? KvType::kF32 : kv_type == "int8" ? KvType::kInt8 : KvType::kF16;
  const std::string adapters = f.text("adapterQuantization");
  if (adapters != "keep" && adapters != "int8")
    throw Napi::TypeError::New(value.Env(), "options.adapterQuantization: expected 'keep' or 'int8', got '" + adapters + "'");
  spec.int8_adapters = adapters == "int8";
  spec.device_memory_bytes = static_cast<size_t>(f.integer("deviceMemoryBytes", 1, int64_t{1} << 46));
  spec.host_memory_bytes = static_cast<size_t>(f.integer("hostMemoryBytes", 0, int64_t{1} << 46));
  spec.weight_memory_bytes = static_cast<size_t>(f.integer("weightMemoryBytes", 0, int64_t{1} << 46));
  spec.num_threads = static_cast<int>(f.integer("numThreads", 0, 1024));
  const Napi::Array tensors = f.array("tensors");
  for (uint32_t i = 0; i < tensors.Length(); ++i) {
    const Fields t(tensors.Get(i), "options.tensors[" + std::to_string(i) + "]");
    PackedTensorSpec tensor;
    tensor.role = t.text("role");
    tensor.layer = static_cast<int32_t>(t.integer("layer", -1, spec.dims.num_layers - 1));
    tensor.format = to_weight_format(value.Env(), t.text("format"), &tensor.is_vector);
    tensor.out_features = t.integer("outFeatures", 1, INT32_MAX);
    tensor.in_features = t.integer("inFeatures", 1, INT32_MAX);
    tensor.offset_bytes = t.integer("offsetBytes", 0, INT64_MAX / 2);
    tensor.size_bytes = t.integer("sizeBytes", 0, INT64_MAX / 2);
    spec.tensors.push_back(std::move(tensor));
  }
  return spec;
}

void to_batch(const Napi::Value& value, OwnedBatch& owned) {
  const Fields f(value, "batch");
  Batch& b = owned.batch;
  b = {};
  size_t num_copied = 0;
  const auto copy = [&]<typename T>(std::span<const T>& out, const char* key) {
    const auto view = f.view<T>(key);
    if (owned.memory.size() == num_copied) owned.memory.emplace_back();
    std::vector<std::byte>& memory = owned.memory[num_copied++];
    if (memory.size() < view.size_bytes()) memory.resize(view.size_bytes());
    T* const data = reinterpret_cast<T*>(memory.data());
    std::copy(view.begin(), view.end(), data);
    out = {data, view.size()};
    return std::span<T>(data, view.size());
  };
  owned.token_ids = copy(b.token_ids, "tokenIds");
  copy(b.positions, "positions");
  copy(b.sequence_starts, "sequenceStarts");
  copy(b.block_starts, "blockStarts");
  copy(b.block_ids, "blockIds");
  copy(b.staging_pages, "stagingPages");
  copy(b.adapter_starts, "adapterStarts");
  copy(b.adapter_handles, "adapterHandles");
  copy(b.adapter_weights, "adapterWeights");
  copy(b.sample_rows, "sampleRows");
  copy(b.hidden_rows, "hiddenRows");
  copy(b.temperature, "temperature");
  copy(b.top_k, "topK");
  copy(b.top_p, "topP");
  copy(b.min_p, "minP");
  copy(b.repetition_penalty, "repetitionPenalty");
  copy(b.presence_penalty, "presencePenalty");
  copy(b.frequency_penalty, "frequencyPenalty");
  copy(b.seeds, "seeds");
  copy(b.num_top, "numTop");
  copy(b.bias_starts, "biasStarts");
  copy(b.bias_ids, "biasIds");
  copy(b.bias_values, "biasValues");
  copy(b.history_starts, "historyStarts");
  copy(b.history_prompt_counts, "historyPromptCounts");
  owned.history_ids = copy(b.history_ids, "historyIds");
  copy(b.matcher_handles, "matchers");
  b.want_logits = f.boolean("wantLogits");
}

std::vector<int32_t> to_integers(const Napi::Value& value, const char* name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array)
    throw Napi::TypeError::New(value.Env(), std::string(name) + ": expected an Int32Array");
  const auto array = value.As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

Tier to_tier(const Napi::Value& value) {
  const std::string tier = value.ToString().Utf8Value();
  if (tier != "device" && tier != "host") throw Napi::TypeError::New(value.Env(), "tier: expected 'device' or 'host', got '" + tier.substr(0, 80) + "'");
  return tier == "host" ? Tier::kHost : Tier::kDevice;
}

std::vector<AdapterModuleSpec> to_adapter_modules(const Napi::Value& value) {
  if (!value.IsArray()) throw Napi::TypeError::New(value.Env(), "modules: expected an array");
  const auto array = value.As<Napi::Array>();
  std::vector<AdapterModuleSpec> modules;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const Fields f(array.Get(i), "modules[" + std::to_string(i) + "]");
    AdapterModuleSpec m;
    m.layer = static_cast<int32_t>(f.integer("layer", -1, 10000));
    const std::string target = f.text("target");
    int index = 0;
    while (index <= kNumLayerTargets && target != target_name(static_cast<Target>(index))) ++index;
    if (index > kNumLayerTargets) throw Napi::TypeError::New(value.Env(), "modules.target: unknown target module '" + target + "'");
    m.target = static_cast<Target>(index);
    m.rank = static_cast<int32_t>(f.integer("rank", 1, 4096));
    m.scaling = static_cast<float>(f.number("scaling", -1e30, 1e30));
    m.type = to_element_type(value.Env(), f.text("type"), "modules.type");
    m.a_offset = f.integer("aOffsetBytes", 0, INT64_MAX / 2);
    m.b_offset = f.integer("bOffsetBytes", 0, INT64_MAX / 2);
    m.magnitude_offset = f.integer("magnitudeOffsetBytes", -1, INT64_MAX / 2);
    m.magnitude_type = to_element_type(value.Env(), f.text("magnitudeType"), "modules.magnitudeType");
    m.bias_offset = f.integer("biasOffsetBytes", -1, INT64_MAX / 2);
    m.bias_type = to_element_type(value.Env(), f.text("biasType"), "modules.biasType");
    modules.push_back(m);
  }
  return modules;
}

namespace {

template <typename Integer>
Napi::Value from_integer(Napi::Env env, Integer v) {
  const double d = static_cast<double>(v);
  if (d >= -kMaxSafeInteger && d <= kMaxSafeInteger) return Napi::Number::New(env, d);
  if constexpr (std::is_signed_v<Integer>) return Napi::BigInt::New(env, static_cast<int64_t>(v));
  else return Napi::BigInt::New(env, static_cast<uint64_t>(v));
}

Napi::Value from_gguf_value(Napi::Env env, const GgufValue& value) {
  return std::visit(
      [&]<typename T>(const T& v) -> Napi::Value {
        if constexpr (std::is_same_v<T, std::string>) {
          return Napi::String::New(env, v);
        } else if constexpr (std::is_same_v<T, bool>) {
          return Napi::Boolean::New(env, v);
        } else if constexpr (std::is_same_v<T, double>) {
          return Napi::Number::New(env, v);
        } else if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, uint64_t>) {
          return from_integer(env, v);
        } else if constexpr (std::is_same_v<T, std::vector<double>>) {
          auto array = Napi::Float64Array::New(env, v.size());
          std::copy(v.begin(), v.end(), array.Data());
          return array;
        } else {
          auto array = Napi::Array::New(env, v.size());
          for (uint32_t i = 0; i < v.size(); ++i) {
            if constexpr (std::is_same_v<T, std::vector<std::string>>) array.Set(i, Napi::String::New(env, v[i]));
            else array.Set(i, Napi::Boolean::New(env, v[i]));
          }
          return array;
        }
      },
      value);
}

template <typename Array, typename T>
Array from_vector(Napi::Env env, const std::vector<T>& v) {
  auto array = Array::New(env, v.size());
  std::copy(v.begin(), v.end(), array.Data());
  return array;
}

// As from_vector, into the array that is kept. One that was transferred away has length 0 and is replaced as well.
template <typename Array, typename T>
Array into_kept(Napi::Env env, Napi::Reference<Array>& kept, const std::vector<T>& v) {
  if (!kept.IsEmpty()) {
    Array array = kept.Value();
    if (array.ElementLength() == v.size()) {
      std::copy(v.begin(), v.end(), array.Data());
      return array;
    }
  }
  Array array = from_vector<Array>(env, v);
  kept = Napi::Persistent(array);
  return array;
}

}  // namespace

Napi::Object from_gguf(Napi::Env env, const GgufFile& file) {
  auto out = Napi::Object::New(env);
  out.Set("version", file.version);
  auto metadata = Napi::Object::New(env);
  for (const auto& [key, value] : file.metadata) metadata.Set(key, from_gguf_value(env, value));
  out.Set("metadata", metadata);
  auto tensors = Napi::Array::New(env, file.tensors.size());
  for (uint32_t i = 0; i < file.tensors.size(); ++i) {
    const GgufTensor& t = file.tensors[i];
    auto tensor = Napi::Object::New(env);
    tensor.Set("name", t.name);
    auto dims = Napi::Array::New(env, t.dims.size());
    for (uint32_t j = 0; j < t.dims.size(); ++j) dims.Set(j, from_integer(env, t.dims[j]));
    tensor.Set("dims", dims);
    tensor.Set("type", source_info(t.type).name);
    tensor.Set("offsetBytes", from_integer(env, t.offset_bytes));
    tensor.Set("sizeBytes", from_integer(env, t.size_bytes));
    tensors.Set(i, tensor);
  }
  out.Set("tensors", tensors);
  return out;
}

Napi::Object from_step_output(Napi::Env env, const StepOutput& output, bool with_logits, ResultArrays& arrays) {
  auto out = Napi::Object::New(env);
  out.Set("tokens", into_kept(env, arrays.tokens, output.tokens));
  out.Set("logprobs", into_kept(env, arrays.logprobs, output.logprobs));
  out.Set("topIds", into_kept(env, arrays.top_ids, output.top_ids));
  out.Set("topLogprobs", into_kept(env, arrays.top_logprobs, output.top_logprobs));
  out.Set("hidden", output.hidden.empty() ? env.Null() : Napi::Value(from_vector<Napi::Float32Array>(env, output.hidden)));
  out.Set("logits", with_logits ? Napi::Value(from_vector<Napi::Float32Array>(env, output.logits)) : env.Null());
  return out;
}

}  // namespace motet
