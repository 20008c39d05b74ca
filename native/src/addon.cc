// The exports of native/index.ts, which documents them.
#include <fcntl.h>
#include <napi.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <set>

#include "copy_worker.h"
#include "grammar.h"
#include "mapped_weights.h"
#include "step_worker.h"
#include "translate.h"
#include "weight_stream.h"

namespace motet {
namespace {

// Runs `work` on libuv's pool and resolves with what `to_value` makes of its result. An exception rejects with an Error
// whose `code` says which kind it was.
template <typename Result>
class Task final : public Napi::AsyncWorker {
 public:
  using Work = std::function<Result()>;
  using ToValue = std::function<Napi::Value(Napi::Env, Result&)>;
  static Napi::Promise run(Napi::Env env, Work work, ToValue to_value) {
    auto* task = new Task(env, std::move(work), std::move(to_value));
    const auto promise = task->deferred_.Promise();
    task->Queue();
    return promise;
  }

 private:
  Task(Napi::Env env, Work work, ToValue to_value)
      : Napi::AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), to_value_(std::move(to_value)) {}
  void Execute() override {
    try {
      result_ = work_();
      return;
    } catch (const GgufError& e) {
      fail("gguf_invalid", e);
    } catch (const AdapterError& e) {
      fail("adapter_invalid", e);
    } catch (const GrammarError& e) {
      fail("grammar_invalid", e);
    } catch (const IoError& e) {
      fail("io_failed", e);
    } catch (const std::bad_alloc& e) {
      fail("out_of_memory", e);
    } catch (const std::exception& e) {
      fail("weights_invalid", e);
    }
  }
  void fail(const char* code, const std::exception& e) {
    code_ = code;
    SetError(e.what());
  }
  void OnOK() override {
    const Napi::HandleScope scope(Env());
    try {
      deferred_.Resolve(to_value_(Env(), result_));
    } catch (const Napi::Error& e) {
      deferred_.Reject(e.Value());
    }
  }
  void OnError(const Napi::Error& error) override {
    error.Value().As<Napi::Object>().Set("code", code_);
    deferred_.Reject(error.Value());
  }

  Napi::Promise::Deferred deferred_;
  Work work_;
  ToValue to_value_;
  Result result_{};
  std::string code_;
};

// A file mapped for reading.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw IoError(path + ": " + std::strerror(errno));
    struct stat st {};
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
      close(fd);
      throw IoError(path + ": expected a regular file");
    }
    size_ = static_cast<size_t>(st.st_size);
    if (size_ > 0) data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (data_ == MAP_FAILED) throw IoError(path + ": cannot be mapped: " + std::strerror(errno));
  }
  ~MappedFile() {
    if (data_) munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

void write_all(int fd, const uint8_t* data, size_t num_bytes, uint64_t offset, const std::string& path) {
  while (num_bytes > 0) {
    const ssize_t wrote = pwrite(fd, data, num_bytes, static_cast<off_t>(offset));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) throw IoError(path + ": cannot be written: " + std::strerror(errno));
    data += wrote, offset += wrote, num_bytes -= wrote;
  }
}

// Bytes of output packed before they are written: bounds the memory of packing a large matrix.
constexpr size_t kPackChunkBytes = 8 << 20;

void pack_tensor(const PackJob& job) {
  const MappedFile source(job.source_path);
  const SourceInfo& info = source_info(job.source_type);
  if (job.in_features % info.block_elements != 0)
    throw std::runtime_error("inFeatures: expected a multiple of " + std::to_string(info.block_elements) + " for " + info.name + ", got " +
                             std::to_string(job.in_features));
  const size_t row_bytes = static_cast<size_t>(job.in_features / info.block_elements) * info.block_bytes;
  const size_t num_bytes = row_bytes * static_cast<size_t>(job.out_features);
  if (job.source_offset_bytes > source.size() || num_bytes > source.size() - job.source_offset_bytes)
    throw std::runtime_error("sourceOffsetBytes: expected " + std::to_string(num_bytes) + " bytes inside a file of " + std::to_string(source.size()));
  const uint8_t* const bytes = source.data() + job.source_offset_bytes;
  const int fd = open(job.output_path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) throw IoError(job.output_path + ": " + std::strerror(errno));
  const std::unique_ptr<const int, void (*)(const int*)> closer(&fd, [](const int* f) { close(*f); });
  if (job.is_vector) {
    std::vector<float> values(static_cast<size_t>(job.in_features));
    dequantize_row(values.data(), job.source_type, bytes, job.in_features);
    for (auto& v : values) {
      v += job.addend;
      if (!std::isfinite(v)) throw std::runtime_error("vector: expected finite numbers");
    }
    write_all(fd, reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(float), job.output_offset_bytes, job.output_path);
    return;
  }
  if (is_quantized(job.target) && job.in_features % kActivationGroup != 0)
    throw std::runtime_error("inFeatures: expected a multiple of " + std::to_string(kActivationGroup) + ", got " + std::to_string(job.in_features));
  const size_t one = tile_bytes(job.target, job.in_features);
  const int64_t tiles = num_tiles(job.out_features), per_chunk = std::max<int64_t>(1, static_cast<int64_t>(kPackChunkBytes / one));
  std::vector<uint8_t> out;
  for (int64_t t = 0; t < tiles; t += per_chunk) {
    const int64_t end = std::min(tiles, t + per_chunk);
    out.assign(static_cast<size_t>(end - t) * one, 0);
    pack_tiles(out.data(), job.target, job.source_type, bytes, static_cast<int64_t>(row_bytes), job.out_features, job.in_features,
               job.rows.empty() ? nullptr : job.rows.data(), job.addend, t, end);
    write_all(fd, out.data(), out.size(), job.output_offset_bytes + static_cast<uint64_t>(t) * one, job.output_path);
  }
}

// What JavaScript holds of a native object, and lets go of when it is collected.
template <typename T>
constexpr napi_type_tag kTag = {};
template <>
constexpr napi_type_tag kTag<const Vocabulary> = {0x6d6f7465742d766f, 0x636162756c617279};
template <>
constexpr napi_type_tag kTag<const Grammar> = {0x6d6f7465742d6772, 0x616d6d6172000000};
template <typename T>
Napi::Value from_shared(Napi::Env env, std::shared_ptr<T> object) {
  const auto held = Napi::External<std::shared_ptr<T>>::New(env, new std::shared_ptr<T>(std::move(object)), [](Napi::Env, std::shared_ptr<T>* p) { delete p; });
  held.TypeTag(&kTag<T>);
  return held;
}
template <typename T>
std::shared_ptr<T> to_shared(const Napi::Value& value, const char* name) {
  if (!value.IsExternal() || !value.As<Napi::External<std::shared_ptr<T>>>().CheckTypeTag(&kTag<T>))
    throw Napi::TypeError::New(value.Env(), std::string(name) + ": expected one that this addon made");
  return *value.As<Napi::External<std::shared_ptr<T>>>().Data();
}

class RuntimeObject final : public Napi::ObjectWrap<RuntimeObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Runtime",
                       {InstanceMethod<&RuntimeObject::step>("step"), InstanceMethod<&RuntimeObject::pages>("adapterPages"),
                        InstanceMethod<&RuntimeObject::bytes>("adapterBytes"),
                        InstanceMethod<&RuntimeObject::load>("loadAdapter"), InstanceMethod<&RuntimeObject::attach>("attachAdapter"),
                        InstanceMethod<&RuntimeObject::release>("releaseAdapter"), InstanceMethod<&RuntimeObject::copy_pages_of>("copyPages"),
                        InstanceMethod<&RuntimeObject::clear>("clearPages"), InstanceMethod<&RuntimeObject::read_host>("readHostPages"),
                        InstanceMethod<&RuntimeObject::write_host>("writeHostPages"),
                        InstanceMethod<&RuntimeObject::open_matcher>("openMatcher"), InstanceMethod<&RuntimeObject::close_matcher>("closeMatcher"),
                        InstanceMethod<&RuntimeObject::step_parts>("stepParts"), InstanceMethod<&RuntimeObject::weight_stream>("weightStream"),
                        InstanceMethod<&RuntimeObject::close>("close")});
  }
  explicit RuntimeObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RuntimeObject>(info) {
    if (info.Length() != 1 || !info[0].IsExternal()) throw Napi::TypeError::New(info.Env(), "Runtime: use openRuntime");
    model_ = *info[0].As<Napi::External<std::shared_ptr<Model>>>().Data();
    worker_ = std::make_unique<StepWorker>(info.Env(), model_);
    copier_ = std::make_unique<CopyWorker>(info.Env(), model_);
    auto self = info.This().As<Napi::Object>();
    self.Set("pageBytes", static_cast<double>(model_->page_bytes()));
    self.Set("numPages", static_cast<double>(model_->num_pages()));
    self.Set("numHostPages", static_cast<double>(model_->num_host_pages()));
    self.Set("minStagingPages", static_cast<double>(model_->min_staging_pages()));
    self.Set("blockTokens", kBlockTokens);
    self.Set("numThreads", model_->device().num_threads());
    self.Set("weightBytes", static_cast<double>(model_->weight_bytes()));
  }

 private:
  void require_open(Napi::Env env) const {
    if (model_) return;
    auto error = Napi::Error::New(env, "runtime: expected an open one, got one that was closed");
    error.Value().As<Napi::Object>().Set("code", "closed");
    throw error;
  }

  Napi::Value step(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const Batch& batch = worker_->prepare(info[0]);
    std::vector<std::shared_ptr<Adapter>> adapters;
    for (const int32_t handle : batch.adapter_handles) {
      const auto it = adapters_.find(handle);
      if (it == adapters_.end()) throw Napi::RangeError::New(info.Env(), "batch.adapterHandles: expected a loaded adapter's handle, got " + std::to_string(handle));
      adapters.push_back(it->second);
    }
    if (batch.matcher_handles.size() != batch.sample_rows.size())
      throw Napi::RangeError::New(info.Env(), "batch.matchers: expected one per sample, " + std::to_string(batch.sample_rows.size()) + ", got " +
                                                  std::to_string(batch.matcher_handles.size()));
    std::vector<std::shared_ptr<GrammarMatcher>> matchers;
    std::set<int32_t> seen;
    for (const int32_t handle : batch.matcher_handles) {
      const auto it = matchers_.find(handle);
      if (handle >= 0 && (it == matchers_.end() || !seen.insert(handle).second))
        throw Napi::RangeError::New(info.Env(), "batch.matchers: expected distinct open matchers' handles, or −1, got " + std::to_string(handle));
      matchers.push_back(handle >= 0 ? it->second : nullptr);
    }
    return worker_->start(info.Env(), info.This().As<Napi::Object>(), std::move(adapters), std::move(matchers));
  }

  // What `work` returns; an AdapterError becomes an Error with its code.
  template <typename Work>
  static auto refusing_adapters(Napi::Env env, Work work) {
    try {
      return work();
    } catch (const AdapterError& e) {
      auto error = Napi::Error::New(env, e.what());
      error.Value().As<Napi::Object>().Set("code", "adapter_invalid");
      throw error;
    }
  }

  Napi::Value pages(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const auto size = refusing_adapters(info.Env(), [&] { return adapter_size(*model_, to_adapter_modules(info[0])); });
    return Napi::Number::New(info.Env(), static_cast<double>(size.num_pages));
  }

  Napi::Value bytes(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const auto size = refusing_adapters(info.Env(), [&] { return adapter_size(*model_, to_adapter_modules(info[0])); });
    return Napi::Number::New(info.Env(), static_cast<double>(size.num_bytes));
  }

  Napi::Value keep(Napi::Env env, std::shared_ptr<Adapter> adapter) {
    const int32_t handle = next_handle_++;
    adapters_[handle] = std::move(adapter);
    return Napi::Number::New(env, handle);
  }

  Napi::Value load(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    if (!info[0].IsString()) throw Napi::TypeError::New(info.Env(), "path: expected a string");
    // Held by the task, so that this object outlives the load.
    const auto self = std::make_shared<Napi::ObjectReference>(Napi::Persistent(info.This().As<Napi::Object>()));
    return Task<std::shared_ptr<Adapter>>::run(
        info.Env(),
        [model = model_, path = info[0].As<Napi::String>().Utf8Value(), modules = to_adapter_modules(info[1]),
         pages = to_integers(info[2], "pages")] {
          return load_adapter(*model, path, modules, pages);
        },
        [this, self](Napi::Env env, std::shared_ptr<Adapter>& adapter) -> Napi::Value {
          require_open(env);  // closed meanwhile
          return keep(env, std::move(adapter));
        });
  }

  Napi::Value attach(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const auto modules = to_adapter_modules(info[0]);
    const auto pages = to_integers(info[1], "pages");
    return keep(info.Env(), refusing_adapters(info.Env(), [&] { return attach_adapter(*model_, modules, pages); }));
  }

  // Page ids of a tier, distinct and there.
  std::vector<int32_t> to_pages(const Napi::Value& value, Tier tier, const char* name) const {
    auto pages = to_integers(value, name);
    try {
      check_pages(pages, num_pages_of(*model_, tier), name);
    } catch (const AdapterError& e) {
      throw Napi::RangeError::New(value.Env(), e.what());
    }
    return pages;
  }

  Napi::Value copy_pages_of(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const std::string direction = info[0].ToString().Utf8Value();
    if (direction != "toHost" && direction != "toDevice")
      throw Napi::TypeError::New(info.Env(), "direction: expected 'toHost' or 'toDevice', got '" + direction.substr(0, 80) + "'");
    const Tier source = direction == "toHost" ? Tier::kDevice : Tier::kHost, target = source == Tier::kHost ? Tier::kDevice : Tier::kHost;
    auto from = to_pages(info[1], source, "from"), to = to_pages(info[2], target, "to");
    if (from.size() != to.size())
      throw Napi::RangeError::New(info.Env(), "to: expected " + std::to_string(from.size()) + " pages, as many as in from, got " + std::to_string(to.size()));
    return copier_->start(info.Env(), info.This().As<Napi::Object>(), source, std::move(from), std::move(to));
  }

  Napi::Value clear(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const Tier tier = to_tier(info[0]);
    clear_pages(*model_, tier, to_pages(info[1], tier, "pages"));
    return info.Env().Undefined();
  }

  Napi::Value read_host(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const auto pages = to_pages(info[0], Tier::kHost, "pages");
    auto bytes = Napi::Buffer<uint8_t>::New(info.Env(), pages.size() * model_->page_bytes());
    read_host_pages(*model_, pages, bytes.Data());
    return bytes;
  }

  Napi::Value write_host(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const auto pages = to_pages(info[0], Tier::kHost, "pages");
    if (!info[1].IsTypedArray() || info[1].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
      throw Napi::TypeError::New(info.Env(), "bytes: expected a Uint8Array");
    const auto bytes = info[1].As<Napi::Uint8Array>();
    if (bytes.ElementLength() != pages.size() * model_->page_bytes())
      throw Napi::RangeError::New(info.Env(), "bytes: expected " + std::to_string(pages.size() * model_->page_bytes()) + " for these pages, got " +
                                                  std::to_string(bytes.ElementLength()));
    write_host_pages(*model_, pages, bytes.Data());
    return info.Env().Undefined();
  }

  Napi::Value release(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    if (!info[0].IsNumber()) throw Napi::TypeError::New(info.Env(), "handle: expected a number");
    const auto it = adapters_.find(info[0].As<Napi::Number>().Int32Value());
    if (it == adapters_.end()) throw Napi::RangeError::New(info.Env(), "handle: expected a loaded adapter's, got " + info[0].ToString().Utf8Value());
    if (it->second.use_count() > 1) throw Napi::Error::New(info.Env(), "handle: expected one that no running step uses, nor one that waits");
    adapters_.erase(it);
    return info.Env().Undefined();
  }

  Napi::Value open_matcher(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const auto grammar = to_shared<const Grammar>(info[0], "grammar");
    if (grammar->vocab_size() != model_->dims().vocab_size)
      throw Napi::RangeError::New(info.Env(), "grammar: expected one for the model's vocabulary of " + std::to_string(model_->dims().vocab_size) + " tokens, got " +
                                                  std::to_string(grammar->vocab_size()));
    const int32_t handle = next_handle_++;
    matchers_[handle] = std::make_shared<GrammarMatcher>(grammar);
    return Napi::Number::New(info.Env(), handle);
  }

  Napi::Value close_matcher(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    if (!info[0].IsNumber() || matchers_.erase(info[0].As<Napi::Number>().Int32Value()) == 0)
      throw Napi::RangeError::New(info.Env(), "handle: expected an open matcher's, got " + info[0].ToString().Utf8Value());
    return info.Env().Undefined();
  }

  Napi::Value step_parts(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    auto parts = Napi::Object::New(info.Env());
    for (size_t i = 0; i < kStepPartNames.size(); ++i)
      parts.Set(kStepPartNames[i], static_cast<double>(model_->clock().nanoseconds(static_cast<StepPart>(i))) / 1e6);
    return parts;
  }

  Napi::Value weight_stream(const Napi::CallbackInfo& info) {
    require_open(info.Env());
    const WeightStream* const stream = model_->stream();
    if (!stream) return info.Env().Null();
    const auto& plan = stream->plan();
    auto result = Napi::Object::New(info.Env());
    const auto set = [&](const char* key, auto value) { result.Set(key, static_cast<double>(value)); };
    set("numStreamedLayers", std::count(plan.is_resident.begin(), plan.is_resident.end(), false));
    set("memoryBytes", plan.resident_bytes + kNumWeightSlots * plan.slot_bytes);
    set("stepBytes", stream->bytes_per_step());
    set("readBytes", stream->bytes_read());
    set("readSeconds", static_cast<double>(stream->read_nanoseconds()) / 1e9);
    result.Set("isDirect", stream->is_direct());
    return result;
  }

  Napi::Value close(const Napi::CallbackInfo& info) {
    if (model_) {
      if (worker_->busy()) throw Napi::Error::New(info.Env(), "close: expected no step to be running");
      if (copier_->busy()) throw Napi::Error::New(info.Env(), "close: expected no copy to be running");
      worker_.reset();  // they hold the model too
      copier_.reset();
      adapters_.clear();
      matchers_.clear();
      model_.reset();
    }
    return info.Env().Undefined();
  }

  std::shared_ptr<Model> model_;
  std::unique_ptr<StepWorker> worker_;
  std::unique_ptr<CopyWorker> copier_;
  std::map<int32_t, std::shared_ptr<Adapter>> adapters_;
  std::map<int32_t, std::shared_ptr<GrammarMatcher>> matchers_;
  int32_t next_handle_ = 0;
};

Napi::Value open_vocabulary(const Napi::CallbackInfo& info) {
  if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
    throw Napi::TypeError::New(info.Env(), "bytes: expected a Uint8Array");
  const auto array = info[0].As<Napi::Uint8Array>();
  return Task<std::shared_ptr<const Vocabulary>>::run(
      info.Env(),
      [bytes = std::vector<uint8_t>(array.Data(), array.Data() + array.ElementLength()), ends = to_integers(info[1], "ends"),
       eos = to_integers(info[2], "eosTokenIds")] { return std::make_shared<const Vocabulary>(bytes, ends, eos); },
      [](Napi::Env env, std::shared_ptr<const Vocabulary>& vocabulary) { return from_shared(env, std::move(vocabulary)); });
}

Napi::Value compile_grammar(const Napi::CallbackInfo& info) {
  if (!info[1].IsString() || !info[2].IsString()) throw Napi::TypeError::New(info.Env(), "kind, text: expected strings");
  return Task<std::shared_ptr<const Grammar>>::run(
      info.Env(),
      [vocabulary = to_shared<const Vocabulary>(info[0], "vocabulary"), kind = info[1].As<Napi::String>().Utf8Value(),
       text = info[2].As<Napi::String>().Utf8Value()] { return std::make_shared<const Grammar>(vocabulary, kind, text); },
      [](Napi::Env env, std::shared_ptr<const Grammar>& grammar) { return from_shared(env, std::move(grammar)); });
}

struct AddonData {
  Napi::FunctionReference runtime;
};

Napi::Value cpu_info(const Napi::CallbackInfo& info) {
  auto out = Napi::Object::New(info.Env());
  auto isas = Napi::Array::New(info.Env());
  for (const char* name : kInstructionSets)
    if (kernels_by_name(name)) isas.Set(isas.Length(), name);
  out.Set("isa", kernels().name);
  out.Set("isas", isas);
  out.Set("numCpus", available_cpus());
  return out;
}

Napi::Value read_gguf(const Napi::CallbackInfo& info) {
  if (!info[0].IsString()) throw Napi::TypeError::New(info.Env(), "path: expected a string");
  return Task<GgufFile>::run(
      info.Env(),
      [path = info[0].As<Napi::String>().Utf8Value()] {
        const MappedFile file(path);
        return parse_gguf(file.data(), file.size());
      },
      [](Napi::Env env, GgufFile& file) -> Napi::Value { return from_gguf(env, file); });
}

Napi::Value read_in(const Napi::CallbackInfo& info) {
  if (!info[0].IsString()) throw Napi::TypeError::New(info.Env(), "path: expected a string");
  return Task<bool>::run(
      info.Env(),
      [path = info[0].As<Napi::String>().Utf8Value()] {
        const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
        struct stat st {};
        if (file.get() < 0 || fstat(file.get(), &st) != 0 || (st.st_size > 0 && !map_weights(file.get(), static_cast<size_t>(st.st_size))))
          throw IoError(path + ": " + std::strerror(errno));
        return true;
      },
      [](Napi::Env env, bool&) -> Napi::Value { return env.Undefined(); });
}

Napi::Value packed_bytes_of(const Napi::CallbackInfo& info) {
  bool is_vector = false;
  const WeightFormat format = to_weight_format(info.Env(), info[0].ToString().Utf8Value(), &is_vector);
  const int64_t n = info[1].ToNumber().Int64Value(), k = info[2].ToNumber().Int64Value();
  if (n < 1 || k < 1 || n > INT32_MAX || k > INT32_MAX) throw Napi::RangeError::New(info.Env(), "outFeatures, inFeatures: expected 1 to 2147483647");
  return Napi::Number::New(info.Env(), is_vector ? static_cast<double>(k) * 4 : static_cast<double>(packed_bytes(format, n, k)));
}

Napi::Value source_bytes_of(const Napi::CallbackInfo& info) {
  const SourceInfo& source = source_info(to_source_type(info.Env(), info[0].ToString().Utf8Value()));
  const int64_t n = info[1].ToNumber().Int64Value();
  if (n < 0 || n % source.block_elements != 0)
    throw Napi::RangeError::New(info.Env(), "numElements: expected a multiple of " + std::to_string(source.block_elements) + ", got " + std::to_string(n));
  return Napi::Number::New(info.Env(), static_cast<double>(n / source.block_elements) * source.block_bytes);
}

Napi::Value pack(const Napi::CallbackInfo& info) {
  return Task<bool>::run(
      info.Env(),
      [job = to_pack_job(info[0])] {
        pack_tensor(job);
        return true;
      },
      [](Napi::Env env, bool&) -> Napi::Value { return env.Undefined(); });
}

Napi::Value open_runtime(const Napi::CallbackInfo& info) {
  return Task<std::shared_ptr<Model>>::run(
      info.Env(),
      [spec = to_runtime_spec(info[0])] {
        return std::make_shared<Model>(spec.packed_path, spec.dims, spec.tensors, spec.reference_mode, spec.kv_type, spec.device_memory_bytes, spec.num_threads,
                                       spec.int8_adapters, spec.host_memory_bytes, spec.weight_memory_bytes);
      },
      [](Napi::Env env, std::shared_ptr<Model>& model) -> Napi::Value {
        return env.GetInstanceData<AddonData>()->runtime.New({Napi::External<std::shared_ptr<Model>>::New(env, &model)});
      });
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new AddonData{Napi::Persistent(RuntimeObject::define(env))});
  exports.Set("cpuInfo", Napi::Function::New<cpu_info>(env));
  exports.Set("readGguf", Napi::Function::New<read_gguf>(env));
  exports.Set("readIn", Napi::Function::New<read_in>(env));
  exports.Set("packedBytes", Napi::Function::New<packed_bytes_of>(env));
  exports.Set("sourceBytes", Napi::Function::New<source_bytes_of>(env));
  exports.Set("packTensor", Napi::Function::New<pack>(env));
  exports.Set("openVocabulary", Napi::Function::New<open_vocabulary>(env));
  exports.Set("compileGrammar", Napi::Function::New<compile_grammar>(env));
  exports.Set("openRuntime", Napi::Function::New<open_runtime>(env));
  return exports;
}

}  // namespace
}  // namespace motet

using motet::init;
NODE_API_MODULE(motet, init)
