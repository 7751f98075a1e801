// Sums on the device in an order that no schedule changes: of a warp, a block, the blocks of a launch.

#pragma once

#include "cuda_elements.cuh"

namespace fdu::cuda {

FDU_DEVICE double warp_sum(double x) {
#pragma unroll
    for (int apart = warp_size / 2; apart > 0; apart /= 2) x += shuffle_xor(x, apart);
    return x;
}

template <bool masked>
FDU_DEVICE Sums warp_sum(Sums sums) {
    return {warp_sum(sums.square), masked ? warp_sum(sums.mask) : 0.0};
}

constexpr int most_warps = 32;

struct SharedSums {
    Sums warps[most_warps];
    Sums block[2];  // in turns
    float coefficients[most_warps];
    double numbers[most_warps];
    bool last;
};

struct SharedTurns {
    SharedSums sums;
    Fetched fetched;
};

// Of all threads of the block, in its first warp.
FDU_DEVICE double block_sum(double x, SharedSums& shared) {
    const int warp = thread_index() / warp_size, lane = thread_index() % warp_size;
    x = warp_sum(x);
    if (lane == 0) shared.numbers[warp] = x;
    sync_block();
    if (warp == 0) x = warp_sum(lane < block_threads() / warp_size ? shared.numbers[lane] : 0.0);
    return x;
}

// Whether this block, whose first thread says so, is the last to come to a ticket; the same for all its threads. What the
// blocks wrote before they came is there for load_fresh.
FDU_DEVICE bool told_to_be_last(bool last, SharedSums& shared) {
    if (thread_index() == 0) {
        if (last) see_others();
        shared.last = last;
    }
    sync_block();
    return shared.last;
}

// Comes to a ticket with all that the block wrote.
FDU_DEVICE bool is_last_block(unsigned* ticket, unsigned count, SharedSums& shared) {
    sync_block();
    return told_to_be_last(thread_index() == 0 && last_of(ticket, count), shared);
}

// The sum of what several blocks left, by one of them, in its first warp.
FDU_DEVICE double sum_of(const double* numbers, int64_t count, SharedSums& shared) {
    constexpr int ahead = 8;  // loads under way
    double sums[ahead] = {}, sum = 0;
    for (int64_t first = thread_index(); first < count; first += int64_t(ahead) * block_threads()) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int64_t at = first + i * block_threads();
            sums[i] += at < count ? load_fresh(numbers + at) : 0.0;
        }
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) sum += sums[i];
    return block_sum(sum, shared);
}

}  // namespace fdu::cuda
