// Launches of the CUDA kernels: which, how many blocks, and what they get.

#include "cuda.h"

#include <mutex>
#include <utility>
#include <vector>

#include "cuda_expectation.cuh"
#include "cuda_gaussian.cuh"
#include "cuda_plan.h"

namespace fdu::cuda {
namespace {

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

// The place of a stream of a device in its ticket memory; -1 where others have them all.
int place_of_stream(int device, void* stream) {
    static std::mutex mutex;
    static std::vector<std::pair<int, void*>> known;
    const std::lock_guard<std::mutex> locked(mutex);
    int place = 0;
    for (const auto& [on, one] : known) {
        if (on != device) continue;
        if (one == stream) return place;
        ++place;
    }
    if (place == ticket_streams) return -1;
    known.emplace_back(device, stream);
    return place;
}

// The launches of one stream run one after the other and share its tickets. A graph may be replayed beside other work of
// the stream that captured it, so it has tickets of its own, in its workspace.
unsigned* tickets_for(const Context& context, int index, const Device& device, const Workspace& workspace, int64_t used) {
    const int place = is_capturing(context.stream) ? -1 : place_of_stream(index, context.stream);
    if (place >= 0) return device.tickets + place * ticket_count;
    fill_with_zeros(workspace.tickets, 4 * size_t(used), context.stream);
    return workspace.tickets;
}

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

const Device& device_of(int index) {
    return known_device(index, reinterpret_cast<const void*>(static_cast<GaussianKernel>(gaussian_on_chip<Float, false, 8>)));
}

// Of those that hold `elements` or more a thread, the first.
template <class T, bool masked, int most = held<T>.fewest>
GaussianKernel on_chip_kernel(int elements) {
    if constexpr (most < held<T>.most) {
        if (most < elements) return on_chip_kernel<T, masked, 2 * most>(elements);
    }
    return gaussian_on_chip<T, masked, most>;
}

enum class Kind { on_chip, sums, gradient };

GaussianKernel choose(Kind kind, const GaussianTask& task, Access access, int elements = 0) {
    GaussianKernel chosen = nullptr;
    with_type(task.pred.type, access, [&](auto element) {
        using T = decltype(element);
        const auto pick = [&](auto masked) {
            switch (kind) {
                case Kind::on_chip: return on_chip_kernel<T, masked.value>(elements);
                case Kind::sums: return GaussianKernel(gaussian_sums<T, masked.value>);
                default: return GaussianKernel(gaussian_gradient<T, masked.value>);
            }
        };
        chosen = task.mask.data ? pick(std::true_type{}) : pick(std::false_type{});
    });
    return chosen;
}

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

// One block a part of a sample, or a warp a sample; what is launched beside the grid is the same for all kernels.
void launch_blocks(GaussianKernel kernel, GaussianTask& task, int cluster, const Device& device, void* stream) {
    const int64_t samples = task.warps == 1 ? samples_of_block(task.batch, device.multiprocessors) : 1;
    const int64_t blocks = divide_up(task.batch, samples) * task.parts;
    task.finishers = unsigned(task.parts > 1 ? task.batch : blocks);
    launch(kernel, blocks, int(samples) * task.warps * warp_size, cluster, stream, task);
}

template <class Kernel>
int64_t resident_blocks(int index, Kernel kernel) {
    return resident_blocks(index, device_of(index), reinterpret_cast<const void*>(kernel), stream_threads);
}

void launch_walk(Kind kind, GaussianTask& task, Access access, int index, void* stream) {
    const GaussianKernel kernel = choose(kind, task, access);
    const Walk shared = walk(task.size, task.batch, elements_of(access, task.pred.type), resident_blocks(index, kernel));
    task.warps = shared.warps;
    task.parts = shared.parts;
    launch_blocks(kernel, task, 1, device_of(index), stream);
}

}  // namespace

const int64_t workspace_bytes = ticket_bytes + most_partials * int64_t(sizeof(Sums));
const int64_t workspace_bytes_per_sample = sizeof(double) + sizeof(float);

bool gaussian(const GaussianCall& call, const Context& context) {
    const Gaussian& of = call.of;
    const int index = of.pred->device.device_id;
    follow(index);
    const Device& device = device_of(index);
    GaussianTask task{};
    const Access access = plan(of, task);
    if (access == Access::none) return false;
    const Workspace workspace(*context.workspace, task.batch);
    task.profile = of.profile;
    task.sigma = numbers_of(of.sigma_tensor, of.sigma);
    task.weight = numbers_of(of.weight, 1.0);
    task.divisor = of.mean_distance ? double(std::max<int64_t>(task.size, 1)) : 1.0;
    task.count = of.mean_distance && of.mask;
    task.scale_tensor = numbers_of(call.scale_tensor, 1.0);
    task.scale = of.grad_scale / (of.reduction == Reduction::mean ? double(task.batch) : 1.0);
    task.reduction = of.reduction;
    task.value = reinterpret_cast<float*>(data_of(*of.value));
    task.coefficient = of.coefficient ? reinterpret_cast<float*>(data_of(*of.coefficient)) : nullptr;
    task.partials = workspace.partials;
    task.losses = workspace.losses;

    OnChip place{};
    GaussianKernel kernel = nullptr;
    const auto hold = [&](bool clusters) {
        with_type(task.pred.type, access, [&](auto element) {
            using T = decltype(element);
            place = on_chip(task.size, task.batch, T::lanes, held<T>, device.multiprocessors, clusters);
        });
        if (place.elements) kernel = choose(Kind::on_chip, task, access, place.elements);
    };
    if (of.grad) hold(device.clusters);
    if (place.parts > 1 && !takes_clusters(index, reinterpret_cast<const void*>(kernel), chip_threads, place.parts)) hold(false);
    task.tickets = tickets_for(context, index, device, workspace, place.elements ? 1 : ticket_count);
    if (place.elements) {
        task.warps = place.warps;
        task.parts = place.parts;
        launch_blocks(kernel, task, place.parts, device, context.stream);
        return true;
    }
    task.scaled_coefficient = of.grad ? workspace.coefficients : nullptr;
    launch_walk(Kind::sums, task, access, index, context.stream);
    if (!of.grad) return true;
    task.coefficient_in = workspace.coefficients;
    task.coefficient_in_stride = 1;
    launch_walk(Kind::gradient, task, access, index, context.stream);
    return true;
}

bool gaussian_backward(
    const DLTensor& pred, const DLTensor& target, const DLTensor* mask, const DLTensor& coefficient, const DLTensor& grad,
    const Context& context) {
    const int index = pred.device.device_id;
    follow(index);
    Gaussian of{};
    of.pred = &pred;
    of.target = &target;
    of.mask = mask;
    of.grad = &grad;
    GaussianTask task{};
    const Access access = plan(of, task);
    if (access == Access::none) return false;
    const Numbers coefficients = numbers_of(&coefficient, 0.0);
    task.coefficient_in = reinterpret_cast<const float*>(coefficients.data);
    task.coefficient_in_stride = coefficients.stride;
    launch_walk(Kind::gradient, task, access, index, context.stream);
    return true;
}

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
    if (task.sums) task.tickets = tickets_for(context, index, device_of(index), workspace, 1);

    const ElementKernel kernel = choose(known_of(task.function), task.v.type, of.grad);
    // Even of no elements the sum is written.
    const int64_t steps = std::max<int64_t>(divide_up(task.size, int64_t(8) * stream_threads), 1);
    const int64_t blocks = std::min(steps, wave(resident_blocks(index, kernel)));
    launch(kernel, blocks, stream_threads, 1, context.stream, task);
    return true;
}

std::string why_unusable(int device) {
    try {
        follow(device);
        device_of(device);
    } catch (const std::exception& error) {
        return error.what();
    }
    return "";
}

}  // namespace fdu::cuda
