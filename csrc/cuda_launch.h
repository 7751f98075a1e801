// What the launches of all kernels share: the workspace, tickets, the choice of a type, the size of a wave.

#pragma once

#include "cuda.h"
#include "cuda_machine.h"
#include "cuda_plan.h"

namespace fdu::cuda {

// Bytes before the partial sums in a workspace.
constexpr int64_t ticket_bytes = (4 * ticket_count + 255) / 256 * 256;
// ceil(wave / batch) blocks a sample make up at most the wave and another block for each sample.
constexpr int64_t most_partials = 2 * most_parts;

// The parts of a workspace.
struct Workspace {
    unsigned* tickets;
    Sums* partials;
    double* losses;
    float* coefficients;

    Workspace(const DLTensor& tensor, int64_t batch) {
        char* const data = data_of(tensor);
        tickets = reinterpret_cast<unsigned*>(data);
        partials = reinterpret_cast<Sums*>(data + ticket_bytes);
        losses = reinterpret_cast<double*>(partials + most_partials);
        coefficients = reinterpret_cast<float*>(losses + batch);
    }
};

// Calls with a value of the type that stands for the elements.
template <class F>
void with_type(Type type, Access access, const F& call) {
    if (access == Access::groups) return call(Mixed{});
    switch (type) {
        case Type::float16: return call(Half{});
        case Type::bfloat16: return call(BFloat16{});
        default: return call(Float{});
    }
}

using GaussianKernel = void (*)(GaussianTask);

// Those of gaussian_sums or gaussian_gradient.
GaussianKernel walking_kernel(bool gradient, const GaussianTask& task, Access access);

const Device& device_of(int index);

// Zeros for a launch that leaves them as zeros.
unsigned* tickets_for(const Context& context, int index, const Workspace& workspace, int64_t used);

template <class Kernel>
int64_t at_once(int index, Kernel kernel, int threads, int cluster = 1, int room = 0) {
    return at_once(index, device_of(index), reinterpret_cast<const void*>(kernel), threads, cluster, room);
}

}  // namespace fdu::cuda
