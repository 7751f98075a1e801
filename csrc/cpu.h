// The operations of the CPU backend on whole tensors; module.cpp binds them.

#pragma once

#include <ATen/dlpack.h>

#include <optional>

#include "cpu_kernels.h"
#include "scalar_math.h"

namespace fdu {

enum class Reduction { none, mean, sum };

// Where tensors are optional, null is none. Tensors "acc" have the accumulation dtype and lie one after the other.
struct Gaussian {
    const DLTensor *pred, *target, *mask;
    Profile profile;
    const DLTensor* sigma_tensor;  // [B] or []; else sigma
    double sigma;
    const DLTensor* weight;  // [B]
    bool mean_distance;
    Reduction reduction;
    double grad_scale;
    const DLTensor* value;        // acc [B] for Reduction::none, else []
    const DLTensor* coefficient;  // acc [B], written; without grad_scale
    const DLTensor* grad;         // like pred
    const DLTensor* distance;     // float64 [B], written
};

// pred and target may have two dtypes; "acc" is that of the wider.
void gaussian(const Gaussian&);

// grad = coefficient_b mask (pred - target), coefficient [B].
void gaussian_backward(
    const DLTensor& pred, const DLTensor& target, const DLTensor* mask, const DLTensor& coefficient, const DLTensor& grad);

struct Expectation {
    const DLTensor *v, *weight, *mask;
    const double* numbers;
    Reduction reduction;
    double scale;              // of grad
    const DLTensor* upstream;  // acc, of the shape of v, multiplies grad; for Reduction::none
    const DLTensor* value;     // acc, the shape of v for Reduction::none, else []
    const DLTensor* grad;      // like v
};

void expectation(const Expectation&);

// The names of the instruction sets that this machine and this build have, the fastest first.
int available_instruction_sets(const char** names);
// False if it is not available.
bool use_instruction_set(const char* name);
const char* used_instruction_set();

}  // namespace fdu
