#include "scratch.h"

#include <cstdlib>

namespace slingshot {

void* thread_scratch(size_t bytes) {
    static thread_local void* memory = nullptr;
    static thread_local size_t size = 0;
    if (bytes > size) {
        std::free(memory);
        size = (bytes + 4095) / 4096 * 4096;
        memory = std::aligned_alloc(64, size);
        if (!memory) std::abort();
    }
    return memory;
}

}  // namespace slingshot
