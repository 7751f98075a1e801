// What the CPU kernels take and give: element ranges of strided operands; one table of functions per instruction set.
//
// cpu_kernels.cpp implements it and is compiled once per instruction set; cpu.cpp plans, and spreads the ranges over
// threads.

#pragma once

#include <cstdint>

namespace fdu {

enum class Type : int { float16, bfloat16, float32, float64, boolean };
constexpr int value_types = 4;

constexpr int max_dims = 64;

// The order in which elements are visited: the innermost dimension first.
struct Space {
    static constexpr int most_dims = max_dims;
    int dims;
    int64_t sizes[max_dims];
};

struct Operand {
    char* data = nullptr;  // null where there is none
    Type type = Type::float32;
    int64_t batch_stride = 0;  // strides count elements
    int64_t strides[max_dims];
};

// Elements that are summed in the accumulation dtype before their sums join in double, and how many of these chunks
// make up a group, the unit of work. Both are part of the result's last bits.
constexpr int64_t chunk_size = 1024;
constexpr int64_t group_size = 16 * chunk_size;

struct GaussianWork {
    Space space;  // of one sample
    int64_t size;
    Operand pred, target, mask, grad;
    bool streams;  // whether the gradient is too large to stay in the caches
};

struct Sums {
    double square, mask;
};

struct ElementWork {
    Space space;
    int64_t size;
    Operand v, factor, upstream, terms, grad;
    const double* numbers;  // fdu_kernels.critic.ElementFunction.numbers
    double scale;           // of the gradient
    bool sums;
};

struct GaussianKernels {
    // Sums of mask (pred - target)^2, and of the mask if asked for, over elements [begin, end) of one sample.
    Sums (*sums)(const GaussianWork&, int64_t sample, int64_t begin, int64_t end, bool count);
    // grad = coefficient mask (pred - target) over the same.
    void (*grad)(const GaussianWork&, int64_t sample, int64_t begin, int64_t end, double coefficient);
};

struct Kernels {
    // For pred and target of one dtype, and for a target of any other that accumulates alike. Those of float64 take any two.
    GaussianKernels gaussian, mixed;
    // Sum of factor y(v) over elements [begin, end); terms and grad are written where they have data.
    double (*elements)(const ElementWork&, int64_t begin, int64_t end);
    // Sum of the elements [begin, end) of one operand.
    double (*sum)(const Space&, const Operand&, int64_t begin, int64_t end);
};

// By the dtype of pred or v, or float64 if target is.
extern const Kernels kernels_baseline[value_types];
#if defined(FDU_X86)
extern const Kernels kernels_avx2[value_types];
extern const Kernels kernels_avx512[value_types];
#endif

}  // namespace fdu
