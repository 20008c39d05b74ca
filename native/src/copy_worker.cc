#include "copy_worker.h"

#include <chrono>
#include <string>

namespace motet {

CopyWorker::CopyWorker(Napi::Env env, std::shared_ptr<Model> model)
    : model_(std::move(model)),
      env_(env),
      done_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "motet copy", 0, 1)) {
  done_.Unref(env);  // an idle engine does not keep the process alive
  thread_ = std::thread([this] { loop(); });
  napi_add_env_cleanup_hook(env, on_environment_end, this);
}

CopyWorker::~CopyWorker() { stop(); }

void CopyWorker::stop() {
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

Napi::Promise CopyWorker::start(Napi::Env env, Napi::Object owner, Tier source, std::vector<int32_t> from, std::vector<int32_t> to) {
  if (jobs_.size() == kMaxJobs)
    throw Napi::Error::New(env, "copyPages: expected at most " + std::to_string(kMaxJobs) + " copies to be under way, got another one");
  if (jobs_.empty()) done_.Ref(env);
  // A deque: jobs stay where they are while others come and go at its ends.
  jobs_.push_back({Napi::Promise::Deferred::New(env), Napi::Persistent(owner), source, std::move(from), std::move(to)});
  {
    const std::lock_guard lock(mutex_);
    posted_.push_back(&jobs_.back());
  }
  wake_.notify_one();
  return jobs_.back().deferred.Promise();
}

void CopyWorker::loop() {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !posted_.empty() || stopping_; });
    if (stopping_) return;
    Job& job = *posted_.front();
    posted_.pop_front();
    lock.unlock();
    const auto began = Clock::now();
    copy_pages(*model_, job.source, job.from, job.to);
    job.seconds = std::chrono::duration<double>(Clock::now() - began).count();
    done_.NonBlockingCall([this](Napi::Env env, Napi::Function) { finish(env); });
    lock.lock();
  }
}

void CopyWorker::finish(Napi::Env env) {
  const Napi::HandleScope scope(env);
  // The owner may be collected after this function, and this worker with it.
  const Job job = std::move(jobs_.front());
  jobs_.pop_front();
  if (jobs_.empty()) done_.Unref(env);
  auto result = Napi::Object::New(env);
  result.Set("seconds", job.seconds);
  job.deferred.Resolve(result);
}

}  // namespace motet
