// The expectation kernel: a function of the density-ratio estimate over all elements, its sum and its gradient.

#pragma once

#include "cuda_sums.cuh"

namespace fdu::cuda {

// Vectors of 16 bytes that a thread evaluates at once: their elements are independent of each other.
constexpr int batch_vectors = 2;
// Elements of a batch.
template <class T>
constexpr int batch_of = batch_vectors * T::lanes;
// Evaluation is most of a kernel for functions of all kinds, and so it tells dtypes apart at run time.
template <>
inline constexpr int batch_of<Mixed> = 8;

// A batch as it is read.
template <class T>
struct Batch {
    Words<4> vectors[batch_vectors];

    FDU_DEVICE void load(const Operand& operand, int64_t position) {
        constexpr int n = std::is_same_v<T, Mixed> ? 8 : T::lanes;
        const Type type = type_in<T>(operand);
        if (std::is_same_v<T, Mixed> && type == Type::float32) {
            load_vectors<4, 2>(operand.data, type, [&](int i) { return position + 4 * i; }, vectors);
        } else {
            load_vectors<n, batch_of<T> / n>(operand.data, type, [&](int i) { return position + n * i; }, vectors);
        }
    }

    FDU_DEVICE void unpack_to(Type type, float (&x)[batch_of<T>]) const {
        if (type == Type::float32) {
            unpack<4>(vectors[0], type, x);
            unpack<4>(vectors[1], type, x + 4);
        } else {
#pragma unroll
            for (int i = 0; i < batch_of<T>; i += 8) unpack<8>(vectors[i / 8], type, x + i);
        }
    }
};

template <int n>
FDU_DEVICE void store_elements(const Operand& operand, Type type, int64_t position, const float (&x)[n]) {
    if constexpr (n == 1) {
        store_one(operand.data, type, position, x[0]);
    } else {
#pragma unroll
        for (int i = 0; i < n; i += 8) {
            const float eight[] = {x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7]};
            store_vector(operand.data, type, position + i, eight);
        }
    }
}

// log((1 + e^x)/2) for x = scale v, and twice its derivative in x.
template <bool sloped, int n>
FDU_DEVICE void evaluate_softplus(float scale, const float (&v)[n], float (&value)[n], float (&slope)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const float x = scale * v[i];
        const Exponential<float> falling = falling_exponential(minus_absolute(x));
        value[i] = shifted_softplus(x, falling);
        if (sloped) slope[i] = quotient(x > 0 ? 1.0f : falling.value, fmaf(0.5f, falling.value, 0.5f));
    }
}

// What a kernel is made for: a function of one kind, or any.
template <Known known, bool sloped, class T>
struct Elements {
    const ElementTask& task;
    float value_gain = 1, slope_gain;  // of what is evaluated
    bool others;                       // whether there are operands beside v and its gradient

    FDU_DEVICE Elements(const ElementTask& task_, float multiplier) : task(task_), slope_gain(multiplier) {
        others = task.factor.data || task.upstream.data || task.terms.data;
        if (known == Known::softplus_alone) {
            const Row<float>& row = task.function.first.row;
            value_gain = row.softplus;
            slope_gain *= 0.5f * row.softplus * row.scale;
        }
    }

    // Evaluates elements from a position on, writes what is asked for, returns the sum of their values without the gain.
    template <int n>
    FDU_DEVICE float operator()(int64_t position, const float (&v)[n]) const {
        float value[n], slope[n], factor[n];
        if constexpr (known == Known::softplus_alone) {
            evaluate_softplus<sloped>(task.function.first.row.scale, v, value, slope);
        } else {
            evaluate<known, sloped>(task.function, v, value, slope);
        }
        if (sloped) {
#pragma unroll
            for (int i = 0; i < n; ++i) slope[i] *= slope_gain;
        }
        if (others) {
            if (task.factor.data) {
                load_factors(task.space, task.factor, 0, position, factor);
#pragma unroll
                for (int i = 0; i < n; ++i) {
                    value[i] *= factor[i];
                    if (sloped) slope[i] *= factor[i];
                }
            }
            if (sloped && task.upstream.data) {
                load_factors(task.space, task.upstream, 0, position, factor);
#pragma unroll
                for (int i = 0; i < n; ++i) slope[i] *= factor[i];
            }
            if (task.terms.data) {
#pragma unroll
                for (int i = 0; i < n; ++i) factor[i] = value_gain * value[i];
                store_elements(task.terms, task.terms.type, position, factor);
            }
        }
        if (sloped) store_elements(task.grad, type_in<T>(task.grad), position, slope);
        float sum = value[0];
#pragma unroll
        for (int i = 1; i < n; ++i) sum += value[i];
        return sum;
    }
};

template <Known known, bool sloped, class T>
FDU_KERNEL expectation_kernel(FDU_TASK(ElementTask) task) {
    SharedSums& shared = block_shared<SharedSums>();
    double divisor = task.divisor;
    if (task.mask_total.data) {
        divisor = number_at(task.mask_total, 0) * task.repeats;
        divisor = divisor == 0 ? 1.0 : divisor;
    }
    const Elements<known, sloped, T> elements(
        task, sloped ? float(task.scale * number_at(task.scale_tensor, 0) / divisor) : 0.0f);
    constexpr int n = batch_of<T>;
    const Type type = type_in<T>(task.v);
    const int64_t step = n * grid_blocks() * block_threads(), whole = task.size / n * n;
    const int64_t mine = block_index() * block_threads() + thread_index();

    double sum = 0;
    Batch<T> next;
    if (n * mine < whole) next.load(task.v, n * mine);
    for (int64_t position = n * mine; position < whole; position += step) {
        float v[n];
        next.unpack_to(type, v);
        // Under way while these are evaluated.
        if (position + step < whole) next.load(task.v, position + step);
        sum += elements(position, v);
    }
    if (whole + mine < task.size) {
        const float v[1] = {load_one(task.v.data, type, whole + mine)};
        sum += elements(whole + mine, v);
    }

    if (!task.sums) return;
    sum = block_sum(sum * elements.value_gain, shared);
    if (thread_index() == 0) task.partials[block_index()] = sum;
    if (!is_last_block(task.tickets, unsigned(grid_blocks()), shared)) return;
    sum = sum_of(task.partials, grid_blocks(), shared);
    if (thread_index() == 0) task.value[0] = float(sum / divisor);
}

}  // namespace fdu::cuda
