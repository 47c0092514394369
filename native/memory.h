// A piece of memory that grows to what is asked for, zeros at first; large ones on the system's large pages. Carver
// (scratch.h) cuts it into arrays.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace slingshot {

class Memory {
  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { std::free(base_); }

    // At least so many bytes, and some more after them: kernels may read a little past an array's end. Larger than
    // before, it is new and zero; else it is as it was left.
    char* reserve(size_t bytes) {
        if (bytes + SPARE <= size_) return base_;
        std::free(base_);
        const size_t unit = bytes < LARGE ? 4096 : LARGE;
        size_ = (bytes + SPARE + unit - 1) / unit * unit;
        base_ = static_cast<char*>(std::aligned_alloc(unit, size_));
        if (!base_) std::abort();
#if defined(MADV_HUGEPAGE)
        if (unit == LARGE) madvise(base_, size_, MADV_HUGEPAGE);
#endif
        std::memset(base_, 0, size_);
        return base_;
    }

  private:
    static constexpr size_t LARGE = 2 << 20, SPARE = 4096;
    char* base_ = nullptr;
    size_t size_ = 0;
};

}  // namespace slingshot
