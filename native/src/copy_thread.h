// A thread that copies memory beside the operations of a step: lists of copies, one after another in the order in which they
// were given. It begins with the first list and sleeps between them; whoever reads what a list wrote waits for it first.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
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
  void loop();

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<std::vector<Copy>> lists_;  // under the lock, as are those below
  uint64_t num_done_ = 0;
  bool stopping_ = false;
  uint64_t num_posted_ = 0;              // the caller's
  std::thread thread_;                   // last: it works with what is above
};

}  // namespace motet
