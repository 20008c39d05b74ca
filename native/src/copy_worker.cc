#include "copy_worker.h"

#include <chrono>
#include <string>

namespace motet {

Napi::Promise CopyWorker::start(Napi::Env env, Napi::Object owner, Tier source, std::vector<int32_t> from, std::vector<int32_t> to) {
  if (jobs_.size() == kMaxJobs)
    throw Napi::Error::New(env, "copyPages: expected at most " + std::to_string(kMaxJobs) + " copies to be under way, got another one");
  if (jobs_.empty()) thread_.has_work(env, true);
  // A deque: jobs stay where they are while others come and go at its ends.
  jobs_.push_back({Napi::Promise::Deferred::New(env), Napi::Persistent(owner), source, std::move(from), std::move(to)});
  thread_.post([&] { posted_.push_back(&jobs_.back()); });
  return jobs_.back().deferred.Promise();
}

void CopyWorker::loop() {
  using Clock = std::chrono::steady_clock;
  Job* job = nullptr;
  const auto take = [&] {
    job = posted_.front();
    posted_.pop_front();
  };
  while (thread_.wait([&] { return !posted_.empty(); }, take)) {
    const auto began = Clock::now();
    copy_pages(*model_, job->source, job->from, job->to);
    job->seconds = std::chrono::duration<double>(Clock::now() - began).count();
    thread_.call_back([this](Napi::Env env) { finish(env); });
  }
}

void CopyWorker::finish(Napi::Env env) {
  const Napi::HandleScope scope(env);
  // The owner may be collected after this function, and this worker with it.
  const Job job = std::move(jobs_.front());
  jobs_.pop_front();
  if (jobs_.empty()) thread_.has_work(env, false);
  auto result = Napi::Object::New(env);
  result.Set("seconds", job.seconds);
  job.deferred.Resolve(result);
}

}  // namespace motet
