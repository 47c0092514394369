// What the processor and the operating system can do. Compiled without any level: it runs everywhere.
#include <cpuid.h>
#include <cstdint>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned part) {
    Registers r;
    if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}

bool has(unsigned word, int bit) { return word >> bit & 1; }

// Linux gives tiles only to a process that asks for them.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace

#define VISIBLE extern "C" __attribute__((visibility("default")))

// Which sources this was built from: kernels/native.py compares it with those beside it.
VISIBLE const char* slingshot_sources() { return SOURCES; }

// Gives the system back what free() keeps for later calls: after large arrays are gone.
VISIBLE void slingshot_return_memory() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

// 0: none, 1: avx2, 2: avx512, 3: avx512bf16, 4: amx; each holds those before it.
VISIBLE int slingshot_level() {
    const Registers basic = cpuid(1, 0), more = cpuid(7, 0), most = cpuid(7, 1);
    if (!has(basic.c, 27) || !has(basic.c, 28)) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // which registers the system saves
    const bool avx2 = (low & 0x6) == 0x6 && has(more.b, 5) && has(basic.c, 12) && has(basic.c, 29);
    if (!avx2) return 0;
    const bool avx512 = (low & 0xe6) == 0xe6 && has(more.b, 16) && has(more.b, 17) && has(more.b, 30) && has(more.b, 31);
    if (!avx512) return 1;
    if (!has(most.a, 5) || !has(more.c, 11)) return 2;  // bf16 dot products, and VNNI
    const bool amx = (low & 0x60000) == 0x60000 && has(more.d, 22) && has(more.d, 24) && has(more.d, 25);
    return amx && tiles_permitted() ? 4 : 3;
}
