// A piece of memory that grows to what is asked for, zeros at first; large ones on the system's large pages, and taken
// from it as they are first written. Carver (scratch.h) cuts it into arrays.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace slingshot {

class Memory {
  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { give_back(); }

    // At least so many bytes, and some more after them: kernels may read a little past an array's end. Larger than
    // before, it is new and zero; else it is as it was left.
    char* reserve(size_t bytes) {
        if (bytes + SPARE <= size_) return base_;
        give_back();
        const size_t unit = bytes < LARGE ? 4096 : LARGE;
        size_ = (bytes + SPARE + unit - 1) / unit * unit;
        mapped_ = size_ + unit;
        map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map_ == MAP_FAILED) std::abort();
        const uintptr_t first = reinterpret_cast<uintptr_t>(map_);
        base_ = static_cast<char*>(map_) + ((first + unit - 1) / unit * unit - first);
#if defined(MADV_HUGEPAGE)
        if (unit == LARGE) madvise(base_, size_, MADV_HUGEPAGE);
#endif
        return base_;
    }

  private:
    void give_back() {
        if (size_) munmap(map_, mapped_);
        size_ = 0;
    }

    static constexpr size_t LARGE = 2 << 20, SPARE = 4096;
    char* base_ = nullptr;
    void* map_ = nullptr;
    size_t size_ = 0, mapped_ = 0;
};

}  // namespace slingshot
