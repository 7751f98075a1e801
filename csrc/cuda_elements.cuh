// Elements on the device: 16 bytes at a time, in groups or one by one, widened to float and rounded back.

#pragma once

#include "cuda_machine.h"

namespace fdu::cuda {

FDU_DEVICE float low_bfloat(uint32_t word) { return bit_cast<float>(word << 16); }
FDU_DEVICE float high_bfloat(uint32_t word) { return bit_cast<float>(word & 0xffff0000u); }

FDU_DEVICE float widen(float x) { return x; }
FDU_DEVICE float widen(Half x) { return widen_half(x.bits); }
FDU_DEVICE float widen(BFloat16 x) { return low_bfloat(x.bits); }

FDU_DEVICE void narrow(float value, float& to) { to = value; }
FDU_DEVICE void narrow(float value, Half& to) { to.bits = narrow_half(value); }
FDU_DEVICE void narrow(float value, BFloat16& to) { to.bits = narrow_bfloat(value); }

FDU_DEVICE float load_one(const float* from) { return load_constant(from); }
FDU_DEVICE float load_one(const Half* from) { return widen_half(load_constant(&from->bits)); }
FDU_DEVICE float load_one(const BFloat16* from) { return low_bfloat(load_constant(&from->bits)); }

FDU_DEVICE void unpack(const Words<4>& words, float (&x)[4], float) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = bit_cast<float>(words.at[i]);
}
FDU_DEVICE void unpack(const Words<4>& words, float (&x)[8], Half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = widen_half(uint16_t(words.at[i]));
        x[2 * i + 1] = widen_half(uint16_t(words.at[i] >> 16));
    }
}
FDU_DEVICE void unpack(const Words<4>& words, float (&x)[8], BFloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = low_bfloat(words.at[i]);
        x[2 * i + 1] = high_bfloat(words.at[i]);
    }
}

FDU_DEVICE Words<4> pack(const float (&x)[4], float) {
    Words<4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = bit_cast<uint32_t>(x[i]);
    return words;
}
FDU_DEVICE Words<4> pack(const float (&x)[8], Half) {
    Words<4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = narrow_halves(x[2 * i], x[2 * i + 1]);
    return words;
}
FDU_DEVICE Words<4> pack(const float (&x)[8], BFloat16) {
    Words<4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = narrow_bfloats(x[2 * i], x[2 * i + 1]);
    return words;
}

// n is 1, or a vector's worth at an address that is a multiple of 16 bytes.
template <class T, int n>
FDU_DEVICE void load(const T* from, float (&x)[n]) {
    if constexpr (n == 1) {
        x[0] = load_one(from);
    } else {
        unpack(load_words<4>(from), x, T{});
    }
}

template <class T, int n>
FDU_DEVICE void store(T* to, const float (&x)[n]) {
    if constexpr (n == 1) {
        narrow(x[0], *to);
    } else {
        store_words(to, pack(x, T{}));
    }
}

// An element of an operand of any dtype but float64.
FDU_DEVICE float load_one(const Operand& operand, int64_t offset) {
    switch (operand.type) {
        case Type::boolean: return load_constant(reinterpret_cast<const uint8_t*>(operand.data) + offset) ? 1.0f : 0.0f;
        case Type::float16: return load_one(reinterpret_cast<const Half*>(operand.data) + offset);
        case Type::bfloat16: return load_one(reinterpret_cast<const BFloat16*>(operand.data) + offset);
        default: return load_one(reinterpret_cast<const float*>(operand.data) + offset);
    }
}

FDU_DEVICE void store_one(const Operand& operand, int64_t offset, float value) {
    switch (operand.type) {
        case Type::float16: return narrow(value, reinterpret_cast<Half*>(operand.data)[offset]);
        case Type::bfloat16: return narrow(value, reinterpret_cast<BFloat16*>(operand.data)[offset]);
        default: reinterpret_cast<float*>(operand.data)[offset] = value;
    }
}

// The words of groups of floats, halves or bfloats, each at an address that is a multiple of its size.
template <int count, class F>
FDU_DEVICE void load_groups(const Operand& operand, const F& offset, Words<4>* groups) {
    if (operand.type == Type::float32) {
#pragma unroll
        for (int i = 0; i < count; ++i) groups[i] = load_words<4>(operand.data + 4 * offset(i));
    } else {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const Words<2> words = load_words<2>(operand.data + 2 * offset(i));
            groups[i] = {{words.at[0], words.at[1]}};
        }
    }
}

// What they say. Not told at once, so that no load waits for another to be widened.
FDU_DEVICE void unpack(const Words<4>& group, Type type, float* x) {
#pragma unroll
    for (int i = 0; i < factor_group; ++i) {
        const uint32_t bits = group.at[i / 2] >> (i % 2 * 16) & 0xffff;
        const float narrow = type == Type::float16 ? widen_half(uint16_t(bits)) : low_bfloat(bits);
        x[i] = type == Type::float32 ? bit_cast<float>(group.at[i]) : narrow;
    }
}

FDU_DEVICE void store_group(const Operand& operand, int64_t offset, const float (&x)[factor_group]) {
    if (operand.type == Type::float32) return store_words(operand.data + 4 * offset, pack(x, float{}));
    const bool half = operand.type == Type::float16;
    const Words<2> words{{half ? narrow_halves(x[0], x[1]) : narrow_bfloats(x[0], x[1]),
                          half ? narrow_halves(x[2], x[3]) : narrow_bfloats(x[2], x[3])}};
    store_words(operand.data + 2 * offset, words);
}

// The factors of n elements from a position on, groups of them in an operand that broadcasts.
template <int n>
FDU_DEVICE void load_factors(const Space& space, const Operand& operand, int64_t base, int64_t position, float (&x)[n]) {
    if constexpr (n == 1) {
        x[0] = load_one(operand, base + offset_of(space, position, operand));
    } else {
#pragma unroll
        for (int i = 0; i < n; i += factor_group) {
            const int64_t offset = base + offset_of(space, position + i, operand);
            if (operand.strides[0] == 0) {
                x[i] = x[i + 1] = x[i + 2] = x[i + 3] = load_one(operand, offset);
            } else if (operand.type == Type::boolean) {
                const uint32_t four = load_constant(reinterpret_cast<const uint32_t*>(operand.data + offset));
#pragma unroll
                for (int j = 0; j < factor_group; ++j) x[i + j] = (four >> (8 * j)) & 255 ? 1.0f : 0.0f;
            } else {
                Words<4> group;
                load_groups<1>(operand, [&](int) { return offset; }, &group);
                unpack(group, operand.type, x + i);
            }
        }
    }
}

FDU_DEVICE double number_at(const Numbers& numbers, int64_t i) {
    if (!numbers.data) return numbers.otherwise;
    i *= numbers.stride;
    switch (numbers.type) {
        case Type::float16: return load_one(reinterpret_cast<const Half*>(numbers.data) + i);
        case Type::bfloat16: return load_one(reinterpret_cast<const BFloat16*>(numbers.data) + i);
        case Type::float32: return load_constant(reinterpret_cast<const float*>(numbers.data) + i);
        default: return load_constant(reinterpret_cast<const double*>(numbers.data) + i);
    }
}

}  // namespace fdu::cuda
