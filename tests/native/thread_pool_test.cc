// Every task once, everything visible afterwards, and threads that come, sleep, wake and go. Run it under
// TSan too: -DCMAKE_CXX_FLAGS=-fsanitize=thread.
#include "thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <chrono>
#include <numeric>
#include <set>
#include <thread>

namespace motet {
namespace {

class ThreadPoolTest : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, testing::Values(1, 2, 3, 8));

TEST_P(ThreadPoolTest, RunsEveryTaskOnce) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.num_threads(), GetParam());
  for (int num_tasks : {0, 1, 2, 3, 17, 1000}) {
    std::vector<int> runs(num_tasks, 0);  // plain: each task has its own, and run() makes them visible
    pool.run(num_tasks, [&](int task, int thread) {
      ASSERT_GE(thread, 0);
      ASSERT_LT(thread, GetParam());
      ++runs[task];
    });
    for (int task = 0; task < num_tasks; ++task)
      ASSERT_EQ(runs[task], 1) << "task " << task << " of " << num_tasks;
  }
}

TEST_P(ThreadPoolTest, RunsEveryTaskOnceWhereEachThreadHasItsOwn) {
  ThreadPool pool(GetParam());
  const std::vector<uint8_t> bytes(1 << 16);
  // The last ends within a line, and is longer than a wait.
  std::vector<Ahead> ahead(GetParam(), {bytes.data(), bytes.data() + 100});
  ahead.back().end = bytes.data() + bytes.size();
  for (int call = 0; call < 300; ++call) {
    const int num_tasks = call % 20;
    std::vector<int> runs(num_tasks, 0);
    const auto count = [&](int task, int) { ++runs[task]; };
    if (call % 3 == 0) pool.run_apart(num_tasks, {}, count);
    else pool.run_apart(num_tasks, ahead, count);
    for (int task = 0; task < num_tasks; ++task) ASSERT_EQ(runs[task], 1) << "task " << task << " of " << num_tasks;
  }
}

TEST_P(ThreadPoolTest, ThreadsBeginWithTasksOfTheirOwn) {
  ThreadPool pool(GetParam());
  const int num_tasks = 5 * GetParam();
  EXPECT_EQ(pool.first_task(num_tasks, 0), 0);
  EXPECT_EQ(pool.first_task(num_tasks, GetParam()), num_tasks);
  std::atomic<int> waiting{0};
  std::vector<int> first(GetParam(), -1);
  pool.run_apart(num_tasks, {}, [&](int task, int thread) {
    if (first[thread] >= 0) return;
    first[thread] = task;
    waiting.fetch_add(1);
    while (waiting.load() < GetParam()) std::this_thread::yield();  // nobody has done its first yet
  });
  for (int thread = 0; thread < GetParam(); ++thread) EXPECT_EQ(first[thread], pool.first_task(num_tasks, thread));
}

TEST_P(ThreadPoolTest, ManyTinyCallsFollowEachOther) {
  ThreadPool pool(GetParam());
  std::vector<int64_t> sums(5, 0);
  constexpr int kCalls = 20000;
  for (int call = 0; call < kCalls; ++call) {
    pool.run(5, [&](int task, int) { sums[task] += call + task; });
  }
  for (int task = 0; task < 5; ++task)
    EXPECT_EQ(sums[task], int64_t{kCalls} * (kCalls - 1) / 2 + int64_t{kCalls} * task);
}

TEST_P(ThreadPoolTest, ACallReadsWhatTheLastOneWrote) {
  ThreadPool pool(GetParam());
  std::vector<int> from(64), to(64);
  std::iota(from.begin(), from.end(), 0);
  for (int call = 0; call < 500; ++call) {
    pool.run(64, [&](int task, int) { to[task] = from[(task + 1) % 64]; });
    std::swap(from, to);
  }
  for (int i = 0; i < 64; ++i) EXPECT_EQ(from[i], (i + 500) % 64);
}

TEST_P(ThreadPoolTest, AThreadIndexIsUsedByOneTaskAtATime) {
  ThreadPool pool(GetParam());
  std::vector<int> scratch(GetParam(), 0);  // plain on purpose: TSan would see a race
  for (int call = 0; call < 100; ++call) pool.run(50, [&](int, int thread) { ++scratch[thread]; });
  EXPECT_EQ(std::accumulate(scratch.begin(), scratch.end(), 0), 5000);
}

TEST(ThreadPoolLifeTest, TasksOfOneCallRunOnSeveralThreads) {
  ThreadPool pool(2);
  std::atomic<int> waiting{0};
  pool.run(2, [&](int, int) {  // returns only when both tasks are under way at once
    waiting.fetch_add(1);
    while (waiting.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(waiting.load(), 2);
}

TEST(ThreadPoolLifeTest, WakesAfterSleeping) {
  ThreadPool pool(4);
  for (int call = 0; call < 20; ++call) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int> waiting{0};
    pool.run(4, [&](int, int) {
      waiting.fetch_add(1);
      while (waiting.load() < 4) std::this_thread::yield();
    });
    ASSERT_EQ(waiting.load(), 4);
  }
}

TEST(ThreadPoolLifeTest, AnIdlePoolBurnsNoTime) {
  ThreadPool pool(4);
  pool.run(100, [](int, int) {});
  const auto cpu_us = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec +
           usage.ru_stime.tv_usec;
  };
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const int64_t before_us = cpu_us();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_LT(cpu_us() - before_us, 20000);  // three spinning workers would burn 200 ms or more
}

TEST(ThreadPoolLifeTest, ComesAndGoesWithOrWithoutWork) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 5);
    if (i % 2 == 0) pool.run(i % 7, [](int, int) {});
  }
}

}  // namespace
}  // namespace motet
