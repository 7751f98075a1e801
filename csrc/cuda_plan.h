// How a tensor is walked over and shared out among threads and blocks: plain arithmetic on the host.

#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <stdexcept>

#include "cuda_work.h"

namespace fdu::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Type type_of(const DLTensor& tensor) {
    const int code = tensor.dtype.code, bits = tensor.dtype.bits;
    if (code == kDLFloat && bits == 16) return Type::float16;
    if (code == kDLBfloat && bits == 16) return Type::bfloat16;
    if (code == kDLFloat && bits == 32) return Type::float32;
    if (code == kDLFloat && bits == 64) return Type::float64;
    if (code == kDLBool && bits == 8) return Type::boolean;
    throw std::invalid_argument("fdu_kernels: a dtype that the CUDA kernels do not have");
}

inline int64_t size_of(Type type) {
    switch (type) {
        case Type::float32: return 4;
        case Type::float64: return 8;
        case Type::boolean: return 1;
        default: return 2;
    }
}

inline char* data_of(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

inline int64_t elements_from(const DLTensor& tensor, int dimension) {
    int64_t count = 1;
    for (int d = dimension; d < tensor.ndim; ++d) count *= tensor.shape[d];
    return count;
}

inline Numbers numbers_of(const DLTensor* tensor, double otherwise) {
    Numbers numbers;
    numbers.otherwise = otherwise;
    if (!tensor) return numbers;
    numbers.data = data_of(*tensor);
    numbers.type = type_of(*tensor);
    numbers.stride = tensor->ndim && tensor->shape[0] > 1 ? tensor->strides[0] : 0;
    return numbers;
}

// A tensor that broadcasts to the shape of another, and its place in a task.
struct Placed {
    const DLTensor* tensor;
    Operand* operand;
    std::array<int64_t, max_dims> strides;
};

// Strides over all dimensions of `like`, the outermost first.
inline void place(Placed& placed, const DLTensor& like) {
    const DLTensor& tensor = *placed.tensor;
    const int missing = like.ndim - tensor.ndim;
    for (int d = 0; d < like.ndim; ++d) {
        placed.strides[d] = d < missing || tensor.shape[d - missing] == 1 ? 0 : tensor.strides[d - missing];
    }
    placed.operand->data = data_of(tensor);
    placed.operand->type = type_of(tensor);
    placed.operand->batch_stride = placed.strides[0];
}

// Orders the dimensions from `from` on by the strides of the first tensor, merges those that lie one after the other in
// every one, and fills in the space and the operands' strides.
inline void collapse(const DLTensor& like, int from, Placed* placed, int count, Space& space) {
    int order[max_dims], kept = 0;
    for (int d = like.ndim - 1; d >= from; --d) {
        if (like.shape[d] == 1) continue;
        int at = kept++;
        for (; at > 0 && placed[0].strides[order[at - 1]] > placed[0].strides[d]; --at) order[at] = order[at - 1];
        order[at] = d;
    }
    space.dims = 0;
    for (int i = 0; i < kept; ++i) {
        const int d = order[i], last = space.dims - 1;
        bool merges = last >= 0;
        for (int j = 0; j < count && merges; ++j) {
            merges = placed[j].strides[d] == placed[j].operand->strides[last] * space.sizes[last];
        }
        if (merges) {
            space.sizes[last] *= like.shape[d];
            continue;
        }
        if (space.dims == walk_dims) throw std::invalid_argument("fdu_kernels: too many dimensions for the CUDA kernels");
        space.sizes[space.dims] = like.shape[d];
        for (int j = 0; j < count; ++j) placed[j].operand->strides[space.dims] = placed[j].strides[d];
        ++space.dims;
    }
    if (space.dims == 0) {
        space.dims = 1;
        space.sizes[0] = 1;
        for (int j = 0; j < count; ++j) placed[j].operand->strides[0] = 1;
    }
    for (int d = 0; d < space.dims; ++d) space.divisors[d] = divisor_of(uint64_t(std::max<int64_t>(space.sizes[d], 1)));
}

inline bool are_linear(const Placed* placed, int count, const Space& space) {
    for (int j = 0; j < count; ++j) {
        if (placed[j].operand->strides[0] != 1 && space.sizes[0] != 1) return false;
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
    Placed placed[4];
    int count = 0;
    // The gradient leads: what is written should be written in its order.
    const std::initializer_list<std::pair<const DLTensor*, Operand*>> operands = {
        {of.grad, &task.grad}, {of.pred, &task.pred}, {of.target, &task.target}, {of.mask, &task.mask}};
    for (const auto& [tensor, operand] : operands) {
        if (!tensor) continue;
        placed[count].tensor = tensor;
        placed[count].operand = operand;
        place(placed[count++], *of.pred);
    }
    const DLTensor& pred = *of.pred;
    const int data = count - (of.mask ? 1 : 0), vector = int(16 / size_of(task.pred.type));
    task.batch = pred.shape[0];
    task.size = elements_from(pred, 1);
    collapse(pred, 1, placed, data, task.space);
    bool vectors = are_linear(placed, data, task.space), shifted = false;
    const int64_t shift = shift_of(task.pred, vector);
    const bool batched = task.batch > 1;
    for (int j = 0; j < data && vectors; ++j) {
        const Operand& operand = *placed[j].operand;
        const int64_t apart = operand.batch_stride - task.pred.batch_stride;
        vectors = shift_of(operand, vector) == shift && (!batched || apart % vector == 0);
        shifted |= shift != 0 || (batched && operand.batch_stride % vector != 0);
    }
    if (!of.mask) return vectors;
    collapse(pred, 1, placed, count, task.space);
    return vectors && !shifted && is_packed(task.mask, task.space, batched);
}

inline bool plan(const Expectation& of, ElementTask& task) {
    const DLTensor& v = *of.v;
    // A weight [B] is a mask [B, 1, ...].
    int64_t shape[max_dims], strides[max_dims];
    DLTensor weight;
    const DLTensor* factor = of.mask;
    if (of.weight) {
        for (int d = 0; d < v.ndim; ++d) {
            shape[d] = d ? 1 : v.shape[0];
            strides[d] = d ? 0 : of.weight->strides[0];
        }
        weight = *of.weight;
        weight.ndim = v.ndim;
        weight.shape = shape;
        weight.strides = strides;
        factor = &weight;
    }
    Placed placed[5];
    int count = 0, data = 0;
    const DLTensor* terms = of.reduction == Reduction::none ? of.value : nullptr;
    const std::initializer_list<std::pair<const DLTensor*, Operand*>> operands = {
        {of.grad, &task.grad}, {of.v, &task.v}, {terms, &task.terms}, {factor, &task.factor}, {of.upstream, &task.upstream}};
    for (const auto& [tensor, operand] : operands) {
        if (!tensor) continue;
        placed[count].tensor = tensor;
        placed[count].operand = operand;
        place(placed[count++], v);
        if (tensor == of.grad || tensor == of.v || tensor == terms) data = count;
    }
    task.size = elements_from(v, 0);
    collapse(v, 0, placed, data, task.space);
    bool vectors = are_linear(placed, data, task.space);
    for (int j = 0; j < data && vectors; ++j) vectors = reinterpret_cast<uintptr_t>(placed[j].operand->data) % 16 == 0;
    if (count > data) collapse(v, 0, placed, count, task.space);
    for (int j = data; j < count; ++j) placed[j].operand->packed = is_packed(*placed[j].operand, task.space, false);
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
