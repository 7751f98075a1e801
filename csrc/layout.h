// How tensors are laid out, for the plans of the CPU and of CUDA: types, broadcasting, the order to visit elements in.

#pragma once

#include <ATen/dlpack.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "cpu_kernels.h"

namespace fdu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Type type_of(const DLTensor& tensor) {
    const int code = tensor.dtype.code, bits = tensor.dtype.bits;
    if (code == kDLFloat && bits == 16) return Type::float16;
    if (code == kDLBfloat && bits == 16) return Type::bfloat16;
    if (code == kDLFloat && bits == 32) return Type::float32;
    if (code == kDLFloat && bits == 64) return Type::float64;
    if (code == kDLBool && bits == 8) return Type::boolean;
    throw std::invalid_argument("fdu_kernels: a dtype that the kernels do not have");
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

// Numbers [B] or [] in any floating dtype, or one number for all.
struct Numbers {
    const char* data = nullptr;
    Type type = Type::float64;
    int64_t stride = 0;
    double otherwise = 1;
};

inline Numbers numbers_of(const DLTensor* tensor, double otherwise) {
    Numbers numbers;
    numbers.otherwise = otherwise;
    if (!tensor) return numbers;
    numbers.data = data_of(*tensor);
    numbers.type = type_of(*tensor);
    numbers.stride = tensor->ndim && tensor->shape[0] > 1 ? tensor->strides[0] : 0;
    return numbers;
}

// A weight [B] as a mask [B, 1, ...] of the dimensions of another tensor.
class WeightAsMask {
  public:
    WeightAsMask(const DLTensor& weight, const DLTensor& like) : mask_(weight) {
        for (int d = 0; d < like.ndim; ++d) {
            shape_[d] = d ? 1 : like.shape[0];
            strides_[d] = d ? 0 : weight.strides[0];
        }
        mask_.ndim = like.ndim;
        mask_.shape = shape_;
        mask_.strides = strides_;
    }
    WeightAsMask(const WeightAsMask&) = delete;

    const DLTensor* get() const { return &mask_; }

  private:
    DLTensor mask_;
    int64_t shape_[max_dims], strides_[max_dims];
};

// Tensors that broadcast to the shape of one of them, each with its operand in a task.
template <class Operand>
struct Placement {
    static constexpr int most = 5;

    const DLTensor& like;
    int count = 0;
    Operand* operands[most] = {};
    std::array<int64_t, max_dims> strides[most];  // over all dimensions of `like`, the outermost first

    explicit Placement(const DLTensor& all) : like(all) {
        if (all.ndim > max_dims) throw std::invalid_argument("fdu_kernels: more than 64 dimensions");
    }

    void add(const DLTensor* tensor, Operand& operand) {
        if (!tensor) return;
        const int missing = like.ndim - tensor->ndim;
        for (int d = 0; d < like.ndim; ++d) {
            strides[count][d] = d < missing || tensor->shape[d - missing] == 1 ? 0 : tensor->strides[d - missing];
        }
        operand.data = data_of(*tensor);
        operand.type = type_of(*tensor);
        operand.batch_stride = like.ndim ? strides[count][0] : 0;
        operands[count++] = &operand;
    }

    // Orders the dimensions from `from` on by the strides of the first operand, merges those that lie one after the other
    // in each of the first `used`, and fills in the space and these operands' strides. False: the space has too few.
    template <class Space>
    bool collapse(int from, int used, Space& space) const {
        int order[max_dims], kept = 0;
        for (int d = like.ndim - 1; d >= from; --d) {
            if (like.shape[d] == 1) continue;
            int at = kept++;
            for (; at > 0 && strides[0][order[at - 1]] > strides[0][d]; --at) order[at] = order[at - 1];
            order[at] = d;
        }
        space.dims = 0;
        for (int i = 0; i < kept; ++i) {
            const int d = order[i], last = space.dims - 1;
            bool merges = last >= 0;
            for (int j = 0; j < used && merges; ++j) merges = strides[j][d] == operands[j]->strides[last] * space.sizes[last];
            if (merges) {
                space.sizes[last] *= like.shape[d];
                continue;
            }
            if (space.dims == Space::most_dims) return false;
            space.sizes[space.dims] = like.shape[d];
            for (int j = 0; j < used; ++j) operands[j]->strides[space.dims] = strides[j][d];
            ++space.dims;
        }
        if (space.dims == 0) {
            space.dims = 1;
            space.sizes[0] = 1;
            for (int j = 0; j < used; ++j) operands[j]->strides[0] = 1;
        }
        return true;
    }
};

}  // namespace fdu
