// Elements on the device: 16 bytes at a time, in groups or one by one, widened to float and rounded back. Their dtype is an
// argument, which the compiler knows where a kernel is made for one.

#pragma once

#include <type_traits>

#include "cuda_machine.h"

namespace fdu::cuda {

// That of T, or what an operand says.
template <class T>
FDU_DEVICE Type type_in(const Operand& operand) {
    if constexpr (std::is_same_v<T, Mixed>) {
        return operand.type;
    } else {
        return T::type;
    }
}

FDU_DEVICE float low_bfloat(uint32_t word) { return bit_cast<float>(word << 16); }

// Of any dtype but float64.
FDU_DEVICE float load_one(const char* data, Type type, int64_t offset) {
    switch (type) {
        case Type::boolean: return load_constant(reinterpret_cast<const uint8_t*>(data) + offset) ? 1.0f : 0.0f;
        case Type::float16: return widen_half(load_constant(reinterpret_cast<const uint16_t*>(data) + offset));
        case Type::bfloat16: return low_bfloat(load_constant(reinterpret_cast<const uint16_t*>(data) + offset));
        default: return load_constant(reinterpret_cast<const float*>(data) + offset);
    }
}

FDU_DEVICE void store_one(char* data, Type type, int64_t offset, float value) {
    if (type == Type::float32) {
        reinterpret_cast<float*>(data)[offset] = value;
    } else {
        reinterpret_cast<uint16_t*>(data)[offset] = type == Type::float16 ? narrow_half(value) : narrow_bfloat(value);
    }
}

// The words of vectors of n floats, halves or bfloats, each at an address that is a multiple of its size.
template <int n, int count, class F>
FDU_DEVICE void load_vectors(const char* data, Type type, const F& offset, Words<4>* vectors) {
    if (n == 8 || type == Type::float32) {
#pragma unroll
        for (int i = 0; i < count; ++i) vectors[i] = load_words<4>(data + 16 / n * offset(i));
    } else {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const Words<2> words = load_words<2>(data + 2 * offset(i));
            vectors[i] = {{words.at[0], words.at[1]}};
        }
    }
}

// What they say. Not told at once, so that no load waits for another to be widened.
template <int n>
FDU_DEVICE void unpack(const Words<4>& vector, Type type, float* x) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = vector.at[i / 2] >> (i % 2 * 16) & 0xffff;
        const float narrow = type == Type::float16 ? widen_half(uint16_t(bits)) : low_bfloat(bits);
        x[i] = type == Type::float32 ? bit_cast<float>(vector.at[i % 4]) : narrow;
    }
}

// A vector of n elements, or of floats two of 4.
template <int n>
FDU_DEVICE void store_vector(char* data, Type type, int64_t offset, const float (&x)[n]) {
    if (type == Type::float32) {
#pragma unroll
        for (int i = 0; i < n; i += 4) {
            store_words(data + 4 * (offset + i), Words<4>{{bit_cast<uint32_t>(x[i]), bit_cast<uint32_t>(x[i + 1]),
                                                           bit_cast<uint32_t>(x[i + 2]), bit_cast<uint32_t>(x[i + 3])}});
        }
        return;
    }
    Words<n / 2> words;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
        words.at[i] = type == Type::float16 ? narrow_halves(x[2 * i], x[2 * i + 1]) : narrow_bfloats(x[2 * i], x[2 * i + 1]);
    }
    store_words(data + 2 * offset, words);
}

// The factors of n elements from a position on, groups of them in an operand that broadcasts.
template <int n>
FDU_DEVICE void load_factors(const Space& space, const Operand& operand, int64_t base, int64_t position, float (&x)[n]) {
    if constexpr (n == 1) {
        x[0] = load_one(operand.data, operand.type, base + offset_of(space, position, operand));
    } else {
#pragma unroll
        for (int i = 0; i < n; i += factor_group) {
            const int64_t offset = base + offset_of(space, position + i, operand);
            if (operand.strides[0] == 0) {
                x[i] = x[i + 1] = x[i + 2] = x[i + 3] = load_one(operand.data, operand.type, offset);
            } else if (operand.type == Type::boolean) {
                const uint32_t four = load_constant(reinterpret_cast<const uint32_t*>(operand.data + offset));
#pragma unroll
                for (int j = 0; j < factor_group; ++j) x[i + j] = (four >> (8 * j)) & 255 ? 1.0f : 0.0f;
            } else {
                Words<4> group;
                load_vectors<factor_group, 1>(operand.data, operand.type, [&](int) { return offset; }, &group);
                unpack<factor_group>(group, operand.type, x + i);
            }
        }
    }
}

FDU_DEVICE double number_at(const Numbers& numbers, int64_t i) {
    if (!numbers.data) return numbers.otherwise;
    i *= numbers.stride;
    if (numbers.type == Type::float64) return load_constant(reinterpret_cast<const double*>(numbers.data) + i);
    return load_one(numbers.data, numbers.type, i);
}

}  // namespace fdu::cuda
