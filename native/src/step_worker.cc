#include "step_worker.h"

#include "translate.h"

namespace motet {

StepWorker::StepWorker(Napi::Env env, std::shared_ptr<Model> model)
    : model_(std::move(model)),
      env_(env),
      done_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "motet step", 0, 1)) {
  done_.Unref(env);  // an idle engine does not keep the process alive
  thread_ = std::thread([this] { loop(); });
  napi_add_env_cleanup_hook(env, on_environment_end, this);
}

StepWorker::~StepWorker() { stop(); }

void StepWorker::stop() {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
  }
  napi_remove_env_cleanup_hook(env_, on_environment_end, this);
  wake_.notify_one();
  thread_.join();
  done_.Release();
}

Napi::Promise StepWorker::start(Napi::Env env, Napi::Object owner, OwnedBatch batch, std::vector<std::shared_ptr<Adapter>> adapters) {
  if (job_) throw Napi::Error::New(env, "step: expected no step to be running, got a second one");
  auto deferred = Napi::Promise::Deferred::New(env);
  job_.reset(new Job{deferred, Napi::Persistent(owner), std::move(batch), std::move(adapters), {}, {}});
  done_.Ref(env);
  {
    const std::lock_guard lock(mutex_);
    posted_ = true;
  }
  wake_.notify_one();
  return deferred.Promise();
}

void StepWorker::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return posted_ || stopping_; });
    if (!posted_) return;
    posted_ = false;
    Job* const job = job_.get();
    lock.unlock();
    try {
      std::vector<const Adapter*> adapters;
      for (const auto& a : job->adapters) adapters.push_back(a.get());
      model_->step(job->batch.batch, adapters, job->output);
    } catch (const std::exception& e) {
      job->error = e.what();
    }
    done_.NonBlockingCall([this](Napi::Env env, Napi::Function) { finish(env); });
    lock.lock();
  }
}

void StepWorker::finish(Napi::Env env) {
  const Napi::HandleScope scope(env);
  const std::unique_ptr<Job> job = std::move(job_);
  done_.Unref(env);
  if (!job->error.empty()) return job->deferred.Reject(Napi::Error::New(env, job->error).Value());
  try {
    job->deferred.Resolve(from_step_output(env, job->output, job->batch.batch.want_logits));
  } catch (const Napi::Error& e) {  // the result is larger than a typed array can be
    job->deferred.Reject(e.Value());
  }
}

}  // namespace motet
