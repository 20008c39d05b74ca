// A fixed number of threads that share out the tasks of one call at a time. Workers spin for some
// microseconds after a call, so that the next one of the same step finds them awake, and then sleep: an idle
// pool burns nothing. Who waits may use the time to ask for memory that a later call will read.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"

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
    run_tasks(num_tasks, 1, {}, call_of(function), context_of(function));
  }

  // The same, but each thread begins with tasks of its own, those from first_task(num_tasks, thread) on, and helps the others
  // when it has done them. Until the next call has work for it, a thread that waits asks for ahead[thread], one for each
  // thread or none at all, into the cache.
  template <typename Function>
  void run_apart(int num_tasks, std::span<const Ahead> ahead, Function&& function) {
    run_tasks(num_tasks, num_threads(), ahead, call_of(function), context_of(function));
  }
  int first_task(int num_tasks, int thread) const { return static_cast<int>(int64_t{num_tasks} * thread / num_threads()); }

 private:
  using Call = void (*)(void* context, int task, int thread) noexcept;
  // Tasks [next, end) that are left of a run of neighbours.
  struct alignas(64) Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  template <typename Function>
  static Call call_of(Function&) {
    return [](void* context, int task, int thread) noexcept { (*static_cast<std::remove_reference_t<Function>*>(context))(task, thread); };
  }
  template <typename Function>
  static void* context_of(Function& function) {
    return const_cast<void*>(static_cast<const void*>(std::addressof(function)));
  }

  void run_tasks(int num_tasks, int num_runs, std::span<const Ahead> ahead, Call call, void* context);
  void claim_tasks(int thread);
  uint32_t await_change(const std::atomic<uint32_t>& value, uint32_t old, Ahead& ahead);
  void work(int thread);
  bool enter();
  void leave();
  void stop();

  // The call in progress: written while no worker is inside, read by those inside.
  Call call_ = nullptr;
  void* context_ = nullptr;
  int num_runs_ = 0;
  std::vector<Ahead> ahead_;  // one a thread
  std::unique_ptr<Run[]> runs_;
  // How many workers are inside the call; kOpen while more may enter. A worker that wakes late finds the call
  // closed.
  alignas(64) std::atomic<uint32_t> inside_{0};
  // Grows by one with every call: what idle workers watch.
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace motet
