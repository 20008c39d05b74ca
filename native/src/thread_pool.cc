#include "thread_pool.h"

#include <chrono>

namespace motet {

namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr std::chrono::microseconds kSpin{50};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Asks for one KiB. The second level of cache: the first is small and busy.
void ask(Ahead& ahead) {
  for (int i = 0; i < 16 && ahead.at < ahead.end; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : ahead_(num_threads), runs_(std::make_unique<Run[]>(num_threads)) {
  workers_.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int thread = 1; thread < num_threads; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (...) {  // the system refused a thread: end those that run
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// Returns when `value` is no longer `old`: watches it for kSpin, then sleeps.
uint32_t ThreadPool::await_change(const std::atomic<uint32_t>& value, uint32_t old, Ahead& ahead) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (const uint32_t now = value.load(std::memory_order_acquire); now != old) return now;
      if (ahead.at < ahead.end) ask(ahead);
      else pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

void ThreadPool::run_tasks(int num_tasks, int num_runs, std::span<const Ahead> ahead, Call call, void* context) {
  if (workers_.empty() || num_tasks <= 1) {
    for (int task = 0; task < num_tasks; ++task) call(context, task, 0);
    return;
  }
  call_ = call;
  context_ = context;
  num_runs_ = num_runs;
  for (int run = 0; run < num_runs; ++run) {
    runs_[run].next.store(num_runs == 1 ? 0 : first_task(num_tasks, run), std::memory_order_relaxed);
    runs_[run].end = num_runs == 1 ? num_tasks : first_task(num_tasks, run + 1);
  }
  for (int thread = 0; thread < num_threads(); ++thread) ahead_[thread] = ahead.empty() ? Ahead{} : ahead[thread];
  inside_.store(kOpen, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();

  claim_tasks(0);

  // No task is left to claim. Whoever is inside still works on its last one; whoever is not is not waited
  // for.
  uint32_t inside = inside_.fetch_and(~kOpen, std::memory_order_acquire) & ~kOpen;
  while (inside != 0) inside = await_change(inside_, inside, ahead_[0]);
}

void ThreadPool::claim_tasks(int thread) {
  for (int i = 0; i < num_runs_; ++i) {
    Run& run = runs_[(thread + i) % num_runs_];
    while (run.next.load(std::memory_order_relaxed) < run.end) {
      const int64_t task = run.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= run.end) break;
      call_(context_, static_cast<int>(task), thread);
    }
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  Ahead ahead;
  for (;;) {
    seen = await_change(generation_, seen, ahead);
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (!enter()) continue;
    claim_tasks(thread);
    // What it still has from before is for a call that is yet to come.
    if (ahead_[thread].at != nullptr) ahead = ahead_[thread];
    leave();
  }
}

bool ThreadPool::enter() {
  uint32_t inside = inside_.load(std::memory_order_relaxed);
  while ((inside & kOpen) != 0) {
    if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire,
                                      std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

void ThreadPool::leave() {
  if (inside_.fetch_sub(1, std::memory_order_release) == 1)
    inside_.notify_one();  // the caller, once it has closed
}

}  // namespace motet
