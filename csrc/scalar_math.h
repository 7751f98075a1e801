// Scalar mathematics of the divergences, shared by host and device: exponentials, the Gaussian profile, one row's terms.
//
// Everything is free of branches on data, so that a loop over it vectorises, and every NaN stays a NaN. The anonymous
// namespace gives each translation unit its own copy: units are compiled for different instruction sets.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define FDU_FUNCTION __host__ __device__ __forceinline__
#else
#define FDU_FUNCTION inline __attribute__((always_inline))
#endif

namespace fdu {
namespace {

template <class A>
struct Bits;

template <>
struct Bits<float> {
    using Integer = int32_t;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    static constexpr float log2_high = 0.693145751953125f, log2_low = 1.428606765330187e-6f;
    static constexpr float lowest_exponent = -104.0f, highest_exponent = 89.0f, normal_exponent = -87.0f;
    static constexpr int exponential_terms = 7, logarithm_terms = 5;
};

template <>
struct Bits<double> {
    using Integer = int64_t;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double magic = 6755399441055744.0;
    static constexpr double log2_high = 0.6931471803691238, log2_low = 1.9082149292705877e-10;
    static constexpr double lowest_exponent = -746.0, highest_exponent = 710.0, normal_exponent = -708.0;
    static constexpr int exponential_terms = 13, logarithm_terms = 11;
};

template <class To, class From>
FDU_FUNCTION To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// Ternaries let NaN pass: every comparison with it is false.
template <class A>
FDU_FUNCTION A clamp(A x, A low, A high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <class A>
FDU_FUNCTION A power_of_two(typename Bits<A>::Integer n) {
    return bit_cast<A>((n + Bits<A>::bias) << Bits<A>::mantissa);
}

// e^r - 1 for |r| <= log(2)/2, to full relative accuracy: the Taylor polynomial, whose rest is below a quarter ulp.
template <class A>
FDU_FUNCTION A small_expm1(A r) {
    constexpr int terms = Bits<A>::exponential_terms;
    constexpr double reciprocal_factorials[] = {
        1.0,         1.0,           1.0 / 2,        1.0 / 6,         1.0 / 24,         1.0 / 120,         1.0 / 720,
        1.0 / 5040,  1.0 / 40320,   1.0 / 362880,   1.0 / 3628800,   1.0 / 39916800,   1.0 / 479001600,   1.0 / 6227020800,
    };
    A sum = A(reciprocal_factorials[terms]);
#pragma GCC unroll 16
    for (int i = terms - 1; i >= 2; --i) sum = sum * r + A(reciprocal_factorials[i]);
    return r + r * r * sum;
}

// x = n log 2 + r with |r| <= log(2)/2.
template <class A>
struct Reduced {
    A remainder;
    typename Bits<A>::Integer power;
};

template <class A>
FDU_FUNCTION Reduced<A> reduce_exponent(A x) {
    using B = Bits<A>;
    x = clamp(x, A(B::lowest_exponent), A(B::highest_exponent));
    const A shifted = x * A(1.4426950408889634) + B::magic;
    const A n = shifted - B::magic;
    const auto power = bit_cast<typename B::Integer>(shifted) - bit_cast<typename B::Integer>(A(B::magic));
    return {(x - n * B::log2_high) - n * B::log2_low, power};
}

// e^x and e^x - 1, both to a few ulp.
template <class A>
struct Exponential {
    A value, less_one;
};

template <class A>
FDU_FUNCTION A exponential(A x) {
    const Reduced<A> reduced = reduce_exponent(x);
    // In two steps: 2^n alone would leave the range where e^x is subnormal or just finite.
    const auto half = reduced.power >> 1;
    const A first = power_of_two<A>(half), second = power_of_two<A>(reduced.power - half);
    return (A(1) + small_expm1(reduced.remainder)) * first * second;
}

// Of x <= 0, where both share the work.
template <class A>
FDU_FUNCTION Exponential<A> falling_exponential(A x) {
    const A limit = A(Bits<A>::normal_exponent);
    const Reduced<A> reduced = reduce_exponent(x < limit ? limit : x);
    const A scale = power_of_two<A>(reduced.power), rest = small_expm1(reduced.remainder);
    // Without subnormal numbers one factor 2^n suffices.
    return {x < limit ? A(0) : scale * rest + scale, scale * rest + (scale - A(1))};
}

// log(1 + y) for y in (-1, 0], to full relative accuracy also near 0.
template <class A>
FDU_FUNCTION A falling_log1p(A y) {
    using B = Bits<A>;
    using Integer = typename B::Integer;
    constexpr Integer root_half = sizeof(A) == 4 ? Integer(0x3f3504f3) : Integer(0x3fe6a09e667f3bcd);
    const A u = A(1) + y;
    const A lost = y - (u - A(1));
    const Integer power = (bit_cast<Integer>(u) - root_half) >> B::mantissa;
    const A mantissa = bit_cast<A>(bit_cast<Integer>(u) - (power << B::mantissa));
    const A f = power == 0 ? y : (mantissa - A(1)) + lost * power_of_two<A>(-power);
    const A s = f / (A(2) + f), z = s * s;
    A sum = A(1.0 / (2 * B::logarithm_terms - 1));
#pragma GCC unroll 16
    for (int i = B::logarithm_terms - 1; i >= 2; --i) sum = sum * z + A(1.0 / (2 * i - 1));
    const A n = A(power);
    // log(1 + f) = 2 atanh(s), and 2 s = f - s f.
    return n * B::log2_high + (f - s * (f - A(2) * z * sum) + n * B::log2_low);
}

// h and h' of a Gaussian profile at s.
struct Profile {
    double c, k, linear_beyond;
    const double* table;  // packed as fdu_kernels.lowering.GaussianProfile says, or null
    int64_t rows;

    struct Value {
        double value, slope;
    };

    FDU_FUNCTION Value operator()(double s) const {
        const double inside = s > linear_beyond ? linear_beyond : s;
        Value h = table ? read(inside) : evaluate(inside);
        if (s > linear_beyond) h.value += h.slope * (s - inside);
        return h;
    }

  private:
    FDU_FUNCTION Value evaluate(double s) const {
        // 0 s keeps a NaN, and clamping keeps it from making one of an infinite s.
        if (k == 0) return {c * s, c + 0 * clamp(s, 0.0, 1.0)};
        return {expm1(k * s) * (c / k), c * exp(k * s)};
    }

    FDU_FUNCTION Value read(double s) const {
        constexpr int neighbours = 8, header = 4;
        const double first = table[0], step = table[1], bottom = table[2], top = table[3];
        const double smallest = table[7];
        const double inside = s < smallest ? smallest : s;
        const double t = (log(inside) - first) / step;
        const double position = clamp(t, bottom, top);
        // A NaN has no place in the table: it takes the first one and stays NaN through its offset.
        int64_t index = position == position ? int64_t(position) : int64_t(bottom);
        index = index > int64_t(top) - 1 ? int64_t(top) - 1 : index;
        const double x = position - double(index);
        double log_value = 0, log_slope = 0;
        for (int i = 0; i < neighbours; ++i) {
            double weight = 1;
            for (int j = 0; j < neighbours; ++j) {
                if (j != i) weight *= (x - (j - 3)) / double(i - j);
            }
            const double* row = table + 2 * (header + index + i - 3);
            log_value += weight * row[0];
            log_slope += weight * row[1];
        }
        const double below = step * (t < bottom ? t - bottom : 0.0);
        // Not s / inside, which is inf / inf for the largest s.
        const double linear = (s > smallest ? smallest : s) / smallest;
        return {exp(log_value) * exp(table[4] * below) * linear, exp(log_slope) * exp(table[5] * below)};
    }
};

// One row over the basis of fdu_kernels.critic.CriticRow, with its fields in their order.
template <class A>
struct Row {
    A constant, linear, square, exp, exp_rate, expm1, expm1_rate, softplus, sigmoid, sigmoid_squared, scale, mix, step,
        threshold;
};

constexpr int row_fields = 14;

template <class A>
FDU_FUNCTION Row<A> read_row(const double* numbers) {
    Row<A> row;
    A* fields = &row.constant;
    for (int i = 0; i < row_fields; ++i) fields[i] = A(numbers[i]);
    return row;
}

// The terms softplus log(1 - m + m e^x) + sigmoid sigma + sigmoid_squared sigma^2 at x = scale v, and their derivative.
template <class A>
struct Logistic {
    A value, slope;
};

template <class A>
FDU_FUNCTION Logistic<A> logistic_terms(const Row<A>& row, A v) {
    const A x = row.scale * v;
    const A size = x > A(0) ? x : -x;
    const Exponential<A> falling = falling_exponential(-size);
    const A near = x > A(0) ? row.mix : A(1) - row.mix, far = A(1) - near;
    const A share = A(1) / (near + far * falling.value), larger = near * share, smaller = falling.value * far * share;
    const A sigma = x > A(0) ? larger : smaller, rest = x > A(0) ? smaller : larger;
    const A softplus = (x > A(0) ? x : A(0)) + falling_log1p(far * falling.less_one);
    // softplus' = sigma (sigma + rest): written so, the softplus and the sigmoid of shifted_log cancel exactly.
    const A inner = row.softplus * sigma + (row.softplus + row.sigmoid) * rest;
    return {
        row.softplus * softplus + sigma * (row.sigmoid + row.sigmoid_squared * sigma),
        row.scale * sigma * (inner + A(2) * row.sigmoid_squared * sigma * rest),
    };
}

}  // namespace
}  // namespace fdu
