// Threads through the stable ABI of LibTorch, as a second OpenMP runtime would compete with its own; huge pages through
// madvise, on Linux.

// The oldest torch whose library has what is called here.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include "host.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fdu {

int64_t threads() {
    uint32_t count = 1;
    torch_get_num_threads(&count);
    return count;
}

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    if (torch_parallel_for(0, count, grain, body, context)) throw std::runtime_error("fdu_kernels: torch_parallel_for failed");
}

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t(1) << 21;
    const uintptr_t begin = (uintptr_t(data) + huge - 1) & ~(huge - 1), end = (uintptr_t(data) + bytes) & ~(huge - 1);
    // A failure costs speed only.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace fdu
