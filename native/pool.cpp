#include "pool.h"

#include <immintrin.h>
#include <unistd.h>

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
    Barrier stages, end;  // of those that take part, of all workers and the caller
    void (*job)(void*, const Team&) = nullptr;
    void* context = nullptr;
    int threads = 0, all = 0;
    pid_t process = getpid();

    void work(int thread, unsigned done) {
        for (;;) {
            for (int i = 0; i < SPINS_IDLE && call.load(std::memory_order_acquire) == done; i++) _mm_pause();
            if (call.load(std::memory_order_acquire) == done) {
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, [&] { return call.load(std::memory_order_acquire) != done; });
            }
            done++;
            const int everyone = all;
            if (thread < threads) job(context, {thread, threads, &stages});
            end.meet(everyone);
        }
    }

    void run(int wanted, void (*f)(void*, const Team&), void* with) {
        std::lock_guard<std::mutex> lock(one_call);
        while (static_cast<int>(workers.size()) < wanted - 1) {
            const int thread = static_cast<int>(workers.size()) + 1;
            workers.emplace_back([this, thread, done = call.load()] { work(thread, done); });
        }
        job = f, context = with, threads = wanted, all = static_cast<int>(workers.size()) + 1;
        {
            std::lock_guard<std::mutex> awake(sleep);
            call.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        f(with, {0, wanted, &stages});
        end.meet(all);
    }
};

}  // namespace

void Barrier::wait(unsigned turn) {
    for (int i = 0; i < SPINS; i++) {
        if (turn_.load(std::memory_order_acquire) != turn) return;
        _mm_pause();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    woken_.wait(lock, [&] { return turn_.load() != turn; });
    sleepers_.fetch_sub(1);
}

void Barrier::wake() {
    std::lock_guard<std::mutex> lock(sleep_);
    woken_.notify_all();
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
