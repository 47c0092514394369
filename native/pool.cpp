#include "pool.h"

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace slingshot {
namespace {

constexpr int SPINS = 500;        // some 20 microseconds of pauses: more than threads of one stage differ by
constexpr int SPINS_IDLE = 1000;  // after a call; then a worker sleeps

struct Pool {
    std::mutex one_call, sleep;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::atomic<unsigned> call{0};  // counts the jobs
    std::atomic<int> running{0};
    Barrier barrier;
    void (*job)(void*, const Team&) = nullptr;
    void* context = nullptr;
    int threads = 0;
    pid_t process = getpid();

    void work(int thread, unsigned done) {
        for (;;) {
            for (int i = 0; i < SPINS_IDLE && call.load(std::memory_order_acquire) == done; i++) _mm_pause();
            if (call.load(std::memory_order_acquire) == done) {
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, [&] { return call.load(std::memory_order_acquire) != done; });
            }
            done++;
            if (thread < threads) job(context, {thread, threads, &barrier});
            running.fetch_sub(1, std::memory_order_release);
        }
    }

    void run(int wanted, void (*f)(void*, const Team&), void* with) {
        std::lock_guard<std::mutex> lock(one_call);
        while (static_cast<int>(workers.size()) < wanted - 1) {
            const int thread = static_cast<int>(workers.size()) + 1;
            workers.emplace_back([this, thread, done = call.load()] { work(thread, done); });
        }
        job = f, context = with, threads = wanted;
        running.store(static_cast<int>(workers.size()), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> awake(sleep);
            call.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        f(with, {0, wanted, &barrier});
        for (int i = 0; running.load(std::memory_order_acquire) != 0; i++) i < SPINS ? _mm_pause() : (void)sched_yield();
    }
};

}  // namespace

void Barrier::wait(unsigned turn) {
    for (int i = 0; turn_.load(std::memory_order_acquire) == turn; i++) i < SPINS ? _mm_pause() : (void)sched_yield();
}

void run_together(int threads, void (*job)(void*, const Team&), void* context) {
    if (threads <= 1) {
        Barrier alone;
        return job(context, {0, 1, &alone});
    }
    // Never destroyed: its workers wait in it when the process ends. A forked child has no workers and makes new ones.
    static std::mutex making;
    static Pool* pool = nullptr;
    Pool* mine;
    {
        std::lock_guard<std::mutex> lock(making);
        if (!pool || pool->process != getpid()) pool = new Pool;
        mine = pool;
    }
    mine->run(threads, job, context);
}

}  // namespace slingshot
