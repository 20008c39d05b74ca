#include "copy_thread.h"

#include <cstring>

namespace motet {

CopyThread::~CopyThread() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

uint64_t CopyThread::post(std::vector<Copy> copies) {
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  {
    const std::lock_guard lock(mutex_);
    lists_.push_back(std::move(copies));
  }
  wake_.notify_one();
  return ++num_posted_;
}

void CopyThread::wait(uint64_t list) {
  if (list == 0) return;
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return num_done_ >= list; });
}

void CopyThread::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !lists_.empty() || stopping_; });
    if (lists_.empty()) return;
    const std::vector<Copy> copies = std::move(lists_.front());
    lists_.pop_front();
    lock.unlock();
    for (const Copy& copy : copies) std::memcpy(copy.target, copy.source, copy.num_bytes);
    lock.lock();
    ++num_done_;
    done_.notify_all();
  }
}

}  // namespace motet
