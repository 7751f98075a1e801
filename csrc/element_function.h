// A function of the density-ratio estimate, as fdu_kernels.lowering.ElementFunction states it, for a few elements at once.

#pragma once

#include "scalar_math.h"

namespace fdu {

// e^(tilt v) row(v).
struct TiltedRow {
    Row<float> row;
    float tilt, tilted_exp_rate;
};

struct ElementFunction {
    float limit;
    int slope;  // 0: first'(v), 1: the first row itself, 2: the second
    TiltedRow first, second;
};

inline TiltedRow read_tilted_row(const double* numbers) {
    TiltedRow read;
    read.row = read_row<float>(numbers + 1);
    read.tilt = float(numbers[0]);
    read.tilted_exp_rate = float(double(read.row.exp_rate) + numbers[0]);
    return read;
}

inline ElementFunction read_element_function(const double* numbers) {
    return {float(numbers[0]), int(numbers[1]), read_tilted_row(numbers + 2), read_tilted_row(numbers + 3 + row_fields)};
}

namespace {

FDU_FUNCTION float fast_exponential(float x) {
#if defined(__CUDA_ARCH__)
    // Within 2 ulp, and half as many instructions.
    return expf(x);
#else
    return exponential(x);
#endif
}

// The branches depend on the row alone, so all threads take the same ones.
template <bool sloped, int n>
FDU_FUNCTION void evaluate_row(const TiltedRow& tilted, const float (&v)[n], float (&value)[n], float (&slope)[n]) {
    const Row<float>& row = tilted.row;
    const float tilt = tilted.tilt;
    float factor[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
        value[i] = row.constant + v[i] * (row.linear + row.square * v[i]);
        if (sloped) slope[i] = row.linear + 2 * row.square * v[i];
        factor[i] = 1;
    }
    if (tilt != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            factor[i] = fast_exponential(tilt * v[i]);
            value[i] *= factor[i];
        }
    }
    if (row.exp != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float term = row.exp * fast_exponential(tilted.tilted_exp_rate * v[i]);
            value[i] += term;
            if (sloped) slope[i] += row.exp_rate * term;
        }
    }
    if (row.expm1 != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float x = row.expm1_rate * v[i];
            const float rising = x > 0 ? x : 0.0f, falling = x > 0 ? -x : x;
            const Exponential<float> small = falling_exponential(falling);
            // The factor joins the exponent, so that 0 times inf never arises.
            const float scale = fast_exponential(tilt * v[i] + rising);
            value[i] += row.expm1 * (x > 0 ? -small.less_one : small.less_one) * scale;
            if (sloped) slope[i] += row.expm1 * row.expm1_rate * (x > 0 ? scale : small.value);
        }
    }
    if (row.softplus != 0 || row.sigmoid != 0 || row.sigmoid_squared != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const Logistic<float> terms = logistic_terms(row, v[i]);
            value[i] += terms.value * factor[i];
            if (sloped) slope[i] += terms.slope;
        }
    }
    if (row.step != 0) {
        const float half = 0.5f * row.step;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float term = half + (v[i] > row.threshold ? half : 0.0f) - (v[i] < row.threshold ? half : 0.0f);
            value[i] += term * factor[i];
        }
    }
}

// y(v) and, where it is asked for, its slope.
template <bool sloped, int n>
FDU_FUNCTION void evaluate(const ElementFunction& function, const float (&v)[n], float (&value)[n], float (&slope)[n]) {
    float inside[n];
#pragma unroll
    for (int i = 0; i < n; ++i) inside[i] = clamp(v[i], -function.limit, function.limit);
    if (function.slope == 0) {
        if (sloped || function.limit < INFINITY) {
            evaluate_row<true>(function.first, inside, value, slope);
        } else {
            evaluate_row<false>(function.first, inside, value, slope);
        }
    } else {
        float other[n];
        evaluate_row<false>(function.first, inside, value, slope);
        evaluate_row<false>(function.second, inside, other, slope);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            slope[i] = function.slope == 1 ? value[i] : other[i];
            value[i] -= other[i];
        }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        if (v[i] != inside[i]) value[i] += slope[i] * (v[i] - inside[i]);
    }
}

}  // namespace
}  // namespace fdu
