// A thread of the addon's own that works for one JavaScript object. It waits for work, and calls back on JavaScript's
// thread; it ends with the environment if not before, and an idle one does not keep the process alive.
#pragma once
#include <napi.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace motet {

class WorkerThread {
 public:
  // `loop` runs on the thread, and returns once wait() has said that it is to end. `name` is what debuggers show.
  WorkerThread(Napi::Env env, const char* name, std::function<void()> loop)
      : env_(env), done_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), name, 0, 1)) {
    done_.Unref(env);
    thread_ = std::thread(std::move(loop));
    napi_add_env_cleanup_hook(env, on_environment_end, this);
  }
  ~WorkerThread() { stop(); }
  WorkerThread(const WorkerThread&) = delete;

  // On JavaScript's thread: while there is work the process stays alive.
  void has_work(Napi::Env env, bool is_so) {
    if (is_so) done_.Ref(env);
    else done_.Unref(env);
  }
  // Changes what wait() looks at, and wakes the thread.
  template <typename Change>
  void post(Change change) {
    {
      const std::lock_guard lock(mutex_);
      change();
    }
    wake_.notify_one();
  }

  // On the thread: waits until `is_ready` says so, then calls `take`, both under the lock. False: it is to end.
  template <typename IsReady, typename Take>
  bool wait(IsReady is_ready, Take take) {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [&] { return is_ready() || stopping_; });
    if (stopping_) return false;
    take();
    return true;
  }
  // Calls it on JavaScript's thread, soon.
  template <typename Callback>
  void call_back(Callback callback) {
    done_.NonBlockingCall([callback](Napi::Env env, Napi::Function) { callback(env); });
  }

 private:
  static void on_environment_end(void* worker) { static_cast<WorkerThread*>(worker)->stop(); }
  // After the work in progress. When the environment ends this comes before the channel back goes.
  void stop() {
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

  Napi::Env env_;
  Napi::ThreadSafeFunction done_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace motet
