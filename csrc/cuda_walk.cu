// The Gaussian kernels that walk over samples: a translation unit of its own, compiled beside the others.

#include "cuda_gaussian.cuh"
#include "cuda_launch.h"

namespace fdu::cuda {

GaussianKernel walking_kernel(bool gradient, const GaussianTask& task, Access access) {
    GaussianKernel chosen = nullptr;
    with_type(task.pred.type, access, [&](auto element) {
        using T = decltype(element);
        if (gradient) {
            chosen = task.mask.data ? gaussian_gradient<T, true> : gaussian_gradient<T, false>;
        } else {
            chosen = task.mask.data ? gaussian_sums<T, true> : gaussian_sums<T, false>;
        }
    });
    return chosen;
}

}  // namespace fdu::cuda
