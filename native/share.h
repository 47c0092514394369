// Work of a training step, shared among threads: torch's own where they can be had.
//  Between two of our calls torch multiplies on several threads, which spin for a while in wait of more. Threads of
// another pool would fight them for the cores; so the same ones (GNU OpenMP's) are asked for by name, and only where
// the program has none our pool works.
#pragma once

#include "pool.h"

namespace slingshot {

// Runs job(context, thread, threads) for every thread; which of them does what must not change any result.
void share(int threads, void (*job)(void*, int, int), void* context);

// f(begin, end) over parts of 0 to count, `grain` at a time.
template <class F> void share_rows(int threads, long count, long grain, F&& f) {
    struct Work {
        F& f;
        long count, grain;
    } work{f, count, grain};
    auto job = [](void* context, int thread, int all) {
        Work& work = *static_cast<Work*>(context);
        const long grains = (work.count + work.grain - 1) / work.grain;
        const long begin = grains * thread / all * work.grain, end = grains * (thread + 1) / all * work.grain;
        if (begin < work.count) work.f(begin, end < work.count ? end : work.count);
    };
    if (threads <= 1 || count <= grain) return f(0, count);
    share(threads, job, &work);
}

}  // namespace slingshot
