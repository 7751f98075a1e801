// Scalar mathematics of the divergences, shared by host and device: exponentials, the Gaussian profile, one row's terms.
//
// Everything is free of branches on data and every NaN stays a NaN. The functions of a type A take a number, or a vector
// of them for which NumberTraits is specialised. The anonymous namespace gives each translation unit its own copy: units are
// compiled for different instruction sets.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FDU_FUNCTION __host__ __device__ __forceinline__
#else
#define FDU_FUNCTION inline __attribute__((always_inline))
#endif

namespace fdu {

// What a kernel was compiled to rely on: nothing; that the function is one row, whose slope is its derivative, with no term
// but a softplus of logit 0 (jensen_shannon), or of powers of v and exponentials with a finite limit; or that it is two
// rows of one of these kinds, with tilts and a finite limit.
enum class Known { nothing, softplus_alone, exponentials, softplus_pair, exponential_pair };

FDU_FUNCTION constexpr bool is_pair(Known known) { return known == Known::softplus_pair || known == Known::exponential_pair; }
FDU_FUNCTION constexpr bool has_exponentials_alone(Known known) {
    return known == Known::exponentials || known == Known::exponential_pair;
}

// Of the device and its emulation, in a few instructions each: what the hardware has for float. cuda_machine.h has them.
#if defined(__CUDACC__) || defined(FDU_EMULATION)
#if defined(__CUDACC__)
#define FDU_HARDWARE static __device__ __forceinline__
#else
#define FDU_HARDWARE inline
#endif
FDU_HARDWARE float hardware_exp2(float x);        // within 2 ulp; 0 below the normal numbers
FDU_HARDWARE float hardware_log2(float x);        // within 2^-22, for x in (1/2, 2)
FDU_HARDWARE float hardware_reciprocal(float x);  // within 1 ulp, for results that are normal numbers
FDU_HARDWARE float hardware_least(float x, float y);  // NaN if one is
FDU_HARDWARE float hardware_greatest(float x, float y);
#endif
#if defined(__CUDA_ARCH__) || defined(FDU_EMULATION)
#define FDU_HAS_HARDWARE
#endif

namespace {

template <class A>
struct Bits;

template <>
struct Bits<float> {
    using Integer = int32_t;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    static constexpr float log2_high = 0.693145751953125f, log2_low = 1.428606765330187e-6f;
    // Of a falling exponential: there its power of two is the number 0.
    static constexpr float lowest_exponent = -88.0f;
    static constexpr int logarithm_terms = 5;
};

template <>
struct Bits<double> {
    using Integer = int64_t;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double magic = 6755399441055744.0;
    static constexpr double log2_high = 0.6931471803691238, log2_low = 1.9082149292705877e-10;
    static constexpr double lowest_exponent = -709.0;
    static constexpr int logarithm_terms = 11;
};

template <class To, class From>
FDU_FUNCTION To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// What A is made of: itself, where it is a number.
template <class A>
struct NumberTraits {
    using Lane = A;
    using Integer = typename Bits<A>::Integer;
    FDU_FUNCTION static A from(Integer n) { return A(n); }
};

template <class A>
using Lane = typename NumberTraits<A>::Lane;
template <class A>
using Integer = typename NumberTraits<A>::Integer;

template <class A>
FDU_FUNCTION A splat(Lane<A> x) {
    return x - A{};
}

template <class Mask, class A>
FDU_FUNCTION A select(Mask mask, A a, A b) {
    return mask ? a : b;
}

// NaN passes: every comparison with it is false.
template <class A>
FDU_FUNCTION A at_least(A x, Lane<A> low) {
#if defined(FDU_HAS_HARDWARE)
    if constexpr (std::is_same_v<A, float>) return hardware_greatest(x, low);
#endif
    return select(x < low, splat<A>(low), x);
}
template <class A>
FDU_FUNCTION A at_most(A x, Lane<A> high) {
#if defined(FDU_HAS_HARDWARE)
    if constexpr (std::is_same_v<A, float>) return hardware_least(x, high);
#endif
    return select(x > high, splat<A>(high), x);
}
template <class A>
FDU_FUNCTION A clamp(A x, Lane<A> low, Lane<A> high) {
    return at_most(at_least(x, low), high);
}

// a / b, for b whose reciprocal is a normal number.
template <class A>
FDU_FUNCTION A quotient(A a, A b) {
#if defined(FDU_HAS_HARDWARE)
    if constexpr (std::is_same_v<A, float>) return a * hardware_reciprocal(b);
#endif
    return a / b;
}

template <class A>
FDU_FUNCTION A power_of_two(Integer<A> n) {
    using B = Bits<Lane<A>>;
    return bit_cast<A>((n + B::bias) << B::mantissa);
}

// c[0] + c[1] x + ...
template <class A, int terms>
FDU_FUNCTION A polynomial(const double (&c)[terms], A x) {
    A sum = splat<A>(Lane<A>(c[terms - 1]));
#pragma GCC unroll 32
    for (int i = terms - 2; i >= 0; --i) sum = sum * x + Lane<A>(c[i]);
    return sum;
}

// Polynomials of what number type: expm1 is (e^r - 1 - r)/r^2 for |r| <= log(2)/2, softplus -log(1 - t/2)/t for t in
// [0, 1]. Minimax, but for the Taylor polynomial of expm1 in double.
template <class L>
struct Polynomials;

template <>
struct Polynomials<float> {
    template <class A>
    FDU_FUNCTION static A expm1(A r) {
        constexpr double c[] = {0.5, 0.166665481618, 0.0416662991916, 0.00836610276896, 0.00139455568637};
        return polynomial(c, r);
    }
    template <class A>
    FDU_FUNCTION static A softplus(A t) {
        constexpr double c[] = {0.500000011364,    0.124998213157,   0.0417125767549,   0.0151753157992, 0.00842541258004,
                                -0.00318033918534, 0.00982560818113, -0.00662430988971, 0.00281467604628};
        return polynomial(c, t);
    }
};

template <>
struct Polynomials<double> {
    template <class A>
    FDU_FUNCTION static A expm1(A r) {
        constexpr double c[] = {
            1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
            1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800,
        };
        return polynomial(c, r);
    }
    template <class A>
    FDU_FUNCTION static A softplus(A t) {
        constexpr double c[] = {
            0.5,
            0.1249999999999971132,
            0.04166666666708383558,
            0.01562499997608360845,
            0.006250000724990049377,
            0.002604153237906646814,
            0.001116237083686535812,
            0.0004868418713089179305,
            0.0002261672104523180645,
            0.00005390187055238030536,
            0.0002045424918156098042,
            -0.0004340058148411288205,
            0.001015205258977965222,
            -0.001736043657269486452,
            0.002347368256607054755,
            -0.002435960048717676779,
            0.001916817514312360771,
            -0.001104582264580949037,
            0.000441749550253683902,
            -0.0001098493261831488341,
            0.00001296995750961140174,
        };
        return polynomial(c, t);
    }
};

// e^r - 1 for |r| <= log(2)/2, to full relative accuracy.
template <class A>
FDU_FUNCTION A small_expm1(A r) {
    return r + r * r * Polynomials<Lane<A>>::expm1(r);
}

// x = n log 2 + r with |r| <= log(2)/2.
template <class A>
struct Reduced {
    A remainder;
    Integer<A> power;
};

template <class A>
FDU_FUNCTION Reduced<A> reduce_exponent(A x) {
    using L = Lane<A>;
    using B = Bits<L>;
    const A shifted = x * L(1.4426950408889634) + B::magic;
    const A n = shifted - B::magic;
    const Integer<A> power = bit_cast<Integer<A>>(shifted) - bit_cast<typename B::Integer>(B::magic);
    return {(x - n * B::log2_high) - n * B::log2_low, power};
}

// e^x and e^x - 1, both to a few ulp, for |x| <= 87, and 0 and -1 at the lowest exponent.
template <class A>
struct Exponential {
    A value, less_one;

    FDU_FUNCTION explicit Exponential(A x) {
#if defined(FDU_HAS_HARDWARE)
        if constexpr (std::is_same_v<A, float>) {
            // The product's rounding is known exactly, and so is what it did to the power.
            const float product = x * 1.44269504f, power = hardware_exp2(product);
            value = fmaf(power, fmaf(product, -0.693147181f, x), power);
            less_one = fabsf(x) < 0.34657359f ? small_expm1(x) : value - 1.0f;
            return;
        }
#endif
        const Reduced<A> reduced = reduce_exponent(x);
        const A scale = power_of_two<A>(reduced.power), rest = scale * small_expm1(reduced.remainder);
        value = rest + scale;
        less_one = rest + (scale - Lane<A>(1));
    }
};

template <class A>
FDU_FUNCTION A exponential(A x) {
    return Exponential<A>(x).value;
}

// Of any x <= 0; what is far below the normal numbers is 0.
template <class A>
FDU_FUNCTION Exponential<A> falling_exponential(A x) {
    return Exponential<A>(at_least(x, Bits<Lane<A>>::lowest_exponent));
}

template <class A>
FDU_FUNCTION A minus_absolute(A x) {
#if defined(FDU_HAS_HARDWARE)
    if constexpr (std::is_same_v<A, float>) return -fabsf(x);
#endif
    using I = typename Bits<Lane<A>>::Integer;
    return bit_cast<A>(bit_cast<Integer<A>>(x) | I(I(1) << (8 * sizeof(I) - 1)));
}

// artanh(s)/s = 1 + z rest(z) with z = s^2: the first terms of 1/3 + z/5 + z^2/7 + ...
template <int terms, class A>
FDU_FUNCTION A artanh_rest(A z) {
    using L = Lane<A>;
    A sum = splat<A>(L(1.0 / (2 * terms - 1)));
#pragma GCC unroll 32
    for (int i = terms - 1; i >= 2; --i) sum = sum * z + L(1.0 / (2 * i - 1));
    return sum;
}

// log(u) for u in (0, 2], given y = u - 1 as well: to full relative accuracy if both are that accurate.
template <class A>
FDU_FUNCTION A logarithm(A u, A y) {
    using L = Lane<A>;
    using B = Bits<L>;
    using I = typename B::Integer;
    constexpr I root_half = sizeof(L) == 4 ? I(0x3f3504f3) : I(0x3fe6a09e667f3bcd);
    const Integer<A> power = (bit_cast<Integer<A>>(u) - root_half) >> B::mantissa;
    const A mantissa = bit_cast<A>(bit_cast<Integer<A>>(u) - (power << B::mantissa));
    const A f = select(power == I(0), y, mantissa - L(1));
    const A s = quotient(f, L(2) + f), z = s * s;
    const A n = NumberTraits<A>::from(power);
    // log(1 + f) = 2 artanh(s), and 2 s = f - s f.
    return n * B::log2_high + (f - s * (f - L(2) * z * artanh_rest<B::logarithm_terms>(z)) + n * B::log2_low);
}

// Of memory that no kernel writes.
FDU_FUNCTION double load_fixed(const double* from) {
#if defined(__CUDA_ARCH__)
    return __ldg(from);
#else
    return *from;
#endif
}

// Where s lies in the table of a profile, and what the polynomial through its neighbours there is made of.
class TablePlace {
  public:
    static constexpr int neighbours = 8, header = 4;

    FDU_FUNCTION TablePlace(const double* table, double s) : table_(table), s_(s) {
        const double first = load_fixed(table), step = load_fixed(table + 1);
        const double bottom = load_fixed(table + 2), top = load_fixed(table + 3), smallest = load_fixed(table + 7);
        t_ = (log(s < smallest ? smallest : s) - first) / step;
        const double position = clamp(t_, bottom, top);
        // A NaN has no place in the table: it takes the first one and stays NaN through its offset.
        int64_t index = position == position ? int64_t(position) : int64_t(bottom);
        index = index > int64_t(top) - 1 ? int64_t(top) - 1 : index;
        rows_ = table + 2 * (header + index - 3);
        x_ = position - double(index);
    }

    // Of neighbour i: what multiplies its row, the product of (x - j) / (i - j) over the others; log h; log h'.
    FDU_FUNCTION double weight(int i) const {
        constexpr double scales[neighbours] = {-1.0 / 5040, 1.0 / 720, -1.0 / 240, 1.0 / 144,
                                               -1.0 / 144,  1.0 / 240, -1.0 / 720, 1.0 / 5040};
        double weight = scales[0];
#pragma unroll
        for (int j = 1; j < neighbours; ++j) weight = i == j ? scales[j] : weight;
#pragma unroll
        for (int j = 0; j < neighbours; ++j) weight *= i == j ? 1.0 : x_ - (j - 3);
        return weight;
    }
    FDU_FUNCTION double log_value(int i) const { return load_fixed(rows_ + 2 * i); }
    FDU_FUNCTION double log_slope(int i) const { return load_fixed(rows_ + 2 * i + 1); }

    // h and h' by the sums over the neighbours.
    struct Value {
        double value, slope;
    };
    FDU_FUNCTION Value value(double log_value, double log_slope) const {
        const double bottom = load_fixed(table_ + 2), smallest = load_fixed(table_ + 7);
        if (t_ < bottom) {
            const double below = load_fixed(table_ + 1) * (t_ - bottom);
            log_value += load_fixed(table_ + 4) * below;
            log_slope += load_fixed(table_ + 5) * below;
        }
        // Below the smallest s of the table. Not s over what is inside, which is inf / inf for the largest s.
        const double linear = (s_ > smallest ? smallest : s_) / smallest;
        return {exp(log_value) * linear, exp(log_slope)};
    }

  private:
    const double *table_, *rows_;  // rows: from the first neighbour on
    double s_, t_, x_;             // t: log s in steps; x: from the fourth neighbour
};

// h and h' of a Gaussian profile at s.
struct Profile {
    double c, k, linear_beyond;
    const double* table;  // packed as fdu_kernels.profiles.GaussianProfile says, or null

    using Value = TablePlace::Value;

    FDU_FUNCTION Value operator()(double s) const {
        return continued(s, table ? read(inside(s)) : evaluate(inside(s)));
    }

    // Up to where it is evaluated, and the straight line beyond.
    FDU_FUNCTION double inside(double s) const { return s > linear_beyond ? linear_beyond : s; }
    FDU_FUNCTION Value continued(double s, Value h) const {
        if (s > linear_beyond) h.value += h.slope * (s - linear_beyond);
        return h;
    }

    FDU_FUNCTION Value evaluate(double s) const {
        // 0 s keeps a NaN, and clamping keeps it from making one of an infinite s.
        if (k == 0) return {c * s, c + 0 * clamp(s, 0.0, 1.0)};
        return {expm1(k * s) * (c / k), c * exp(k * s)};
    }

  private:
    FDU_FUNCTION Value read(double s) const {
        const TablePlace place(table, s);
        double log_value = 0, log_slope = 0;
        for (int i = 0; i < TablePlace::neighbours; ++i) {
            const double weight = place.weight(i);
            log_value += weight * place.log_value(i);
            log_slope += weight * place.log_slope(i);
        }
        return place.value(log_value, log_slope);
    }
};

// One row over the basis of fdu_kernels.critic.CriticRow, with its fields in their order.
template <class A>
struct Row {
    A constant, linear, square, exp, exp_rate, expm1, expm1_rate, softplus, sigmoid, tanh, tanh_squared, scale, logit, step,
        threshold;
    A mix, rest_of_mix;  // sigmoid(logit), sigmoid(-logit)
};

constexpr int row_fields = 15;

template <class A>
FDU_FUNCTION Row<A> read_row(const double* numbers) {
    Row<A> row;
    A* fields = &row.constant;
    for (int i = 0; i < row_fields; ++i) fields[i] = A(numbers[i]);
    const double logit = numbers[&row.logit - fields];
    row.mix = A(1 / (1 + exp(-logit)));
    row.rest_of_mix = A(1 / (1 + exp(logit)));
    return row;
}

// log((1 + e^x)/2), given e^-|x| and that less 1; to full relative accuracy also near 0.
template <class A>
FDU_FUNCTION A shifted_softplus(A x, const Exponential<A>& falling) {
#if defined(FDU_HAS_HARDWARE)
    if constexpr (std::is_same_v<A, float>) {
        // x/2 and an even rest; or the logarithm, whose error is small beside the value.
        constexpr double even[] = {0.12499963408514915, -0.005205298462924262, 0.0003401914284955045, -2.0057977142682e-5};
        const float near = x * fmaf(x, polynomial(even, x * x), 0.5f);
        const float far = fmaf(hardware_log2(fmaf(0.5f, falling.value, 0.5f)), 0.693147181f, x > 0 ? x : 0.0f);
        return fabsf(x) < 1.25f ? near : far;
    }
#endif
    return falling.less_one * Polynomials<Lane<A>>::softplus(-falling.less_one) + select(x > Lane<A>(0), x, A{});
}

// The terms softplus log(1 - m + m e^x) + sigmoid sigma + tanh T + tanh_squared T^2 at x = scale v, T = 2 sigma - 1, and
// their derivative; without those of T, where they have no coefficient.
template <class A>
struct Logistic {
    A value, slope;
};

template <Known known, bool with_tanh, class A>
FDU_FUNCTION Logistic<A> logistic_terms(const Row<Lane<A>>& row, A v) {
    using L = Lane<A>;
    const A x = row.scale * v;
    A softplus{}, sigma, rest, tanh;  // rest = 1 - sigma
    if (known != Known::nothing || row.logit == 0) {
        const auto positive = x > L(0);
        const Exponential<A> falling = falling_exponential(minus_absolute(x));
        const A whole = L(1) + falling.value;
        if (known != Known::nothing || row.softplus != 0) {
            softplus = shifted_softplus(x, falling);
        }
        if (known == Known::softplus_alone) {
            const A slope = quotient(select(positive, splat<A>(1), falling.value), whole);
            return {row.softplus * softplus, row.softplus * row.scale * slope};
        }
        const A larger = quotient(splat<A>(1), whole), smaller = falling.value * larger;
        sigma = select(positive, larger, smaller);
        rest = select(positive, smaller, larger);
        // Not their difference: near 0 it would have no digits. A quotient, by the reciprocal and a step of Newton's.
        const A below = select(positive, -falling.less_one, falling.less_one), quotient = below * larger;
        tanh = quotient + larger * (below - quotient * whole);
    } else {
        // Which of 1 - m and m e^x is the larger one decides, so that x and the logarithm do not cancel.
        const auto above = x + row.logit > L(0);
        const A near = select(above, splat<A>(row.mix), splat<A>(row.rest_of_mix));
        const A far = select(above, splat<A>(row.rest_of_mix), splat<A>(row.mix));
        const Exponential<A> e(clamp(select(above, -x, x), Bits<L>::lowest_exponent, -Bits<L>::lowest_exponent));
        const A whole = near + far * e.value, share = quotient(splat<A>(1), whole), larger = near * share, smaller = e.value * far * share;
        if (row.softplus != 0) softplus = logarithm(whole, far * e.less_one) + select(above, x, A{});
        sigma = select(above, larger, smaller);
        rest = select(above, smaller, larger);
        tanh = sigma - rest;
    }
    // softplus' = sigma (sigma + rest): written so, the softplus and the sigmoid of shifted_log cancel exactly.
    const A inner = row.softplus * sigma + (row.softplus + row.sigmoid) * rest;
    const A value = row.softplus * softplus + row.sigmoid * sigma;
    if (!with_tanh) return {value, row.scale * sigma * inner};
    // T' = 2 sigma rest and T = sigma - rest: so the two terms of le_cam's A and B cancel exactly.
    const L of_sigma = L(2) * (row.tanh + L(2) * row.tanh_squared), of_rest = L(2) * (row.tanh - L(2) * row.tanh_squared);
    return {
        value + tanh * (row.tanh + row.tanh_squared * tanh),
        row.scale * sigma * (inner + rest * (of_sigma * sigma + of_rest * rest)),
    };
}

}  // namespace
}  // namespace fdu
