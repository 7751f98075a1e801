// What the CUDA kernels get: operands and how to walk over them, numbers per sample, the tasks. Plain data.

#pragma once

#include <cstdint>

#include "cpu.h"
#include "element_function.h"
#include "layout.h"

namespace fdu::cuda {

// Dimensions that no merging leaves, of what broadcasts; where there are more, it is copied first.
constexpr int walk_dims = 6;
constexpr int warp_size = 32;
// Blocks that share the samples of a batch, where one block a sample would leave the device idle.
constexpr int most_parts = 1024;
// Tickets of a launch: for the batch, then for each sample whose blocks count; and streams that have their own.
constexpr int ticket_count = 1 + most_parts, ticket_streams = 64;
// Threads of a block that hold a sample on chip, walk over one, or evaluate elements.
constexpr int chip_threads = 512, stream_threads = 256, element_threads = 128;

// Elements of a mask or weight that are read at once, and of operands of several dtypes.
constexpr int factor_group = 4;

// What a kernel is made for: operands of one dtype in vectors of 16 bytes, or, for all pairs of dtypes, each of its own, known
// at run time, in groups.
struct Half {
    static constexpr Type type = Type::float16;
    static constexpr int lanes = 8;
};
struct BFloat16 {
    static constexpr Type type = Type::bfloat16;
    static constexpr int lanes = 8;
};
struct Float {
    static constexpr Type type = Type::float32;
    static constexpr int lanes = 4;
};
struct Mixed {
    static constexpr int lanes = factor_group;
};

// How many vectors a thread has under way in the kernels that walk over a sample.
constexpr int stream_rounds = 4;
// Elements of one sample that a thread holds: the fewest, the most where a warp has a sample of its own, and the most, each
// a power of two times the one before. One kernel for what is of several dtypes.
struct Held {
    int fewest, warp, most;
};
template <class T>
constexpr Held held = {8, 16, 64};
template <>
inline constexpr Held held<Mixed> = {32, 32, 32};
// In clusters that make use of their shared memory, where they take one sample after another or else: elements that a
// thread holds; vectors of differences in its registers, beside all that lasts from turn to turn; and bytes of a block, for
// the other differences and for as many vectors of the next sample's pred and target.
template <class T, bool in_turns>
constexpr int cluster_elements = (in_turns ? 1 : 2) * held<T>.most;
template <class T>
constexpr int kept_vectors = held<T>.most / T::lanes * 3 / 4;
template <class T, bool in_turns>
constexpr int cluster_room = chip_threads * (4 * (cluster_elements<T, in_turns> - T::lanes * kept_vectors<T>) +
                                             (in_turns ? 32 * kept_vectors<T> : 0));

// Division of numbers below 2^63 by one that is known at the launch, as a multiplication.
struct Divisor {
    uint64_t multiplier;
    uint32_t shift;
};

inline Divisor divisor_of(uint64_t number) {
    uint32_t shift = 0;
    while ((uint64_t(1) << shift) < number) ++shift;
    using Wide = unsigned __int128;
    return {uint64_t((((Wide(1) << shift) - number) << 64) / number + 1), shift};
}

FDU_FUNCTION uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(a, b);
#else
    return uint64_t((unsigned __int128)a * b >> 64);
#endif
}

FDU_FUNCTION int64_t divide(int64_t number, const Divisor& by) {
    return int64_t((high_product(uint64_t(number), by.multiplier) + uint64_t(number)) >> by.shift);
}

// The order in which elements are visited: the innermost dimension first. Of one dimension, but for what broadcasts.
struct Space {
    static constexpr int most_dims = walk_dims;
    int dims = 1;
    int64_t sizes[walk_dims];
    Divisor divisors[walk_dims];
};

struct Operand {
    char* data = nullptr;  // null where there is none
    Type type = Type::float32;
    int64_t batch_stride = 0;  // strides count elements
    int64_t strides[walk_dims];
};

// Where the element at a position lies in an operand that broadcasts.
FDU_FUNCTION int64_t offset_of(const Space& space, int64_t position, const Operand& operand) {
    int64_t found = 0;
    for (int d = 0; d < space.dims; ++d) {
        int64_t at = position;
        if (d + 1 < space.dims) {
            position = divide(position, space.divisors[d]);
            at -= position * space.sizes[d];
        }
        found += at * operand.strides[d];
    }
    return found;
}

struct Sums {
    double square = 0, mask = 0;
};

struct GaussianTask {
    Space space;  // of a sample, for the mask
    Operand pred, target, mask, grad;
    int64_t size, batch;
    int warps;  // that share a sample; 1: each warp of a block has its own
    int parts;  // blocks that share a sample

    Profile profile;
    Numbers sigma, weight;
    double divisor;  // besides sigma^2
    bool count;      // the mask's sum instead
    Numbers scale_tensor;
    double scale;  // of the gradient

    Reduction reduction;
    float* value;
    double* distance;           // [B], s, or null
    float* coefficient;         // [B], without the scale, or null
    float* scaled_coefficient;  // [B], with it, or null
    const float* coefficient_in;
    int64_t coefficient_in_stride;

    unsigned* tickets;  // for the batch, then for each sample; zeros between launches
    unsigned finishers;
    Sums* partials;  // [B, parts]
    double* losses;  // [B]
};

struct ElementTask {
    Space space;  // for the factor and upstream
    Operand v, factor, upstream, terms, grad;
    int64_t size;
    ElementFunction<float> function;
    Numbers mask_total, scale_tensor;
    double repeats, scale;  // of the mask's sum; of the gradient
    double divisor;
    bool sums;
    float* value;
    unsigned* tickets;
    double* partials;
};

}  // namespace fdu::cuda
