// The threads of PyTorch through the stable ABI of LibTorch: a second OpenMP runtime would compete with its own.

// The oldest torch whose library has what is called here.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include "threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace fdu {

int64_t threads() {
    uint32_t count = 1;
    torch_get_num_threads(&count);
    return count;
}

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    if (torch_parallel_for(0, count, grain, body, context)) throw std::runtime_error("fdu_kernels: torch_parallel_for failed");
}

}  // namespace fdu
