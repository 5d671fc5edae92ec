// The threads that walk through the network together, with barriers on the way.
//
// They are those of torch's OpenMP team (the library is linked without a runtime of its own), so that no two teams spin
// on the same cores. After a fork that team is gone and its runtime would wait for it for ever: a child of the process
// that loaded the library computes alone.
#pragma once

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hanmo::native {

// While this lives, its thread computes with one rounding: to the nearest, and what is too small for a normal float is
// zero (such numbers take a hundred times as long, and other threads of the process may treat them otherwise).
class Rounding {
 public:
#if defined(__x86_64__)
  Rounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8040); }  // no exceptions; flush to zero, both ways
  ~Rounding() { _mm_setcsr(before_); }

 private:
  const uint32_t before_;
#elif defined(__aarch64__)
  Rounding() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{1} << 24));
  }
  ~Rounding() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  Rounding() {}
#endif
};

inline const pid_t loaded_by = getpid();

class Team {
 public:
  explicit Team(int size) : most_(size), spins_(size > omp_get_num_procs() ? 50 : 2000) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Threads of the next call.
  int size() const { return loaded_by == getpid() ? most_ : 1; }

  // Calls body(thread) on every thread.
  template <typename Body>
  void run(const Body& body) {
    running_ = size();
    if (running_ == 1) {
      const Rounding rounding;
      return body(0);
    }
#pragma omp parallel num_threads(running_)
    {
      const Rounding rounding;
      if (omp_get_thread_num() == 0) running_ = omp_get_num_threads();
#pragma omp barrier
      body(omp_get_thread_num());
    }
  }

  // Threads of the running call.
  int running() const { return running_; }

  // Every thread of the running call comes here before any goes on.
  void barrier() {
    if (running_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == running_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins < spins_)
        relax();
      else
        sched_yield();  // who is waited for may need this core
    }
  }

 private:
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int most_, spins_;
  int running_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace hanmo::native
