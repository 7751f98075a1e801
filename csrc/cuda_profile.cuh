// The Gaussian profile at one s, by all lanes of a warp: each reads its part of the table.

#pragma once

#include "cuda_sums.cuh"

namespace fdu::cuda {

// As Profile::operator(), whose table one thread would read; the same for all lanes, which have the same s.
FDU_DEVICE Profile::Value profile_of_warp(const Profile& profile, double s) {
    if (!profile.table) {
        Profile closed = profile;
        closed.table = nullptr;
        return closed(s);
    }
    constexpr int neighbours = 8, header = 4;
    // Of the polynomial through the neighbours: 1 / product of (i - j) over j other than i.
    constexpr double scales[neighbours] = {-1.0 / 5040, 1.0 / 720, -1.0 / 240, 1.0 / 144, -1.0 / 144, 1.0 / 240, -1.0 / 720, 1.0 / 5040};
    const double* const table = profile.table;
    const double first = load_constant(table), step = load_constant(table + 1);
    const double bottom = load_constant(table + 2), top = load_constant(table + 3), smallest = load_constant(table + 7);
    const double within = s > profile.linear_beyond ? profile.linear_beyond : s;
    const double t = (log(within < smallest ? smallest : within) - first) / step;
    const double position = clamp(t, bottom, top);
    // A NaN has no place in the table: it takes the first one and stays NaN through its offset.
    int64_t index = position == position ? int64_t(position) : int64_t(bottom);
    index = index > int64_t(top) - 1 ? int64_t(top) - 1 : index;
    const double x = position - double(index);

    const int lane = thread_index() % neighbours;
    double weight = scales[0];
#pragma unroll
    for (int i = 1; i < neighbours; ++i) weight = lane == i ? scales[i] : weight;
#pragma unroll
    for (int j = 0; j < neighbours; ++j) weight *= lane == j ? 1.0 : x - (j - 3);
    const double* const row = table + 2 * (header + index + lane - 3);
    double log_value = weight * load_constant(row), log_slope = weight * load_constant(row + 1);
#pragma unroll
    for (int apart = neighbours / 2; apart > 0; apart /= 2) {
        log_value += shuffle_xor(log_value, apart);
        log_slope += shuffle_xor(log_slope, apart);
    }
    if (t < bottom) {
        const double below = step * (t - bottom);
        log_value += load_constant(table + 4) * below;
        log_slope += load_constant(table + 5) * below;
    }
    // Not s / within, which is inf / inf for the largest s.
    const double linear = (within > smallest ? smallest : within) / smallest;
    Profile::Value h{exp(log_value) * linear, exp(log_slope)};
    if (s > profile.linear_beyond) h.value += h.slope * (s - within);
    return h;
}

}  // namespace fdu::cuda
