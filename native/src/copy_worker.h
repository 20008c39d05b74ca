// The thread on which pages are copied between the device arena and the host arena: one, its own, so that a copy waits
// neither for a step nor for file reads in libuv's pool. Copies are done in the order in which they were asked for; the
// number of those that wait is bounded. No JavaScript value is touched there.
#pragma once
#include <napi.h>

#include <deque>
#include <memory>
#include <vector>

#include "model.h"
#include "pages.h"
#include "worker_thread.h"

namespace motet {

class CopyWorker {
 public:
  CopyWorker(Napi::Env env, std::shared_ptr<Model> model) : model_(std::move(model)), thread_(env, "motet copy", [this] { loop(); }) {}

  // Copies page from[i] of `source` to page to[i] of the other tier. `owner`, the object that this worker belongs to, is kept
  // alive until that is done. Resolves with { seconds }. Throws when the line is full.
  Napi::Promise start(Napi::Env env, Napi::Object owner, Tier source, std::vector<int32_t> from, std::vector<int32_t> to);
  bool busy() const { return !jobs_.empty(); }

 private:
  static constexpr size_t kMaxJobs = 256;

  struct Job {
    Napi::Promise::Deferred deferred;
    Napi::ObjectReference owner;
    Tier source;
    std::vector<int32_t> from, to;
    double seconds = 0;
  };
  void loop();
  void finish(Napi::Env env);

  std::shared_ptr<Model> model_;
  std::deque<Job> jobs_;      // JavaScript's thread's; the first is the one that is done next
  std::deque<Job*> posted_;   // under the thread's lock
  WorkerThread thread_;       // last: it works with what is above
};

}  // namespace motet
