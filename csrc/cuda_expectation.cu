// The launch of an expectation's kernel.

#include "cuda_expectation.cuh"
#include "cuda_launch.h"

namespace fdu::cuda {
namespace {

using ElementKernel = void (*)(ElementTask);

template <Known known, class T = Mixed>
ElementKernel kernel_of(bool sloped) {
    return sloped ? expectation_kernel<known, true, T> : expectation_kernel<known, false, T>;
}

template <Known known>
ElementKernel kernel_of(Type type, bool sloped) {
    switch (type) {
        case Type::float16: return kernel_of<known, Half>(sloped);
        case Type::bfloat16: return kernel_of<known, BFloat16>(sloped);
        default: return kernel_of<known, Float>(sloped);
    }
}

// One of the function's kind; of the kinds that most variational bounds have, for each dtype.
ElementKernel choose(Known known, Type type, bool sloped) {
    switch (known) {
        case Known::softplus_alone: return kernel_of<Known::softplus_alone>(type, sloped);
        case Known::exponentials: return kernel_of<Known::exponentials>(type, sloped);
        case Known::softplus_pair: return kernel_of<Known::softplus_pair>(sloped);
        case Known::exponential_pair: return kernel_of<Known::exponential_pair>(sloped);
        default: return kernel_of<Known::nothing>(sloped);
    }
}

}  // namespace

bool expectation(const ExpectationCall& call, const Context& context) {
    const Expectation& of = call.of;
    const int index = of.v->device.device_id;
    follow(index);
    ElementTask task{};
    if (!plan(of, task)) return false;
    const Workspace workspace(*context.workspace, 0);
    task.function = read_element_function<float>(of.numbers);
    task.divisor = of.reduction == Reduction::mean ? double(task.size) : 1.0;
    if (call.mask_total) {
        task.mask_total = numbers_of(call.mask_total, 1.0);
        const int64_t own = elements_from(*of.mask, 0);
        task.repeats = double(task.size) / double(std::max<int64_t>(own, 1));
    }
    task.scale = of.scale;
    task.scale_tensor = numbers_of(call.scale_tensor, 1.0);
    task.sums = of.value && of.reduction != Reduction::none;
    task.value = task.sums ? reinterpret_cast<float*>(data_of(*of.value)) : nullptr;
    task.partials = reinterpret_cast<double*>(workspace.partials);
    if (task.sums) task.tickets = tickets_for(context, index, workspace, 1);

    const ElementKernel kernel = choose(known_of(task.function), task.v.type, of.grad);
    // Even of no elements the sum is written.
    const int64_t steps = std::max<int64_t>(divide_up(task.size, int64_t(8) * element_threads), 1);
    const int64_t blocks = std::min(steps, wave(at_once(index, kernel, element_threads)));
    launch(kernel, blocks, element_threads, 1, context.stream, task);
    return true;
}

}  // namespace fdu::cuda
