// Working memory of a thread, kept from call to call: it grows to the largest size asked for.
#pragma once

#include <cstddef>

namespace slingshot {

// 64-byte aligned; holds what the last call on this thread left there. Products have two of their own, for weights and
// for rows, since stages call them while they work in theirs.
void* thread_scratch(size_t bytes);
void* product_scratch(size_t bytes);
void* row_scratch(size_t bytes);

// Cuts consecutive aligned arrays out of one buffer; with a null buffer it only counts how long that must be.
struct Carver {
    char* base;
    size_t used = 0;

    template <class T> T* take(size_t count) {
        T* taken = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return taken;
    }
};

}  // namespace slingshot
