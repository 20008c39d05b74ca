// The thread on which steps run: one, its own, so that a step never waits behind file reads in libuv's pool.
// A plain struct goes to it and comes back; no JavaScript value is touched there.
#pragma once
#include <napi.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "batch.h"
#include "model.h"

namespace motet {

class StepWorker {
 public:
  StepWorker(Napi::Env env, std::shared_ptr<Model> model);
  ~StepWorker();

  // Starts a step. `owner`, the object that this worker belongs to, is kept alive until the step has ended; the adapters
  // are held by shared pointers. Resolves with StepResult's object. Throws when a step is already running.
  Napi::Promise start(Napi::Env env, Napi::Object owner, OwnedBatch batch, std::vector<std::shared_ptr<Adapter>> adapters);
  bool busy() const { return job_ != nullptr; }
  // Ends the thread, after the step in progress. Runs by itself when the environment ends, before the channel back does.
  void stop();

 private:
  struct Job {
    Napi::Promise::Deferred deferred;
    Napi::ObjectReference owner;
    OwnedBatch batch;
    std::vector<std::shared_ptr<Adapter>> adapters;
    StepOutput output;
    std::string error;
  };
  static void on_environment_end(void* worker) { static_cast<StepWorker*>(worker)->stop(); }
  void loop();
  void finish(Napi::Env env);

  std::shared_ptr<Model> model_;
  Napi::Env env_;
  Napi::ThreadSafeFunction done_;
  std::unique_ptr<Job> job_;  // JavaScript thread; the worker reads it between posted_ and done_
  std::mutex mutex_;
  std::condition_variable wake_;
  bool posted_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace motet
