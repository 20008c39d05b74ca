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
  given_.push_back(std::make_shared<List>(std::move(copies)));
  {
    const std::lock_guard lock(mutex_);
    new_.push_back(given_.back());
  }
  wake_.notify_one();
  return ++num_posted_;
}

void CopyThread::wait(uint64_t list) {
  while (num_posted_ - given_.size() < list) {
    List& first = *given_.front();
    help(first);
    // What the thread has in hand is one copy, of some KiB.
    while (!first.is_done()) std::this_thread::yield();
    given_.pop_front();
  }
}

void CopyThread::help(List& list) {
  for (size_t i; (i = list.next.fetch_add(1, std::memory_order_relaxed)) < list.copies.size();) {
    const Copy& copy = list.copies[i];
    std::memcpy(copy.target, copy.source, copy.num_bytes);
    list.num_done.fetch_add(1, std::memory_order_release);
  }
}

void CopyThread::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !new_.empty() || stopping_; });
    if (new_.empty()) return;
    const std::shared_ptr<List> list = std::move(new_.front());
    new_.pop_front();
    lock.unlock();
    help(*list);
    lock.lock();
  }
}

}  // namespace motet
