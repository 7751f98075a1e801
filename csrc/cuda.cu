// Launches of the Gaussian kernels: which, how many blocks, and what they get; and the tickets of all launches.

#include <mutex>
#include <utility>
#include <vector>

#include "cuda_gaussian.cuh"
#include "cuda_launch.h"

namespace fdu::cuda {

FDU_TICKET_MEMORY

namespace {

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

// Of those that hold `elements` or more a thread, the first.
template <class T, bool masked, int most = held<T>.fewest>
GaussianKernel on_chip_kernel(int elements) {
    if constexpr (most < held<T>.most) {
        if (most < elements) return on_chip_kernel<T, masked, 2 * most>(elements);
    }
    return gaussian_on_chip<T, masked, most>;
}

// One block a part of a sample, or a warp a sample; what is launched beside the grid is the same for all kernels.
void launch_blocks(GaussianKernel kernel, GaussianTask& task, int cluster, const Device& device, void* stream) {
    const int64_t samples = task.warps == 1 ? samples_of_block(task.batch, device.multiprocessors) : 1;
    const int64_t blocks = divide_up(task.batch, samples) * task.parts;
    task.finishers = unsigned(task.parts > 1 ? task.batch : blocks);
    launch(kernel, blocks, int(samples) * task.warps * warp_size, cluster, stream, task);
}

// One launch for losses and gradients, where a sample fits on chip; else false, and nothing is launched.
template <class T>
bool launch_on_chip(GaussianTask& task, bool with_clusters, int index, void* stream) {
    constexpr int n = T::lanes;
    const Device& device = device_of(index);
    const bool masked = task.mask.data;
    const bool whole = !std::is_same_v<T, Mixed> && !masked && task.size % n == 0 && shift_of(task.pred, n) == 0 &&
                       task.pred.batch_stride % n == 0;
    const OnChip place = on_chip(task.size, task.batch, n, held<T>, device.multiprocessors, with_clusters, whole);
    if (!place.elements) return false;
    task.warps = place.warps;
    task.parts = place.parts;
    if constexpr (!std::is_same_v<T, Mixed>) {
        const auto launch_clusters = [&](GaussianKernel kernel, int room, bool in_turns) {
            const int64_t most = at_once(index, kernel, chip_threads, place.parts, room);
            if (most == 0) return false;
            task.warps = chip_threads / warp_size;
            task.finishers = unsigned(in_turns ? std::min(most, task.batch) : task.batch);
            launch(kernel, task.finishers * int64_t(place.parts), chip_threads, place.parts, stream, task, room);
            return true;
        };
        if (place.elements > held<T>.most) {
            return launch_clusters(gaussian_in_clusters<T, false>, cluster_room<T, false>, false);
        }
        // Also of few samples: what is fetched needs no registers while it is under way.
        if (place.elements == held<T>.most && whole && with_clusters &&
            launch_clusters(gaussian_in_clusters<T, true>, cluster_room<T, true>, true)) {
            return true;
        }
    }
    const GaussianKernel kernel = masked ? on_chip_kernel<T, true>(place.elements) : on_chip_kernel<T, false>(place.elements);
    task.warps = place.warps;
    // A share of a device (MIG, MPS) may have no room for a cluster.
    if (place.parts > 1 && !at_once(index, kernel, chip_threads, place.parts)) return false;
    launch_blocks(kernel, task, place.parts, device, stream);
    return true;
}

void launch_walk(bool gradient, GaussianTask& task, Access access, int index, void* stream) {
    const GaussianKernel kernel = walking_kernel(gradient, task, access);
    const int64_t resident = at_once(index, kernel, stream_threads);
    const Walk shared = walk(task.size, task.batch, elements_of(access, task.pred.type), resident);
    task.warps = shared.warps;
    task.parts = shared.parts;
    launch_blocks(kernel, task, 1, device_of(index), stream);
}

}  // namespace

const Device& device_of(int index) {
    const GaussianKernel kernel = gaussian_on_chip<Float, false, 8>;
    return known_device(index, reinterpret_cast<const void*>(kernel), ticket_memory);
}

// The launches of one stream run one after the other and share its tickets. A graph may be replayed beside other work of
// the stream that captured it, so it has tickets of its own, in its workspace.
unsigned* tickets_for(const Context& context, int index, const Workspace& workspace, int64_t used) {
    const int place = is_capturing(context.stream) ? -1 : place_of_stream(index, context.stream);
    if (place >= 0) return device_of(index).tickets + place * ticket_count;
    fill_with_zeros(workspace.tickets, 4 * size_t(used), context.stream);
    return workspace.tickets;
}

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
    task.distance = of.distance ? reinterpret_cast<double*>(data_of(*of.distance)) : nullptr;
    task.coefficient = of.coefficient ? reinterpret_cast<float*>(data_of(*of.coefficient)) : nullptr;
    task.partials = workspace.partials;
    task.losses = workspace.losses;

    task.tickets = tickets_for(context, index, workspace, ticket_count);
    if (of.grad) {
        bool launched = false;
        with_type(task.pred.type, access, [&](auto element) {
            using T = decltype(element);
            launched = launch_on_chip<T>(task, device.clusters, index, context.stream) ||
                       (device.clusters && launch_on_chip<T>(task, false, index, context.stream));
        });
        if (launched) return true;
    }
    task.scaled_coefficient = of.grad ? workspace.coefficients : nullptr;
    launch_walk(false, task, access, index, context.stream);
    if (!of.grad) return true;
    task.coefficient_in = workspace.coefficients;
    task.coefficient_in_stride = 1;
    launch_walk(true, task, access, index, context.stream);
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
    launch_walk(true, task, access, index, context.stream);
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
