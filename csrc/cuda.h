// The operations of the CUDA backend on whole tensors; cuda_module.cpp binds them.
//
// They launch kernels on a stream of PyTorch's current device and return at once. Nothing is allocated: partial sums lie
// in a workspace that the caller brings. False: nothing was launched, since the operands do not lie as the kernels read
// them. Copies do, whose elements follow each other in one order, sample after sample, from a multiple of 16 bytes on, with
// no float64 among them.

#pragma once

#include <string>

#include "cpu.h"

namespace fdu::cuda {

// Bytes of a workspace, and more for each sample.
extern const int64_t workspace_bytes, workspace_bytes_per_sample;

struct Context {
    void* stream;
    const DLTensor* workspace;
};

// As fdu::Gaussian, without float64; in addition grad_scale may be a tensor [], with which the number is multiplied.
struct GaussianCall {
    fdu::Gaussian of;
    const DLTensor* scale_tensor;
};

bool gaussian(const GaussianCall&, const Context&);

bool gaussian_backward(
    const DLTensor& pred, const DLTensor& target, const DLTensor* mask, const DLTensor& coefficient, const DLTensor& grad,
    const Context&);

// As fdu::Expectation, but that a weight comes as a mask without a mask_total, by which a mean divides: the sum of the mask
// before broadcasting.
struct ExpectationCall {
    fdu::Expectation of;
    const DLTensor *mask_total, *scale_tensor;
};

bool expectation(const ExpectationCall&, const Context&);

// Empty, or why the kernels cannot run on a device.
std::string why_unusable(int device);

}  // namespace fdu::cuda
