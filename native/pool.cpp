#include "pool.h"

#include <immintrin.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <vector>

namespace slingshot {
namespace {

constexpr int SPINS = 500;        // some 20 microseconds of pauses: more than threads of one stage differ by
constexpr int SPINS_IDLE = 1000;  // after a call; then a worker sleeps

struct Pool {
    struct Worker {
        std::atomic<unsigned> calls{0};  // in which it takes part
        std::mutex sleep;
        std::condition_variable wake;
    };

    std::mutex one_call;
    std::vector<std::unique_ptr<Worker>> workers;
    Barrier meeting;  // of those that take part
    void (*job)(void*, const Team&) = nullptr;
    void* context = nullptr;
    int threads = 0;
    pid_t process = getpid();

    void work(Worker& me, int thread) {
        for (unsigned done = 0;; done++) {
            for (int i = 0; i < SPINS_IDLE && me.calls.load(std::memory_order_acquire) == done; i++) _mm_pause();
            if (me.calls.load(std::memory_order_acquire) == done) {
                std::unique_lock<std::mutex> lock(me.sleep);
                me.wake.wait(lock, [&] { return me.calls.load(std::memory_order_acquire) != done; });
            }
            const Team team{thread, threads, &meeting};
            job(context, team);
            team.barrier();
        }
    }

    void run(int wanted, void (*f)(void*, const Team&), void* with) {
        std::lock_guard<std::mutex> lock(one_call);
        while (static_cast<int>(workers.size()) < wanted - 1) {
            workers.push_back(std::make_unique<Worker>());
            std::thread([this, &me = *workers.back(), thread = static_cast<int>(workers.size())] {
                work(me, thread);
            }).detach();
        }
        job = f, context = with, threads = wanted;
        for (int i = 0; i < wanted - 1; i++) {
            {
                std::lock_guard<std::mutex> awake(workers[i]->sleep);
                workers[i]->calls.fetch_add(1, std::memory_order_release);
            }
            workers[i]->wake.notify_one();
        }
        const Team team{0, wanted, &meeting};
        f(with, team);
        team.barrier();
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
