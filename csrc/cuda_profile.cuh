// The Gaussian profile at one s, by all lanes of a warp: each reads its part of the table.

#pragma once

#include "cuda_sums.cuh"

namespace fdu::cuda {

// As Profile::operator(), whose table one thread would read; the same for all lanes, which have the same s.
FDU_DEVICE Profile::Value profile_of_warp(const Profile& profile, double s) {
    const double inside = profile.inside(s);
    if (!profile.table) return profile.continued(s, profile.evaluate(inside));
    const TablePlace place(profile.table, inside);
    const int lane = thread_index() % TablePlace::neighbours;
    const double weight = place.weight(lane);
    double log_value = weight * place.log_value(lane), log_slope = weight * place.log_slope(lane);
#pragma unroll
    for (int apart = TablePlace::neighbours / 2; apart > 0; apart /= 2) {
        log_value += shuffle_xor(log_value, apart);
        log_slope += shuffle_xor(log_slope, apart);
    }
    return profile.continued(s, place.value(log_value, log_slope));
}

}  // namespace fdu::cuda
