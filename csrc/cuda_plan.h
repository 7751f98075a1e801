// How a tensor is walked over and shared out among threads and blocks: plain arithmetic on the host.

#pragma once

#include <algorithm>

#include "cuda_work.h"

namespace fdu::cuda {

using Placement = fdu::Placement<Operand>;

inline bool collapse(const Placement& placement, int from, int used, Space& space) {
    if (!placement.collapse(from, used, space)) return false;
    for (int d = 0; d < space.dims; ++d) space.divisors[d] = divisor_of(uint64_t(std::max<int64_t>(space.sizes[d], 1)));
    return true;
}

// Whether the first `count` operands have their elements one after the other, in one order.
inline bool are_linear(const Placement& placement, int from, int count, Space& space) {
    if (!collapse(placement, from, count, space) || space.dims != 1) return false;
    return std::all_of(placement.operands, placement.operands + count,
                       [&](const Operand* operand) { return operand->strides[0] == 1 || space.sizes[0] == 1; });
}

// Elements by which the beginning of an operand misses an address of a multiple of n.
inline int64_t shift_of(const Operand& operand, int64_t n) {
    return int64_t(reinterpret_cast<uintptr_t>(operand.data) / uintptr_t(size_of(operand.type)) % uintptr_t(n));
}

// Whether two operands miss multiples of n elements by the same number in every sample.
inline bool in_step(const Operand& one, const Operand& other, int64_t n, bool batched) {
    return shift_of(one, n) == shift_of(other, n) && (!batched || (one.batch_stride - other.batch_stride) % n == 0);
}

// Whether groups of elements of `space`, counted from its first, are side by side in an operand, or one and the same.
inline bool is_packed(const Operand& operand, const Space& space, bool batched) {
    if (space.dims > 1 && space.sizes[0] % factor_group) return false;
    if (operand.strides[0] == 0) return true;
    if (operand.strides[0] != 1 || shift_of(operand, factor_group)) return false;
    for (int d = 1; d < space.dims; ++d) {
        if (operand.strides[d] % factor_group) return false;
    }
    return !batched || operand.batch_stride % factor_group == 0;
}

// How pred, target and grad are read and written: as vectors of 16 bytes of one dtype, in groups of factor_group elements
// each of its own dtype, or not at all, as they lie.
enum class Access { none, vectors, groups };

// Elements at once.
inline int64_t elements_of(Access access, Type type) {
    return access == Access::vectors ? 16 / size_of(type) : factor_group;
}

// Fills in the space and operands.
inline Access plan(const Gaussian& of, GaussianTask& task) {
    const DLTensor& pred = *of.pred;
    Placement placement(pred);
    // The gradient leads: what is written should be written in its order.
    placement.add(of.grad, task.grad);
    placement.add(of.pred, task.pred);
    placement.add(of.target, task.target);
    const int data = placement.count;
    placement.add(of.mask, task.mask);
    task.batch = pred.shape[0];
    task.size = elements_from(pred, 1);
    bool alike = true;
    for (int j = 0; j < data; ++j) {
        const Type type = placement.operands[j]->type;
        if (type == Type::float64) throw std::invalid_argument("fdu_kernels: the CUDA kernels take no float64");
        alike &= type == task.pred.type;
    }
    if (task.size == 0) return Access::groups;
    if (!are_linear(placement, 1, data, task.space)) return Access::none;
    if (of.mask && task.mask.type == Type::float64) return Access::none;
    if (of.mask && !collapse(placement, 1, placement.count, task.space)) return Access::none;

    const bool batched = task.batch > 1;
    const auto fits = [&](int64_t n) {
        for (int j = 0; j < data; ++j) {
            if (!in_step(*placement.operands[j], task.pred, n, batched)) return false;
        }
        if (!of.mask) return true;
        // Groups of the mask begin where vectors do, which in samples that begin elsewhere only one in their order can.
        if (task.space.dims == 1 && task.mask.strides[0] == 1) return in_step(task.mask, task.pred, factor_group, batched);
        const bool shifted = shift_of(task.pred, n) || (batched && task.pred.batch_stride % n);
        return is_packed(task.mask, task.space, batched) && (!shifted || task.mask.strides[0] == 0);
    };
    if (alike && fits(16 / size_of(task.pred.type))) return Access::vectors;
    return fits(factor_group) ? Access::groups : Access::none;
}

// True if the operands fit; v, grad and terms are read and written 16 bytes at a time, the others in groups.
inline bool plan(const Expectation& of, ElementTask& task) {
    const DLTensor& v = *of.v;
    Placement placement(v);
    placement.add(of.grad, task.grad);
    placement.add(of.v, task.v);
    placement.add(of.reduction == Reduction::none ? of.value : nullptr, task.terms);
    const int data = placement.count;
    placement.add(of.mask, task.factor);
    placement.add(of.upstream, task.upstream);
    task.size = elements_from(v, 0);
    if (task.size == 0) return true;
    if (!are_linear(placement, 0, data, task.space)) return false;
    for (int j = 0; j < data; ++j) {
        if (reinterpret_cast<uintptr_t>(placement.operands[j]->data) % 16) return false;
    }
    if (placement.count > data && !collapse(placement, 0, placement.count, task.space)) return false;
    for (int j = data; j < placement.count; ++j) {
        const Operand& operand = *placement.operands[j];
        if (operand.type == Type::float64 || !is_packed(operand, task.space, false)) return false;
    }
    return true;
}

// Blocks of a launch in which many blocks share the work: as many as the device has under way at once, and no more than
// there are places for partial sums.
inline int64_t wave(int64_t resident) { return std::clamp<int64_t>(resident, 1, most_parts); }

// How a sample is held on chip.
struct OnChip {
    int elements;  // a thread
    int warps;     // that share a sample in a block
    int parts;     // blocks that share a sample, as a cluster
};

// A cluster of more than 8 blocks finds room on some devices only; they may make use of it for the largest samples.
constexpr int most_cluster = 8, largest_cluster = 16, small_part = 2048;

// elements is 0 where it does not fit. whole: of whole vectors without a mask, of which clusters may hold twice as much.
inline OnChip on_chip(
    int64_t size, int64_t batch, int64_t vector, Held held, int multiprocessors, bool clusters, bool whole) {
    if (size <= held.warp * warp_size) return {size <= held.fewest * warp_size ? held.fewest : held.warp, 1, 1};
    const int64_t block_most = int64_t(held.most) * chip_threads;
    int parts = 1;
    while (size > parts * block_most && parts < most_cluster && clusters) parts *= 2;
    if (size > parts * block_most) {
        const int blocks = size > 2 * block_most * most_cluster ? largest_cluster : most_cluster;
        if (!clusters || !whole || size > 2 * block_most * blocks) return {0, 0, 0};
        return {2 * held.most, chip_threads / warp_size, blocks};
    }
    // Where a batch would leave multiprocessors idle, more of them share a sample.
    while (clusters && parts < most_cluster && 2 * batch * parts <= multiprocessors && size > int64_t(parts) * small_part) {
        parts *= 2;
    }
    const int64_t part = divide_up(size, parts);
    int elements = held.fewest;
    while (elements < held.most && part > elements * chip_threads / 2) elements *= 2;
    const int64_t threads = divide_up(divide_up(size, vector), int64_t(parts) * (elements / vector));
    // A single warp would be taken for one that has a sample of its own.
    return {elements, int(std::max<int64_t>(divide_up(threads, warp_size), 2)), parts};
}

// How many warps of a block share a sample that is walked over, and how many blocks.
struct Walk {
    int warps, parts;
};

inline Walk walk(int64_t size, int64_t batch, int64_t vector, int64_t resident) {
    if (size <= 1024) return {1, 1};
    const int64_t steps = divide_up(divide_up(size, vector), int64_t(stream_rounds) * stream_threads);
    const int64_t most = std::max<int64_t>(divide_up(wave(resident), std::max<int64_t>(batch, 1)), 1);
    return {stream_threads / warp_size, int(std::max<int64_t>(std::min(steps, batch >= most_parts ? 1 : most), 1))};
}

// Samples that share a block, each with a warp: few where there are few, so that more multiprocessors have work.
inline int64_t samples_of_block(int64_t batch, int multiprocessors) {
    return batch >= 32 * int64_t(multiprocessors) ? 8 : batch >= 8 * int64_t(multiprocessors) ? 4 : 2;
}

}  // namespace fdu::cuda
