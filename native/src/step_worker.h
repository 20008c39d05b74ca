// The thread on which steps run: one, its own, so that a step never waits behind file reads in libuv's pool.
// Steps run in the order they were started. Two may be under way, one that runs and one behind it, so that the thread goes
// from one to the next without waiting for JavaScript. Plain structs go to it and come back; no JavaScript value is
// touched there.
#pragma once
#include <napi.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "grammar.h"
#include "model.h"
#include "translate.h"
#include "worker_thread.h"

namespace motet {

class StepWorker {
 public:
  StepWorker(Napi::Env env, std::shared_ptr<Model> model) : model_(std::move(model)), thread_(env, "motet step", [this] { loop(); }) {}

  // Copies the arrays of the next step, which `start` then starts. Throws when two are under way, and what to_batch throws.
  const Batch& prepare(const Napi::Value& batch);
  // Starts the step that was prepared. `owner`, the object that this worker belongs to, is kept alive until the step has
  // ended; adapters and matchers [numSamples] are held by shared pointers. Resolves with StepResult's object.
  Napi::Promise start(Napi::Env env, Napi::Object owner, std::vector<std::shared_ptr<Adapter>> adapters,
                      std::vector<std::shared_ptr<GrammarMatcher>> matchers);
  bool busy() const { return num_started_ > num_finished_; }

 private:
  static constexpr int kMaxSteps = 2;

  // Step n lives in jobs_[n % kMaxSteps]. JavaScript's thread writes it before the step is posted and reads it when the step
  // is done; `output` and `error` are the worker's, and stay until it runs step n + kMaxSteps.
  struct Job {
    std::optional<Napi::Promise::Deferred> deferred;
    Napi::ObjectReference owner;
    OwnedBatch batch;
    std::vector<std::shared_ptr<Adapter>> adapters;
    std::vector<std::shared_ptr<GrammarMatcher>> matchers;
    StepOutput output;
    std::string error;
    std::vector<std::pair<int, std::string>> matcher_errors;  // by sample
    const char* error_code = nullptr;  // null: none but the message
    double began_ms = 0, ended_ms = 0;  // steady clock
    ResultArrays arrays;
  };
  Job& job(uint64_t step) { return jobs_[step % kMaxSteps]; }
  void loop();
  void run(Job& job, const Job& before);
  void finish(Napi::Env env);

  std::shared_ptr<Model> model_;
  std::array<Job, kMaxSteps> jobs_;
  uint64_t num_started_ = 0, num_finished_ = 0;  // JavaScript's thread
  uint64_t num_posted_ = 0;                      // under the thread's lock
  WorkerThread thread_;                          // last: it works with what is above
};

}  // namespace motet
