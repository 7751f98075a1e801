// Elements on the device: 16 bytes at a time or one by one, widened to float and rounded back.

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

FDU_DEVICE void unpack(const Words& words, float (&x)[4], float) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = bit_cast<float>(words.at[i]);
}
FDU_DEVICE void unpack(const Words& words, float (&x)[8], Half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = widen_half(uint16_t(words.at[i]));
        x[2 * i + 1] = widen_half(uint16_t(words.at[i] >> 16));
    }
}
FDU_DEVICE void unpack(const Words& words, float (&x)[8], BFloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = low_bfloat(words.at[i]);
        x[2 * i + 1] = high_bfloat(words.at[i]);
    }
}

FDU_DEVICE Words pack(const float (&x)[4], float) {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = bit_cast<uint32_t>(x[i]);
    return words;
}
FDU_DEVICE Words pack(const float (&x)[8], Half) {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = narrow_halves(x[2 * i], x[2 * i + 1]);
    return words;
}
FDU_DEVICE Words pack(const float (&x)[8], BFloat16) {
    Words words;
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
        unpack(load_words(from), x, T{});
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

FDU_DEVICE float load_factor(const Operand& operand, int64_t offset) {
    switch (operand.type) {
        case Type::boolean: return load_constant(reinterpret_cast<const uint8_t*>(operand.data) + offset) ? 1.0f : 0.0f;
        case Type::float16: return load_one(reinterpret_cast<const Half*>(operand.data) + offset);
        case Type::bfloat16: return load_one(reinterpret_cast<const BFloat16*>(operand.data) + offset);
        case Type::float32: return load_constant(reinterpret_cast<const float*>(operand.data) + offset);
        default: return float(load_constant(reinterpret_cast<const double*>(operand.data) + offset));
    }
}

FDU_DEVICE void store_as(const Operand& operand, int64_t offset, float value) {
    switch (operand.type) {
        case Type::float16: return narrow(value, reinterpret_cast<Half*>(operand.data)[offset]);
        case Type::bfloat16: return narrow(value, reinterpret_cast<BFloat16*>(operand.data)[offset]);
        default: reinterpret_cast<float*>(operand.data)[offset] = value;
    }
}

// A group at once, of an operand that is packed.
FDU_DEVICE void load_group(const Operand& operand, int64_t offset, float* x) {
    if (operand.strides[0] == 0) {
        x[0] = x[1] = x[2] = x[3] = load_factor(operand, offset);
        return;
    }
    if (operand.type == Type::boolean) {
        const uint32_t four = load_constant(reinterpret_cast<const uint32_t*>(operand.data + offset));
#pragma unroll
        for (int i = 0; i < factor_group; ++i) x[i] = (four >> (8 * i)) & 255 ? 1.0f : 0.0f;
    } else if (operand.type == Type::float32) {
        const Words words = load_words(operand.data + 4 * offset);
#pragma unroll
        for (int i = 0; i < factor_group; ++i) x[i] = bit_cast<float>(words.at[i]);
    } else {
        const uint32_t* const from = reinterpret_cast<const uint32_t*>(operand.data + 2 * offset);
        const uint32_t words[2] = {load_constant(from), load_constant(from + 1)};
        const bool brain = operand.type == Type::bfloat16;
#pragma unroll
        for (int i = 0; i < factor_group; ++i) {
            const uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xffff;
            x[i] = brain ? low_bfloat(bits) : widen_half(uint16_t(bits));
        }
    }
}

// The factors of n elements from a position on, groups of them in an operand that is packed.
template <int n>
FDU_DEVICE void load_groups(const Space& space, const Operand& operand, int64_t base, int64_t position, float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += factor_group) {
        load_group(operand, base + offsets(space, position + i, operand).of[0], x + i);
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
