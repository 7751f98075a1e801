// How a tensor is walked over and shared out among threads and blocks: plain arithmetic on the host.

#pragma once

#include <algorithm>
#include <optional>

#include "cuda_work.h"

namespace fdu::cuda {

using Placement = fdu::Placement<Operand>;

inline void collapse(const Placement& placement, int from, int used, Space& space) {
    placement.collapse(from, used, space);
    for (int d = 0; d < space.dims; ++d) space.divisors[d] = divisor_of(uint64_t(std::max<int64_t>(space.sizes[d], 1)));
}

inline bool are_linear(const Placement& placement, int count, const Space& space) {
    for (int j = 0; j < count; ++j) {
        if (placement.operands[j]->strides[0] != 1 && space.sizes[0] != 1) return false;
    }
    return space.dims == 1;
}

// Elements by which the beginning of an operand misses a multiple of 16 bytes.
inline int64_t shift_of(const Operand& operand, int vector) {
    return int64_t(reinterpret_cast<uintptr_t>(operand.data) / uintptr_t(16 / vector) % uintptr_t(vector));
}

// Whether groups of elements of `space` are side by side in an operand, or one and the same.
inline bool is_packed(const Operand& operand, const Space& space, bool batched) {
    if (space.dims > 1 && space.sizes[0] % factor_group) return false;
    if (operand.strides[0] == 0) return true;
    if (operand.strides[0] != 1 || operand.type == Type::float64) return false;
    if (reinterpret_cast<uintptr_t>(operand.data) % uintptr_t(factor_group * size_of(operand.type))) return false;
    for (int d = 1; d < space.dims; ++d) {
        if (operand.strides[d] % factor_group) return false;
    }
    return !batched || operand.batch_stride % factor_group == 0;
}

// Fills in the space and operands; true if pred, target and grad can be read as vectors.
inline bool plan(const Gaussian& of, GaussianTask& task) {
    const DLTensor& pred = *of.pred;
    Placement placement(pred);
    // The gradient leads: what is written should be written in its order.
    placement.add(of.grad, task.grad);
    placement.add(of.pred, task.pred);
    placement.add(of.target, task.target);
    const int data = placement.count, vector = int(16 / size_of(task.pred.type));
    placement.add(of.mask, task.mask);
    task.batch = pred.shape[0];
    task.size = elements_from(pred, 1);
    collapse(placement, 1, data, task.space);
    bool vectors = are_linear(placement, data, task.space), shifted = false;
    const int64_t shift = shift_of(task.pred, vector);
    const bool batched = task.batch > 1;
    for (int j = 0; j < data && vectors; ++j) {
        const Operand& operand = *placement.operands[j];
        const int64_t apart = operand.batch_stride - task.pred.batch_stride;
        vectors = shift_of(operand, vector) == shift && (!batched || apart % vector == 0);
        shifted |= shift != 0 || (batched && operand.batch_stride % vector != 0);
    }
    if (!of.mask) return vectors;
    collapse(placement, 1, placement.count, task.space);
    return vectors && !shifted && is_packed(task.mask, task.space, batched);
}

inline bool plan(const Expectation& of, ElementTask& task) {
    const DLTensor& v = *of.v;
    const std::optional<WeightAsMask> weight = of.weight ? std::make_optional<WeightAsMask>(*of.weight, v) : std::nullopt;
    Placement placement(v);
    placement.add(of.grad, task.grad);
    placement.add(of.v, task.v);
    placement.add(of.reduction == Reduction::none ? of.value : nullptr, task.terms);
    const int data = placement.count;
    placement.add(weight ? weight->get() : of.mask, task.factor);
    placement.add(of.upstream, task.upstream);
    task.size = elements_from(v, 0);
    collapse(placement, 0, data, task.space);
    bool vectors = are_linear(placement, data, task.space);
    for (int j = 0; j < data && vectors; ++j) vectors = reinterpret_cast<uintptr_t>(placement.operands[j]->data) % 16 == 0;
    if (placement.count > data) collapse(placement, 0, placement.count, task.space);
    for (int j = data; j < placement.count; ++j) {
        placement.operands[j]->packed = is_packed(*placement.operands[j], task.space, false);
    }
    return vectors;
}

// Blocks of a launch in which many blocks share the work: one wave, and no more than there are places for partial sums.
inline int64_t wave(int multiprocessors) { return std::min<int64_t>(4 * int64_t(multiprocessors), most_parts); }

// How a sample is held on chip.
struct OnChip {
    int elements;  // a thread
    int warps;     // that share a sample in a block
    int parts;     // blocks that share a sample, as a cluster
};

constexpr int most_cluster = 8, small_part = 2048;

// elements is 0 where it does not fit. `elements_most`: what a thread can hold.
inline OnChip on_chip(int64_t size, int64_t batch, int64_t vector, int elements_most, int multiprocessors, bool clusters) {
    const int64_t warp_most = std::min<int64_t>(elements_most, 16) * warp_size;
    if (size <= warp_most) return {size <= 8 * warp_size ? 8 : 16, 1, 1};
    const int64_t block_most = int64_t(elements_most) * chip_threads;
    int parts = 1;
    while (size > parts * block_most) {
        if (!clusters || parts == most_cluster) return {0, 0, 0};
        parts *= 2;
    }
    // Where a batch would leave multiprocessors idle, more of them share a sample.
    while (clusters && parts < most_cluster && 2 * batch * parts <= multiprocessors && size > int64_t(parts) * small_part) {
        parts *= 2;
    }
    const int64_t part = divide_up(size, parts);
    int elements = 8;
    while (elements < elements_most && part > elements * chip_threads / 2) elements *= 2;
    const int64_t threads = divide_up(divide_up(size, vector), int64_t(parts) * (elements / vector));
    // A single warp would be taken for one that has a sample of its own.
    return {elements, int(std::max<int64_t>(divide_up(threads, warp_size), 2)), parts};
}

// How many warps of a block share a sample that is walked over, and how many blocks.
struct Walk {
    int warps, parts;
};

inline Walk walk(int64_t size, int64_t batch, int64_t vector, int multiprocessors) {
    if (size <= 1024) return {1, 1};
    const int64_t steps = divide_up(divide_up(size, vector), int64_t(stream_rounds) * stream_threads);
    const int64_t most = std::max<int64_t>(divide_up(wave(multiprocessors), std::max<int64_t>(batch, 1)), 1);
    return {stream_threads / warp_size, int(std::max<int64_t>(std::min(steps, batch >= most_parts ? 1 : most), 1))};
}

// Samples that share a block, each with a warp: few where there are few, so that more multiprocessors have work.
inline int64_t samples_of_block(int64_t batch, int multiprocessors) {
    return batch >= 32 * int64_t(multiprocessors) ? 8 : batch >= 8 * int64_t(multiprocessors) ? 4 : 2;
}

}  // namespace fdu::cuda
