// SPDX-License-Identifier: Apache-2.0
// Threads that share work by taking numbers: torch's OpenMP pool, or own threads where the build has no OpenMP.
#pragma once
#include <atomic>

#if defined(_OPENMP) && !defined(MCMOE_STD_THREADS)
#include <omp.h>
#else
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#endif

namespace mcmoe {

class Team {
 public:
  // Calls f(team) on `threads` threads, the caller among them, and waits for all.
  template <class F>
  static void run(int threads, F f) {
    Shared shared(threads);
    if (threads <= 1) {
      Team team(shared, 0, 1);
      f(team);
      return;
    }
#if defined(_OPENMP) && !defined(MCMOE_STD_THREADS)
#pragma omp parallel num_threads(threads)
    {
      Team team(shared, omp_get_thread_num(), omp_get_num_threads());
      f(team);
    }
#else
    std::vector<std::thread> others;
    for (int id = 1; id < threads; id++)
      others.emplace_back([&shared, &f, id, threads] {
        Team team(shared, id, threads);
        f(team);
      });
    Team team(shared, 0, threads);
    f(team);
    for (auto& thread : others) thread.join();
#endif
  }

  // Threads that torch allows here: 1 inside somebody's parallel region.
  static int most() {
#if defined(_OPENMP) && !defined(MCMOE_STD_THREADS)
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return threads_wanted();
#endif
  }
  static int& threads_wanted() {
    static int wanted = 1;
    return wanted;
  }

  // The next number nobody has taken; `end` or more when all are. Numbers start again after a barrier.
  int next(int end) {
    const int n = size == 1 ? taken_++ : shared_.counters[phase_ % 4].fetch_add(1, std::memory_order_relaxed);
    return n < end ? n : end;
  }

  // All threads have come here, and what they wrote before is seen after.
  void barrier() {
    phase_++;
    taken_ = 0;
    if (size == 1) return;
    // the counter after the next is free: whoever used it passed the barrier before this one
    shared_.counters[(phase_ + 1) % 4].store(0, std::memory_order_relaxed);
#if defined(_OPENMP) && !defined(MCMOE_STD_THREADS)
#pragma omp barrier
#else
    std::unique_lock<std::mutex> lock(shared_.mutex);
    const int turn = shared_.turn;
    if (++shared_.waiting == size) {
      shared_.waiting = 0;
      shared_.turn++;
      shared_.all_here.notify_all();
    } else {
      shared_.all_here.wait(lock, [&] { return shared_.turn != turn; });
    }
#endif
  }

  const int id, size;

 private:
  struct Shared {
    explicit Shared(int) {}
    std::atomic<int> counters[4] = {};
#if !defined(_OPENMP) || defined(MCMOE_STD_THREADS)
    std::mutex mutex;
    std::condition_variable all_here;
    int waiting = 0, turn = 0;
#endif
  };
  Team(Shared& shared, int id_, int size_) : id(id_), size(size_), shared_(shared) {}

  Shared& shared_;
  int phase_ = 0, taken_ = 0;
};

}  // namespace mcmoe
