#include "step_worker.h"

#include <chrono>

#include "weight_stream.h"

namespace motet {
namespace {

double steady_ms() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Puts what the step before drew in the place of references to it: −1 − i is its sample i. The samples of a step that
// failed are token 0: whoever counted on them has lost that sequence, and other sequences of the batch have not.
void resolve(std::span<int32_t> ids, const StepOutput& before, bool has_failed, const char* name) {
  for (int32_t& id : ids) {
    if (id >= 0) continue;
    const size_t sample = static_cast<size_t>(-1 - int64_t{id});
    if (!has_failed && sample >= before.tokens.size())
      throw RuntimeError(std::string("batch: ") + name + ": expected tokens, or −1 − i for sample i of the " + std::to_string(before.tokens.size()) +
                         " of the step before, got " + std::to_string(id));
    id = has_failed ? 0 : before.tokens[sample];
  }
}

}  // namespace

const Batch& StepWorker::prepare(const Napi::Value& batch) {
  if (num_started_ - num_finished_ == kMaxSteps)
    throw Napi::Error::New(batch.Env(), "step: expected at most one step to be under way, got a third one");
  OwnedBatch& owned = job(num_started_).batch;
  to_batch(batch, owned);
  return owned.batch;
}

Napi::Promise StepWorker::start(Napi::Env env, Napi::Object owner, std::vector<std::shared_ptr<Adapter>> adapters,
                                std::vector<std::shared_ptr<GrammarMatcher>> matchers) {
  Job& next = job(num_started_);
  next.deferred = Napi::Promise::Deferred::New(env);
  next.owner = Napi::Persistent(owner);
  next.adapters = std::move(adapters);
  next.matchers = std::move(matchers);
  if (num_started_++ == num_finished_) thread_.has_work(env, true);
  thread_.post([&] { num_posted_ = num_started_; });
  return next.deferred->Promise();
}

void StepWorker::loop() {
  for (uint64_t step = 0; thread_.wait([&] { return num_posted_ > step; }, [] {}); ++step) {
    run(job(step), job(step + kMaxSteps - 1));
    thread_.call_back([this](Napi::Env env) { finish(env); });
  }
}

void StepWorker::run(Job& job, const Job& before) {
  job.began_ms = steady_ms();
  job.error.clear();
  job.error_code = nullptr;
  job.matcher_errors.clear();
  try {
    const bool has_failed = !before.error.empty();
    resolve(job.batch.token_ids, before.output, has_failed, "tokenIds");
    resolve(job.batch.history_ids, before.output, has_failed, "historyIds");
    std::vector<const Adapter*> adapters;
    for (const auto& a : job.adapters) adapters.push_back(a.get());
    std::vector<TokenMatcher*> matchers;
    for (const auto& m : job.matchers) matchers.push_back(m.get());
    Batch batch = job.batch.batch;
    batch.matchers = matchers;
    model_->step(batch, adapters, job.output);
    for (size_t i = 0; i < job.matchers.size(); ++i)
      if (job.matchers[i] && !job.matchers[i]->error().empty()) job.matcher_errors.emplace_back(static_cast<int>(i), job.matchers[i]->error());
  } catch (const IoError& e) {
    job.error = e.what();
    job.error_code = "io_failed";
  } catch (const std::exception& e) {
    job.error = e.what();
  }
  job.ended_ms = steady_ms();
}

void StepWorker::finish(Napi::Env env) {
  const Napi::HandleScope scope(env);
  Job& job = this->job(num_finished_);
  // The owner may be collected after this function, and this worker with it.
  const Napi::ObjectReference owner = std::move(job.owner);
  const Napi::Promise::Deferred deferred = *job.deferred;
  job.deferred.reset();
  job.adapters.clear();
  job.matchers.clear();
  if (++num_finished_ == num_started_) thread_.has_work(env, false);
  if (!job.error.empty()) {
    const auto error = Napi::Error::New(env, job.error);
    if (job.error_code) error.Value().As<Napi::Object>().Set("code", job.error_code);
    return deferred.Reject(error.Value());
  }
  try {
    Napi::Object result = from_step_output(env, job.output, job.batch.batch.want_logits, job.arrays);
    auto matcher_errors = Napi::Array::New(env);
    for (const auto& [sample, message] : job.matcher_errors) {
      auto error = Napi::Object::New(env);
      error.Set("sample", sample);
      error.Set("message", message);
      matcher_errors.Set(matcher_errors.Length(), error);
    }
    result.Set("matcherErrors", matcher_errors);
    result.Set("stagedBytes", static_cast<double>(job.output.staged_bytes));
    result.Set("beganMs", job.began_ms);
    result.Set("endedMs", job.ended_ms);
    deferred.Resolve(result);
  } catch (const Napi::Error& e) {  // the result is larger than a typed array can be
    deferred.Reject(e.Value());
  }
}

}  // namespace motet
