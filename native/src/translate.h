// JavaScript values to C++ views and back. Every refusal is a TypeError or RangeError that names the argument.
// A view points into a typed array and is good until JavaScript runs again: what lives longer is copied.
#pragma once
#include <napi.h>

#include <span>
#include <string>
#include <vector>

#include "adapter.h"
#include "batch.h"
#include "gguf.h"
#include "model.h"
#include "pack.h"
#include "pages.h"

namespace motet {

// Reads the fields of one options object.
class Fields {
 public:
  Fields(const Napi::Value& value, const std::string& name);
  double number(const char* key, double low, double high) const;
  int64_t integer(const char* key, int64_t low, int64_t high) const;
  std::string text(const char* key) const;
  bool boolean(const char* key) const;
  bool is_null(const char* key) const;
  Napi::Array array(const char* key) const;
  Napi::Object object() const { return object_; }
  // A view of a typed array field; `T` is int32_t, float, double or uint64_t.
  template <typename T>
  std::span<const T> view(const char* key) const;

 private:
  [[noreturn]] void refuse(const char* key, const std::string& expected) const;
  Napi::Value get(const char* key) const;
  Napi::Object object_;
  std::string name_;
};

struct PackJob {
  std::string source_path, output_path;
  uint64_t source_offset_bytes = 0, output_offset_bytes = 0;
  SourceType source_type = SourceType::kF32;
  int64_t out_features = 0, in_features = 0;
  std::vector<int32_t> rows;  // empty: as they are
  float addend = 0;
  bool is_vector = false;
  WeightFormat target = WeightFormat::kF32;
};

struct RuntimeSpec {
  std::string packed_path;
  ModelDims dims;
  std::vector<PackedTensorSpec> tensors;
  bool reference_mode = false, int8_adapters = false;
  KvType kv_type = KvType::kF16;
  size_t device_memory_bytes = 0, host_memory_bytes = 0, weight_memory_bytes = 0;
  int num_threads = 0;
};

PackJob to_pack_job(const Napi::Value& value);
RuntimeSpec to_runtime_spec(const Napi::Value& value);
// Copies every array: while a step runs, JavaScript may write, detach, resize or drop those it gave. After a refusal
// `owned` holds no batch.
void to_batch(const Napi::Value& value, OwnedBatch& owned);
std::vector<AdapterModuleSpec> to_adapter_modules(const Napi::Value& value);
// Copied; `name` is the argument's. What the ids mean is checked where they are used.
std::vector<int32_t> to_integers(const Napi::Value& value, const char* name);
// 'device' or 'host'.
Tier to_tier(const Napi::Value& value);
// A format's or type's number from its name in native/index.ts; `is_vector` is set for 'vector' when not null.
WeightFormat to_weight_format(const Napi::Env& env, const std::string& name, bool* is_vector);
SourceType to_source_type(const Napi::Env& env, const std::string& name);

Napi::Object from_gguf(Napi::Env env, const GgufFile& file);

// The arrays of a StepResult, written again while their lengths stay the same.
struct ResultArrays {
  Napi::Reference<Napi::Int32Array> tokens, top_ids;
  Napi::Reference<Napi::Float32Array> logprobs, top_logprobs;
};
Napi::Object from_step_output(Napi::Env env, const StepOutput& output, bool with_logits, ResultArrays& arrays);

}  // namespace motet
