// A thread that copies memory beside the operations of a step: lists of copies, one after another in the order in which they
// were given. It begins with the first list and sleeps between them. Whoever reads what a list wrote waits for it first, and
// copies along meanwhile: a thread that is not awake yet, or has no core, holds nobody up.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace motet {

class CopyThread {
 public:
  struct Copy {
    uint8_t* target;
    const uint8_t* source;
    size_t num_bytes;
  };

  CopyThread() = default;
  ~CopyThread();  // after the lists that were given
  CopyThread(const CopyThread&) = delete;
  CopyThread& operator=(const CopyThread&) = delete;

  // Gives it one more list. Returns the list's number, for `wait`: 1, 2, …
  uint64_t post(std::vector<Copy> copies);
  // Returns when that list and those before it are copied; 0: at once.
  void wait(uint64_t list);
  // Returns when all are.
  void wait_for_all() { wait(num_posted_); }

 private:
  struct List {
    std::vector<Copy> copies;
    std::atomic<size_t> next{0};      // who raises it does that copy
    std::atomic<size_t> num_done{0};
    explicit List(std::vector<Copy> list) : copies(std::move(list)) {}
    bool is_done() const { return num_done.load(std::memory_order_acquire) == copies.size(); }
  };
  static void help(List& list);
  void loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<List>> new_;  // under the lock, as is the next: those that the thread has not begun
  bool stopping_ = false;
  std::deque<std::shared_ptr<List>> given_;  // the caller's, as is the rest: those that nobody waited for yet
  uint64_t num_posted_ = 0;
  std::thread thread_;  // last: it works with what is above
};

}  // namespace motet
