// A fixed number of threads that share out the tasks of one call at a time. Workers spin for some
// microseconds after a call, so that the next one of the same step finds them awake, and then sleep: an idle
// pool burns nothing.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace motet {

class ThreadPool {
 public:
  // The caller of run() is one of the num_threads threads; num_threads >= 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls function(task, thread) once for every task in [0, num_tasks), tasks claimed in ascending order,
  // thread in [0, num_threads); returns when all are done, and then everything they wrote is visible. The
  // function must not throw (that terminates) nor call run(). One call at a time.
  template <typename Function>
  void run(int num_tasks, Function&& function) {
    using Plain = std::remove_reference_t<Function>;
    const Call call = [](void* context, int task, int thread) noexcept {
      (*static_cast<Plain*>(context))(task, thread);
    };
    run_tasks(num_tasks, call, const_cast<void*>(static_cast<const void*>(std::addressof(function))));
  }

 private:
  using Call = void (*)(void* context, int task, int thread) noexcept;

  void run_tasks(int num_tasks, Call call, void* context);
  void claim_tasks(int thread);
  void work(int thread);
  bool enter();
  void leave();
  void stop();

  // The call in progress: written while no worker is inside, read by those inside.
  int num_tasks_ = 0;
  Call call_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> next_task_{0};
  // How many workers are inside the call; kOpen while more may enter. A worker that wakes late finds the call
  // closed.
  alignas(64) std::atomic<uint32_t> inside_{0};
  // Grows by one with every call: what idle workers watch.
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace motet
