#include "scratch.h"

#include <cstdlib>

namespace slingshot {
namespace {

struct Buffer {
    void* memory = nullptr;
    size_t size = 0;

    ~Buffer() { std::free(memory); }

    void* grown(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(64, size);
            if (!memory) std::abort();
        }
        return memory;
    }
};

}  // namespace

void* thread_scratch(size_t bytes) {
    static thread_local Buffer buffer;
    return buffer.grown(bytes);
}

void* product_scratch(size_t bytes) {
    static thread_local Buffer buffer;
    return buffer.grown(bytes);
}

void* row_scratch(size_t bytes) {
    static thread_local Buffer buffer;
    return buffer.grown(bytes);
}

}  // namespace slingshot
