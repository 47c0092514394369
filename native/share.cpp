#include "share.h"

#include <dlfcn.h>

namespace slingshot {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

template <class F> F found(const char* name) { return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name)); }

}  // namespace

void share(int threads, void (*job)(void*, int, int), void* context) {
    static const Parallel parallel = found<Parallel>("GOMP_parallel");
    static const Number mine = found<Number>("omp_get_thread_num"), all = found<Number>("omp_get_num_threads");
    if (parallel && mine && all) {
        struct Call {
            void (*job)(void*, int, int);
            void* context;
        } call{job, context};
        auto run = [](void* at) {
            const Call& call = *static_cast<Call*>(at);
            call.job(call.context, mine(), all());
        };
        return parallel(run, &call, static_cast<unsigned>(threads), 0);
    }
    auto together = [&](const Team& team) { job(context, team.thread, team.threads); };
    run_together(threads, together);
}

}  // namespace slingshot
