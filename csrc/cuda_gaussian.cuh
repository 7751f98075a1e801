// The Gaussian kernels: a sample held on chip, or walked over by several blocks; sums first, then gradients.

#pragma once

#include "cuda_sums.cuh"

namespace fdu::cuda {

// As Profile::operator(), by all lanes of a warp: each reads its part of the table. All have the same s, and the result.
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

// Where the elements of one sample lie: `count` vectors from position `head` on, and fewer than two vectors of others.
template <class T>
struct Sample {
    static constexpr int n = T::lanes;
    int64_t pred, target, grad, mask;  // offsets
    int64_t head, count;
    int edges;

    FDU_DEVICE Sample(const GaussianTask& task, int64_t sample) {
        pred = sample * task.pred.batch_stride;
        target = sample * task.target.batch_stride;
        grad = sample * task.grad.batch_stride;
        mask = sample * task.mask.batch_stride;
        // All operands are equally far from a multiple of n elements.
        const int size_bits = type_in<T>(task.pred) == Type::float32 ? 2 : 1;
        const int64_t beyond = int64_t((reinterpret_cast<uintptr_t>(task.pred.data) >> size_bits) + uint64_t(pred)) & (n - 1);
        head = beyond == 0 ? 0 : n - beyond < task.size ? n - beyond : task.size;
        count = (task.size - head) / n;
        edges = int(task.size - count * n);
    }

    FDU_DEVICE int64_t position(int64_t vector) const { return head + vector * n; }
    FDU_DEVICE int64_t edge_position(int edge) const { return edge < head ? edge : count * n + edge; }
};

// pred - target of `rounds` vectors of n elements, `step` apart. Beyond the end the last one is read again, so that no load
// waits for a branch.
template <int rounds, class T, class Index, int n>
FDU_DEVICE void load_differences(
    const GaussianTask& task, const Sample<T>& sample, Index first, int step, Index count, float (*difference)[n]) {
    const auto position = [&](int r) {
        const Index vector = first + r * step;
        return sample.position(vector < count ? vector : count - 1);
    };
    const Type of_pred = type_in<T>(task.pred), of_target = type_in<T>(task.target);
    // Past branches by dtype the compiler brings no load forward: those of all rounds come first.
    Words<4> pred[rounds], target[rounds];
    if constexpr (std::is_same_v<T, Mixed>) {
        load_vectors<n, rounds>(task.pred.data, of_pred, [&](int r) { return sample.pred + position(r); }, pred);
        load_vectors<n, rounds>(task.target.data, of_target, [&](int r) { return sample.target + position(r); }, target);
    }
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
        float other[n];
        if constexpr (!std::is_same_v<T, Mixed>) {
            pred[r] = load_words<4>(task.pred.data + 16 / n * (sample.pred + position(r)));
            target[r] = load_words<4>(task.target.data + 16 / n * (sample.target + position(r)));
        }
        unpack<n>(pred[r], of_pred, difference[r]);
        unpack<n>(target[r], of_target, other);
#pragma unroll
        for (int i = 0; i < n; ++i) difference[r][i] -= other[i];
    }
}

// The same of one element outside of the vectors.
template <class T>
FDU_DEVICE float load_difference(const GaussianTask& task, const Sample<T>& sample, int64_t position) {
    return load_one(task.pred.data, type_in<T>(task.pred), sample.pred + position) -
           load_one(task.target.data, type_in<T>(task.target), sample.target + position);
}

// Sums of a few elements, each lane for itself.
template <int n>
struct Accumulator {
    static constexpr int width = n < 4 ? n : 4;
    float squares[width] = {}, masks[width] = {};

    // Makes of the difference what the gradient is a multiple of.
    template <bool masked>
    FDU_DEVICE void add(float (&difference)[n], const float (&factor)[n]) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (masked) {
                const float weighted = factor[i] * difference[i];
                squares[i % width] += weighted * difference[i];
                masks[i % width] += factor[i];
                difference[i] = weighted;
            } else {
                squares[i % width] += difference[i] * difference[i];
            }
        }
    }

    FDU_DEVICE Sums sums() const {
        float square = squares[0], mask = masks[0];
#pragma unroll
        for (int i = 1; i < width; ++i) {
            square += squares[i];
            mask += masks[i];
        }
        return {double(square), double(mask)};
    }
};

// The sample's loss, written; returns what its masked differences are multiplied by in the gradient. By one thread, or, if
// `alone`, by all lanes of a warp.
template <bool alone>
FDU_DEVICE float finish_sample(const GaussianTask& task, int64_t sample, Sums sums, bool writes) {
    double divisor = task.count ? (sums.mask == 0 ? 1.0 : sums.mask) : task.divisor;
    const double sigma = number_at(task.sigma, sample), omega = number_at(task.weight, sample);
    divisor *= sigma * sigma;
    const double s = sums.square / divisor;
    const Profile::Value h = alone ? profile_of_warp(task.profile, s) : task.profile(s);
    const double loss = omega * h.value, coefficient = omega * 2 * h.slope / divisor;
    const float scaled = float(coefficient * task.scale * number_at(task.scale_tensor, 0));
    if (writes) {
        if (task.reduction != Reduction::none) {
            task.losses[sample] = loss;
        } else {
            task.value[sample] = float(loss);
        }
        if (task.distance) task.distance[sample] = s;
        if (task.coefficient) task.coefficient[sample] = float(coefficient);
        if (task.scaled_coefficient) task.scaled_coefficient[sample] = scaled;
    }
    return scaled;
}

// The samples of a block are those of its warps, or one.
struct Group {
    int64_t sample;
    int part;             // of the sample, that this block takes
    int thread, threads;  // of those of this block that share the sample

    FDU_DEVICE Group(const GaussianTask& task, int64_t block) {
        part = 0;
        thread = thread_index();
        threads = block_threads();
        if (task.warps == 1) {
            sample = block * (threads / warp_size) + thread / warp_size;
            thread %= warp_size;
            threads = warp_size;
        } else {
            sample = block / task.parts;
            part = int(block % task.parts);
        }
    }
};

// From the sums of the threads of a block to the coefficients of its samples, in shared.coefficients. `clustered`: the
// blocks of a sample are a cluster; `several`: a block may have several samples; `writes`: it is this block that does;
// `turn`: of the block, in which others of its cluster may still read what it left in the one before.
template <bool masked, bool clustered, bool several>
FDU_DEVICE void finish_block(
    const GaussianTask& task, const Group& group, Sums sums, SharedSums& shared, bool writes, int turn = 0) {
    const int warp = thread_index() / warp_size, lane = thread_index() % warp_size, warps = block_threads() / warp_size;
    sums = warp_sum<masked>(sums);
    if (lane == 0) shared.warps[warp] = sums;
    sync_block();
    if (several && task.warps == 1) {
        // One lane a sample.
        const int64_t sample = group.sample + lane;
        if (warp == 0 && lane < warps && sample < task.batch) {
            shared.coefficients[lane] = finish_sample<false>(task, sample, shared.warps[lane], true);
        }
        return sync_block();
    }
    if (warp == 0) {
        sums = warp_sum<masked>(lane < warps ? shared.warps[lane] : Sums{});
        if (clustered && lane == 0) shared.block[turn % 2] = sums;
    }
    if (clustered && task.parts > 1) {
        sync_cluster();
        if (warp == 0) sums = warp_sum<masked>(lane < task.parts ? of_rank(shared.block[turn % 2], lane) : Sums{});
    }
    if (warp == 0) {
        const float coefficient = finish_sample<true>(task, group.sample, sums, writes && lane == 0);
        if (lane == 0) shared.coefficients[0] = coefficient;
    }
    sync_block();
}

// Comes to the ticket of the batch, after finish_block, by the first thread.
FDU_DEVICE bool arrives_last(const GaussianTask& task) {
    return task.reduction != Reduction::none && thread_index() == 0 && last_of(task.tickets, task.finishers);
}

// The reduced loss, by the last block that came.
FDU_DEVICE void reduce_losses(const GaussianTask& task, bool last, SharedSums& shared) {
    if (task.reduction == Reduction::none || !told_to_be_last(last, shared)) return;
    const double sum = sum_of(task.losses, task.batch, shared);
    if (thread_index() == 0) task.value[0] = float(task.reduction == Reduction::mean ? sum / double(task.batch) : sum);
}

// Losses and gradients of samples whose differences stay in registers, `elements` a thread. `late`, for measurements: blocks
// come to their barriers after they have stored the gradient.
template <class T, bool masked, int elements, bool late = false>
FDU_KERNEL gaussian_on_chip(FDU_TASK(GaussianTask) task) {
    constexpr int n = T::lanes, rounds = elements / n;
    // A mask needs registers, too.
    constexpr int at_once = masked && rounds > 4 ? 4 : rounds;
    SharedSums& shared = block_shared<SharedSums>();
    const Group group(task, block_index());
    const Sample<T> sample(task, group.sample < task.batch ? group.sample : task.batch - 1);
    const int thread = group.part * group.threads + group.thread, threads = task.parts * group.threads;
    const int count = int(sample.count);
    const bool has_edge = thread < sample.edges;

    float differences[rounds][n], factors[n], edge[1] = {};
    Accumulator<n> accumulator;
    Accumulator<1> edge_accumulator;
    if (count > 0) {
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int vector = thread + r * threads;
            const bool there = vector < count;
            if (r % at_once == 0) load_differences<at_once>(task, sample, vector, threads, count, differences + r);
            const int64_t position = sample.position(there ? vector : count - 1);
            if (masked) load_factors(task.space, task.mask, sample.mask, position, factors);
#pragma unroll
            for (int i = 0; i < n; ++i) {
                differences[r][i] = there ? differences[r][i] : 0.0f;
                if (masked) factors[i] = there ? factors[i] : 0.0f;
            }
            accumulator.template add<masked>(differences[r], factors);
        }
    }
    if (has_edge) {
        float factor[1];
        const int64_t position = sample.edge_position(thread);
        edge[0] = load_difference(task, sample, position);
        if (masked) load_factors(task.space, task.mask, sample.mask, position, factor);
        edge_accumulator.template add<masked>(edge, factor);
    }
    Sums sums = accumulator.sums();
    sums.square += edge_accumulator.sums().square;
    sums.mask += edge_accumulator.sums().mask;
    finish_block<masked, true, (elements <= held<T>.warp)>(task, group, sums, shared, group.part == 0);
    const auto arrive = [&] {
        if (task.parts > 1) arrive_in_cluster();
        return group.part == 0 && arrives_last(task);
    };
    // Before the gradient is stored: a fence would wait until all of it has reached the memory.
    bool last = !late && arrive();

    if (group.sample < task.batch) {
        const float coefficient = shared.coefficients[task.warps > 1 ? 0 : thread_index() / warp_size];
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int vector = thread + r * threads;
            if (vector >= count) break;
#pragma unroll
            for (int i = 0; i < n; ++i) differences[r][i] *= coefficient;
            store_vector(task.grad.data, type_in<T>(task.grad), sample.grad + sample.position(vector), differences[r]);
        }
        if (has_edge) {
            edge[0] *= coefficient;
            store_one(task.grad.data, type_in<T>(task.grad), sample.grad + sample.edge_position(thread), edge[0]);
        }
    }
    if (late) last = arrive();
    if (group.part == 0) reduce_losses(task, last, shared);
    // Shared memory stays until all have read it.
    if (task.parts > 1) wait_for_cluster();
}

// As gaussian_on_chip, of samples of whole vectors, by clusters that make use of their shared memory. `in_turns`: they take
// one sample after another, and while one is summed up and stored, most of the next is on its way there. Else a sample may
// be twice as large. Either way differences that find no room in registers wait there for their coefficient.
template <class T, bool in_turns>
FDU_KERNEL gaussian_in_clusters(FDU_TASK(GaussianTask) task) {
    constexpr int n = T::lanes, kept = kept_vectors<T>, rounds = cluster_elements<T, in_turns> / n;
    constexpr int step = 16 * chip_threads;
    if (!launches_clusters) return;
    SharedTurns& shared = block_shared<SharedTurns>();
    char *const room = block_room(), *const waiting = room + (in_turns ? 2 * kept * step : 0);
    Group group(task, block_index());
    const int64_t clusters = grid_blocks() / task.parts;
    // The vectors of a sample that are this block's follow each other.
    const int all = int(task.size / n), each = (all + task.parts - 1) / task.parts, first = group.part * each;
    const int bytes = 16 * (all - first < each ? all - first : each), mine = 16 * thread_index();
    const auto place_in = [&](const Operand& operand, int64_t sample) {
        return operand.data + 16 / n * sample * operand.batch_stride + 16 * int64_t(first);
    };
    const auto fetch_from = [&](int64_t sample) {
        if (thread_index() != 0) return;
        const char *pred = place_in(task.pred, sample), *target = place_in(task.target, sample);
        fetch(shared.fetched, bytes < kept * step ? bytes : kept * step, room, pred, room + kept * step, target);
    };
    const auto has = [&](int r) { return mine + r * step < bytes; };
    // Four of the differences that wait.
    const auto waiting_at = [&](int r, int i) { return waiting + mine + ((r - kept) * (n / 4) + i / 4) * step; };

    if (in_turns) {
        if (thread_index() == 0) make_ready(shared.fetched);
        sync_block();
        fetch_from(group.sample);
    }
    bool last = false;
    for (int turn = 0; group.sample < task.batch; ++turn, group.sample += clusters) {
        float differences[kept][n];
        Accumulator<n> accumulator;
        const auto subtract = [&](const Words<4>& pred, const Words<4>& target, float (&difference)[n]) {
            float other[n];
            unpack<n>(pred, T::type, difference);
            unpack<n>(target, T::type, other);
#pragma unroll
            for (int i = 0; i < n; ++i) difference[i] -= other[i];
            accumulator.template add<false>(difference, other);
        };
        const char *pred = place_in(task.pred, group.sample), *target = place_in(task.target, group.sample);
        const auto load = [&](int r, const char* from) {
            return has(r) ? load_words<4>(from + mine + r * step) : Words<4>{};
        };
#pragma unroll
        for (int r = kept; r < rounds; ++r) {
            float difference[n];
            subtract(load(r, pred), load(r, target), difference);
#pragma unroll
            for (int i = 0; i < n; i += 4) memcpy(waiting_at(r, i), difference + i, 16);
        }
        if (in_turns) wait_for(shared.fetched, turn);
#pragma unroll
        for (int r = 0; r < kept; ++r) {
            const auto fetched = [&](const char* from) {
                return has(r) ? *reinterpret_cast<const Words<4>*>(from + mine + r * step) : Words<4>{};
            };
            if (in_turns) {
                subtract(fetched(room), fetched(room + kept * step), differences[r]);
            } else {
                subtract(load(r, pred), load(r, target), differences[r]);
            }
        }
        const bool goes_on = in_turns && group.sample + clusters < task.batch;
        if (goes_on) {
            sync_block();  // all have read what was fetched
            fetch_from(group.sample + clusters);
        }
        finish_block<false, true, false>(task, group, accumulator.sums(), shared.sums, group.part == 0, turn);
        if (!goes_on) {
            if (task.parts > 1) arrive_in_cluster();
            last = group.part == 0 && arrives_last(task);
        }
        const float coefficient = shared.sums.coefficients[0];
        char* const grad = place_in(task.grad, group.sample) + mine;
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            if (!has(r)) break;
            float difference[n];
#pragma unroll
            for (int i = 0; i < n; i += 4) {
                const void* const held = r < kept ? static_cast<void*>(differences[r % kept] + i) : waiting_at(r, i);
                memcpy(difference + i, held, 16);
            }
#pragma unroll
            for (int i = 0; i < n; ++i) difference[i] *= coefficient;
            store_vector(grad + r * step, T::type, 0, difference);
        }
        if (!in_turns) break;
    }
    if (group.part == 0) reduce_losses(task, last, shared.sums);
    // Shared memory stays until all have read it.
    if (task.parts > 1) wait_for_cluster();
}

// Losses and coefficients of samples that several blocks may share.
template <class T, bool masked>
FDU_KERNEL gaussian_sums(FDU_TASK(GaussianTask) task) {
    constexpr int n = T::lanes, rounds = stream_rounds;
    SharedSums& shared = block_shared<SharedSums>();
    const Group group(task, block_index());
    const Sample<T> sample(task, group.sample < task.batch ? group.sample : task.batch - 1);
    const int64_t step = int64_t(rounds) * group.threads;

    Sums sums;
    for (int64_t first = group.part * step; first < sample.count; first += task.parts * step) {
        float differences[rounds][n], factors[n];
        const int64_t mine = first + group.thread;
        load_differences<rounds>(task, sample, mine, group.threads, sample.count, differences);
        Accumulator<n> accumulator;
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int64_t vector = mine + r * group.threads;
            const bool there = vector < sample.count;
            const int64_t position = sample.position(there ? vector : sample.count - 1);
            if (masked) load_factors(task.space, task.mask, sample.mask, position, factors);
#pragma unroll
            for (int i = 0; i < n; ++i) {
                differences[r][i] = there ? differences[r][i] : 0.0f;
                if (masked) factors[i] = there ? factors[i] : 0.0f;
            }
            accumulator.template add<masked>(differences[r], factors);
        }
        const Sums some = accumulator.sums();
        sums.square += some.square;
        sums.mask += some.mask;
    }
    if (group.part == 0 && group.thread < sample.edges) {
        const int64_t position = sample.edge_position(group.thread);
        float edge[1] = {load_difference(task, sample, position)}, factor[1];
        if (masked) load_factors(task.space, task.mask, sample.mask, position, factor);
        Accumulator<1> accumulator;
        accumulator.template add<masked>(edge, factor);
        sums.square += accumulator.sums().square;
        sums.mask += accumulator.sums().mask;
    }
    if (task.parts == 1) {
        finish_block<masked, false, true>(task, group, sums, shared, true);
        return reduce_losses(task, arrives_last(task), shared);
    }

    // The last block of a sample joins the sums of all.
    Sums* const partials = task.partials + group.sample * task.parts;
    sums.square = block_sum(sums.square, shared);
    if (masked) {
        sync_block();
        sums.mask = block_sum(sums.mask, shared);
    }
    if (thread_index() == 0) partials[group.part] = sums;
    if (!is_last_block(task.tickets + 1 + group.sample, unsigned(task.parts), shared)) return;
    sums = {};
    for (int part = thread_index(); part < task.parts; part += block_threads()) {
        sums.square += load_fresh(&partials[part].square);
        if (masked) sums.mask += load_fresh(&partials[part].mask);
    }
    finish_block<masked, false, false>(task, group, sums, shared, true);
    reduce_losses(task, arrives_last(task), shared);
}

// Gradients from coefficients, the last elements first: what gaussian_sums read last may still be in the cache.
template <class T, bool masked>
FDU_KERNEL gaussian_gradient(FDU_TASK(GaussianTask) task) {
    constexpr int n = T::lanes, rounds = stream_rounds;
    const Group group(task, grid_blocks() - 1 - block_index());
    if (group.sample >= task.batch) return;
    const Sample<T> sample(task, group.sample);
    const float coefficient = load_constant(task.coefficient_in + group.sample * task.coefficient_in_stride);
    const int64_t step = int64_t(rounds) * group.threads, stride = task.parts * step;

    const int64_t reached = sample.count - group.part * step;
    const int64_t turns = reached > 0 ? (reached + stride - 1) / stride : 0;
    for (int64_t turn = turns - 1; turn >= 0; --turn) {
        const int64_t first = group.part * step + turn * stride + group.thread;
        float differences[rounds][n];
        load_differences<rounds>(task, sample, first, group.threads, sample.count, differences);
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int64_t vector = first + r * group.threads;
            float factors[n];
            if (masked) {
                const int64_t position = sample.position(vector < sample.count ? vector : sample.count - 1);
                load_factors(task.space, task.mask, sample.mask, position, factors);
            }
#pragma unroll
            for (int i = 0; i < n; ++i) {
                if (masked) differences[r][i] *= factors[i];
                differences[r][i] *= coefficient;
            }
        }
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int64_t vector = first + r * group.threads;
            if (vector < sample.count) {
                store_vector(task.grad.data, type_in<T>(task.grad), sample.grad + sample.position(vector), differences[r]);
            }
        }
    }
    if (group.part == 0 && group.thread < sample.edges) {
        const int64_t position = sample.edge_position(group.thread);
        float edge[1] = {load_difference(task, sample, position)}, factor[1];
        if (masked) {
            load_factors(task.space, task.mask, sample.mask, position, factor);
            edge[0] *= factor[0];
        }
        edge[0] *= coefficient;
        store_one(task.grad.data, type_in<T>(task.grad), sample.grad + position, edge[0]);
    }
}

}  // namespace fdu::cuda
