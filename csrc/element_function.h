// A function of the density-ratio estimate, as fdu_kernels.critic.ElementFunction states it, for a few elements at once.
//
// An element is a float or double, or a vector of them. The branches depend on the rows alone: all elements take the same.

#pragma once

#include "scalar_math.h"

namespace fdu {

// e^(tilt v) row(v).
template <class L>
struct TiltedRow {
    Row<L> row;
    L tilt, tilted_exp_rate;
};

template <class L>
struct ElementFunction {
    L limit;
    int slope;  // 0: first'(v), 1: the first row itself, 2: the second
    TiltedRow<L> first, second;
};

namespace {

// [limit, slope, first tilt, first row, second tilt, second row]
constexpr size_t function_numbers = 4 + 2 * row_fields;

template <class L>
inline TiltedRow<L> read_tilted_row(const double* numbers) {
    TiltedRow<L> read;
    read.row = read_row<L>(numbers + 1);
    read.tilt = L(numbers[0]);
    read.tilted_exp_rate = L(double(read.row.exp_rate) + numbers[0]);
    return read;
}

template <class L>
inline ElementFunction<L> read_element_function(const double* numbers) {
    return {L(numbers[0]), int(numbers[1]), read_tilted_row<L>(numbers + 2), read_tilted_row<L>(numbers + 3 + row_fields)};
}

// Whether a row has none but the terms of Known::softplus_alone, or of Known::exponentials.
template <class L>
inline bool is_softplus_alone(const Row<L>& row) {
    const L others[] = {row.constant, row.linear, row.square,       row.exp,  row.expm1,
                        row.sigmoid,  row.tanh,   row.tanh_squared, row.step, row.logit};
    for (const L other : others) {
        if (other != 0) return false;
    }
    return true;
}
template <class L>
inline bool has_exponentials_alone(const Row<L>& row) {
    const L others[] = {row.softplus, row.sigmoid, row.tanh, row.tanh_squared, row.step};
    for (const L other : others) {
        if (other != 0) return false;
    }
    return true;
}

template <class L>
inline Known known_of(const ElementFunction<L>& function) {
    const Row<L>&first = function.first.row, &second = function.second.row;
    const bool limited = function.limit < L(INFINITY);
    if (function.slope == 0) {
        if (!limited) return is_softplus_alone(first) ? Known::softplus_alone : Known::nothing;
        return has_exponentials_alone(first) ? Known::exponentials : Known::nothing;
    }
    if (!limited) return Known::nothing;
    if (is_softplus_alone(first) && is_softplus_alone(second)) return Known::softplus_pair;
    return has_exponentials_alone(first) && has_exponentials_alone(second) ? Known::exponential_pair : Known::nothing;
}

template <class A>
FDU_FUNCTION A step_at(const Row<Lane<A>>& row, A v) {
    const A half = splat<A>(Lane<A>(0.5) * row.step);
    return half + select(v > row.threshold, half, A{}) - select(v < row.threshold, half, A{});
}

// The value has the tilt, the slope, which only rows without one are asked for, has not.
template <Known known, bool sloped, int n, class A>
FDU_FUNCTION void evaluate_row(const TiltedRow<Lane<A>>& tilted, const A (&v)[n], A (&value)[n], A (&slope)[n]) {
    using L = Lane<A>;
    const Row<L>& row = tilted.row;
    if (known == Known::softplus_alone || known == Known::softplus_pair) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const Logistic<A> terms = logistic_terms<Known::softplus_alone, false>(row, v[i]);
            value[i] = terms.value;
            if (sloped) slope[i] = terms.slope;
        }
        if (known == Known::softplus_pair && tilted.tilt != 0) {
#pragma unroll
            for (int i = 0; i < n; ++i) value[i] *= exponential(tilted.tilt * v[i]);
        }
        return;
    }
    constexpr bool finite = has_exponentials_alone(known);  // and v is
    // A term without a coefficient is none, also at infinity; a NaN stays one, whatever the terms.
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const A nothing = finite ? A{} : select(v[i] == v[i], A{}, v[i]);
        value[i] = row.constant + nothing;
        if (sloped) slope[i] = row.linear + nothing;
    }
    if (finite || row.linear != 0 || row.square != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) value[i] += v[i] * (row.linear + row.square * v[i]);
    }
    if (sloped && (finite || row.square != 0)) {
#pragma unroll
        for (int i = 0; i < n; ++i) slope[i] += L(2) * row.square * v[i];
    }
    if (row.expm1 != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const Exponential<A> e(row.expm1_rate * v[i]);
            value[i] += row.expm1 * e.less_one;
            if (sloped) slope[i] += row.expm1 * row.expm1_rate * e.value;
        }
    }
    if (!finite && (row.tanh != 0 || row.tanh_squared != 0)) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const Logistic<A> terms = logistic_terms<Known::nothing, true>(row, v[i]);
            value[i] += terms.value;
            if (sloped) slope[i] += terms.slope;
        }
    } else if (!finite && (row.softplus != 0 || row.sigmoid != 0)) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const Logistic<A> terms = logistic_terms<Known::nothing, false>(row, v[i]);
            value[i] += terms.value;
            if (sloped) slope[i] += terms.slope;
        }
    }
    if (!finite && row.step != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) value[i] += step_at(row, v[i]);
    }
    if (known != Known::exponentials && tilted.tilt != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) value[i] *= exponential(tilted.tilt * v[i]);
    }
    if (row.exp != 0) {
        // The tilt joins the exponent: where they cancel, nothing is lost.
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const A term = row.exp * exponential(tilted.tilted_exp_rate * v[i]);
            value[i] += term;
            if (sloped) slope[i] += row.exp_rate * term;
        }
    }
}

// y(v) and, if it is asked for, its slope.
template <Known known, bool sloped, int n, class A>
FDU_FUNCTION void evaluate(const ElementFunction<Lane<A>>& function, const A (&v)[n], A (&value)[n], A (&slope)[n]) {
    if (known == Known::softplus_alone) return evaluate_row<known, sloped>(function.first, v, value, slope);
    // A value depends on the slope beyond the limit alone.
    const bool pair = is_pair(known) || (known == Known::nothing && function.slope != 0);
    const bool limited = known != Known::nothing || function.limit < Lane<A>(INFINITY);
    if (!sloped && !limited && !pair) return evaluate_row<known, false>(function.first, v, value, slope);
    A inside[n];
#pragma unroll
    for (int i = 0; i < n; ++i) inside[i] = clamp(v[i], -function.limit, function.limit);
    if (!pair) {
        evaluate_row<known, true>(function.first, inside, value, slope);
    } else {
        A other[n];
        evaluate_row<known, false>(function.first, inside, value, slope);
        evaluate_row<known, false>(function.second, inside, other, slope);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            slope[i] = function.slope == 1 ? value[i] : other[i];
            value[i] -= other[i];
        }
    }
    if (!limited) return;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        // Not where nothing was clamped: inf - inf is no 0.
        value[i] = select(v[i] == inside[i], value[i], value[i] + slope[i] * (v[i] - inside[i]));
    }
}

}  // namespace
}  // namespace fdu
