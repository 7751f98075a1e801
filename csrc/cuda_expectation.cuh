// The expectation kernel: a function of the density-ratio estimate over all elements, its sum and its gradient.

#pragma once

#include "cuda_sums.cuh"

namespace fdu::cuda {

// Elements that a thread evaluates at once. Evaluation is most of the code, so dtypes are told apart at run time.
constexpr int element_batch = 8;

// The batch from a position on, `left` of it before the end.
FDU_DEVICE void load_batch(const Operand& operand, int64_t position, int64_t left, float (&x)[element_batch]) {
    Words<4> vectors[2];
    if (left < element_batch) {
#pragma unroll
        for (int i = 0; i < element_batch; ++i) x[i] = i < left ? load_one(operand.data, operand.type, position + i) : 0.0f;
    } else if (operand.type == Type::float32) {
        load_vectors<4, 2>(operand.data, Type::float32, [&](int i) { return position + 4 * i; }, vectors);
        unpack<4>(vectors[0], Type::float32, x);
        unpack<4>(vectors[1], Type::float32, x + 4);
    } else {
        load_vectors<8, 1>(operand.data, operand.type, [&](int) { return position; }, vectors);
        unpack<8>(vectors[0], operand.type, x);
    }
}

FDU_DEVICE void store_batch(const Operand& operand, int64_t position, int64_t left, const float (&x)[element_batch]) {
    if (left >= element_batch) return store_vector(operand.data, operand.type, position, x);
#pragma unroll
    for (int i = 0; i < element_batch; ++i) {
        if (i < left) store_one(operand.data, operand.type, position + i, x[i]);
    }
}

// The factors of a batch, one by one where an operand is not packed.
FDU_DEVICE void load_factors_of_batch(
    const Space& space, const Operand& operand, int64_t position, int64_t left, float (&x)[element_batch]) {
    if (operand.packed && left >= element_batch) return load_factors(space, operand, 0, position, x);
#pragma unroll
    for (int i = 0; i < element_batch; ++i) {
        x[i] = 0;
        if (i < left) x[i] = load_one(operand.data, operand.type, offset_of(space, position + i, operand));
    }
}

template <bool sloped>
FDU_KERNEL expectation_kernel(FDU_TASK(ElementTask) task) {
    SharedSums& shared = block_shared<SharedSums>();
    double divisor = task.divisor;
    if (task.mask_total.data) {
        divisor = number_at(task.mask_total, 0) * task.repeats;
        divisor = divisor == 0 ? 1.0 : divisor;
    }
    const float multiplier = sloped ? float(task.scale * number_at(task.scale_tensor, 0) / divisor) : 0.0f;
    const int64_t step = int64_t(element_batch) * block_threads();

    double sum = 0;
    for (int64_t first = block_index() * step; first < task.size; first += grid_blocks() * step) {
        const int64_t position = first + int64_t(element_batch) * thread_index(), left = task.size - position;
        float v[element_batch], value[element_batch], slope[element_batch], factor[element_batch];
        load_batch(task.v, position, left, v);
        evaluate<Known::nothing, sloped>(task.function, v, value, slope);
        if (sloped) {
#pragma unroll
            for (int i = 0; i < element_batch; ++i) slope[i] *= multiplier;
        }
        if (task.factor.data) {
            load_factors_of_batch(task.space, task.factor, position, left, factor);
#pragma unroll
            for (int i = 0; i < element_batch; ++i) {
                value[i] *= factor[i];
                if (sloped) slope[i] *= factor[i];
            }
        }
        if (sloped && task.upstream.data) {
            load_factors_of_batch(task.space, task.upstream, position, left, factor);
#pragma unroll
            for (int i = 0; i < element_batch; ++i) slope[i] *= factor[i];
        }
        if (task.terms.data) store_batch(task.terms, position, left, value);
        if (sloped) store_batch(task.grad, position, left, slope);
        float some = 0;
#pragma unroll
        for (int i = 0; i < element_batch; ++i) some += i < left ? value[i] : 0.0f;
        sum += some;
    }

    if (!task.sums) return;
    sum = block_sum(sum, shared);
    if (thread_index() == 0) task.partials[block_index()] = sum;
    if (!is_last_block(task.tickets, unsigned(grid_blocks()), shared)) return;
    sum = sum_of(task.partials, grid_blocks(), shared);
    if (thread_index() == 0) task.value[0] = float(sum / divisor);
}

}  // namespace fdu::cuda
