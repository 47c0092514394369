// The threads of a step. All of them run one function together and meet at barriers in it.
//
// A barrier spins for some microseconds and then sleeps: where more threads want to run than there are cores, one that
// spins on may be the very one that keeps the other from arriving, and to a core that idles the system moves another.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

namespace slingshot {

class Barrier {
  public:
    // Every one of `threads` threads calls it as often; memory written before is seen by all after.
    void meet(int threads) {
        if (threads == 1) return;
        const unsigned turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1);
            if (sleepers_.load()) wake();
        } else {
            wait(turn);
        }
    }

  private:
    void wait(unsigned turn);
    void wake();

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> turn_{0};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_;
    std::condition_variable woken_;
};

// One thread's place among those that run together.
struct Team {
    int thread, threads;
    Barrier* meeting;

    void barrier() const { meeting->meet(threads); }

    // This thread's share of `count` things in order: first and last + 1.
    int first(int count) const { return static_cast<int>(static_cast<long>(count) * thread / threads); }
    int last(int count) const { return static_cast<int>(static_cast<long>(count) * (thread + 1) / threads); }
};

// Runs job(context, team) on the calling thread and threads - 1 others; returns when all have. One call at a time: a
// second caller waits.
void run_together(int threads, void (*job)(void*, const Team&), void* context);

template <class F> void run_together(int threads, F& job) {
    run_together(threads, [](void* f, const Team& team) { (*static_cast<F*>(f))(team); }, &job);
}

}  // namespace slingshot
