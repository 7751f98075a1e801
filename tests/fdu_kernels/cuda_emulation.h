// What cuda_machine.h is on the host, in tests: the threads of a block are fibers, and barriers are where they change over.
//
// Blocks run one after the other in an order of choice, those of a cluster together. Shared memory begins as NaN. A barrier
// that not all threads reach ends the program.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_work.h"

#define FDU_KERNEL void
#define FDU_DEVICE inline
#define FDU_TASK(type) type
#define FDU_TICKET_MEMORY  // below

namespace fdu {

// The hardware's approximations, which err as much as they may: the bits choose in which direction.
inline double error_at(float x) {
    constexpr double errors[] = {-1, -0.25, 0.25, 1};
    return errors[bit_cast<uint32_t>(x) * 2654435761u >> 30];
}
inline float in_last_places(double exact, double error) {
    int exponent;
    std::frexp(exact, &exponent);
    return float(exact + std::ldexp(error, exponent - 24));
}
inline float hardware_exp2(float x) {
    const float power = in_last_places(std::exp2(double(x)), 2 * error_at(x));
    return power < 0x1p-126f ? 0.0f : power;
}
inline float hardware_log2(float x) { return float(std::log2(double(x)) + 0x1p-22 * error_at(x)); }
inline float hardware_reciprocal(float x) { return in_last_places(1 / double(x), error_at(x)); }
inline float hardware_least(float x, float y) { return std::isnan(x) || x < y ? x : y; }
inline float hardware_greatest(float x, float y) { return std::isnan(x) || x > y ? x : y; }

}  // namespace fdu

namespace fdu::cuda {

struct Emulated {
    int multiprocessors = 3;
    bool clusters = true, capturing = false, backwards = false;
    int64_t launches = 0, wide_accesses = 0, narrow_loads = 0;
    int largest_cluster = 16;  // that there is room for
};
inline Emulated emulated;

struct Barrier {
    int expected = 0, arrived = 0;
    int64_t turn = 0;
};

struct Cluster {
    Barrier barrier;
    std::vector<char*> shared;
};

struct Block {
    int64_t index, blocks;
    int threads, rank, done = 0;
    Cluster* cluster;
    std::vector<char> shared, room;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<double> slots;  // two a thread, for shuffles in turn
};

struct Fiber {
    ucontext_t context;  // for the first start; it lasts over launches
    std::unique_ptr<char[]> stack;
    jmp_buf place;  // where it goes on
    Block* block = nullptr;
    int thread = 0;
    int64_t shuffles = 0;
    Barrier* awaited = nullptr;
    int64_t turn = 0, arrived = 0;  // turns of what is awaited, and of the cluster at its arrival
    bool done = false;
};

inline Fiber* fiber = nullptr;
inline jmp_buf scheduler;

// Changes over from a fiber to the scheduler. swapcontext would do the same with a system call for the mask of signals.
inline void pause() {
    if (!_setjmp(fiber->place)) _longjmp(scheduler, 1);
}

// What a fiber runs.
inline std::function<void()> entry;

inline void run_fiber() {
    for (;;) {
        entry();
        fiber->done = true;
        pause();
    }
}

// Changes over from the scheduler to a fiber.
inline void resume(Fiber& one) {
    constexpr size_t stack = 65536;
    fiber = &one;
    if (_setjmp(scheduler)) return;
    if (one.stack) _longjmp(one.place, 1);
    one.stack.reset(new char[stack]);
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = stack;
    makecontext(&one.context, run_fiber, 0);
    setcontext(&one.context);
}

inline void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.turn;
        return;
    }
    fiber->awaited = &barrier;
    fiber->turn = barrier.turn;
    pause();
}

inline int thread_index() { return fiber->thread; }
inline int block_threads() { return fiber->block->threads; }
inline int64_t block_index() { return fiber->block->index; }
inline int64_t grid_blocks() { return fiber->block->blocks; }
inline void sync_block() { wait(fiber->block->barrier); }
inline void sync_cluster() { wait(fiber->block->cluster->barrier); }
inline void arrive_in_cluster() {
    Barrier& barrier = fiber->block->cluster->barrier;
    fiber->arrived = barrier.turn;
    if (++barrier.arrived < barrier.expected) return;
    barrier.arrived = 0;
    ++barrier.turn;
}
inline void wait_for_cluster() {
    Barrier& barrier = fiber->block->cluster->barrier;
    if (barrier.turn != fiber->arrived) return;
    fiber->awaited = &barrier;
    fiber->turn = barrier.turn;
    pause();
}

template <class T>
T shuffle_xor(T value, int lanes_apart) {
    static_assert(sizeof(T) <= sizeof(double));
    Block& block = *fiber->block;
    const int64_t turn = fiber->shuffles++ % 2 * block.threads;
    memcpy(&block.slots[size_t(turn + fiber->thread)], &value, sizeof(T));
    wait(block.warps[size_t(fiber->thread / warp_size)]);
    T other;
    memcpy(&other, &block.slots[size_t(turn + (fiber->thread ^ lanes_apart))], sizeof(T));
    return other;
}

template <class T>
T& block_shared() {
    static_assert(sizeof(T) <= 4096);
    return *reinterpret_cast<T*>(fiber->block->shared.data());
}

template <class T>
const T& of_rank(T& shared, int rank) {
    Block& block = *fiber->block;
    return *reinterpret_cast<T*>(
        block.cluster->shared[size_t(rank)] + (reinterpret_cast<char*>(&shared) - block.shared.data()));
}

inline void require_aligned(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    std::fprintf(stderr, "an access of %zu bytes at an address that is no multiple\n", bytes);
    std::abort();
}
constexpr bool launches_clusters = true;
inline char* block_room() { return fiber->block->room.data(); }

// Bytes that land as late as they may: when somebody waits for them. Until then NaN stands in their place.
struct Fetched {
    int turn, under_way, bytes;
    void* to[2];
    const void* from[2];
};
inline void make_ready(Fetched& fetched) {
    fetched.turn = -1;
    fetched.under_way = 0;
}
inline void fetch(Fetched& fetched, int bytes, void* to, const void* from, void* other_to, const void* other_from) {
    if (fetched.under_way) {
        std::fprintf(stderr, "a fetch before the last one was waited for\n");
        std::abort();
    }
    fetched = {fetched.turn + 1, 1, bytes, {to, other_to}, {from, other_from}};
    for (int i = 0; i < 2; ++i) {
        require_aligned(fetched.to[i], 16);
        require_aligned(fetched.from[i], 16);
        require_aligned(reinterpret_cast<void*>(intptr_t(bytes)), 16);
        memset(fetched.to[i], 0xff, size_t(bytes));
        emulated.wide_accesses += bytes / 16;
    }
}
inline void wait_for(Fetched& fetched, int turn) {
    for (int times = 0; fetched.turn < turn && times < 1000; ++times) pause();  // until the thread that fetches has come
    if (fetched.turn != turn) {
        std::fprintf(stderr, "what is waited for was not fetched, or something else after it\n");
        std::abort();
    }
    for (int i = 0; i < 2 && fetched.under_way; ++i) memcpy(fetched.to[i], fetched.from[i], size_t(fetched.bytes));
    fetched.under_way = 0;
}

inline bool last_of(unsigned* ticket, unsigned count) {
    const bool last = ++*ticket == count;
    if (last) *ticket = 0;
    return last;
}

inline void see_others() {}
inline double load_fresh(const double* from) { return *from; }

template <int n>
struct Words {
    uint32_t at[n];
};

// Of 16 bytes, or of 8 for a group of elements of two.
template <int n>
Words<n> load_words(const void* from) {
    require_aligned(from, sizeof(Words<n>));
    ++emulated.wide_accesses;
    Words<n> words;
    memcpy(&words, from, sizeof(words));
    return words;
}
template <int n>
void store_words(void* to, Words<n> words) {
    require_aligned(to, sizeof(words));
    ++emulated.wide_accesses;
    memcpy(to, &words, sizeof(words));
}
template <class T>
T load_constant(const T* from) {
    require_aligned(from, sizeof(T));
    ++emulated.narrow_loads;
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}

inline float widen_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                       : exponent     ? std::ldexp(float(digits + 1024), exponent - 25)
                                      : std::ldexp(float(digits), -24);
    return bits & 0x8000 ? -size : size;
}
inline uint16_t narrow_half(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))));
    int exponent;
    const float digits = std::frexp(size, &exponent);
    // 1024 carries into the exponent.
    return uint16_t(sign | uint16_t(((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(digits, 11))) - 1024));
}
inline uint16_t narrow_bfloat(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    return std::isnan(value) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t narrow_halves(float low, float high) {
    return uint32_t(narrow_half(low)) | uint32_t(narrow_half(high)) << 16;
}
inline uint32_t narrow_bfloats(float low, float high) {
    return uint32_t(narrow_bfloat(low)) | uint32_t(narrow_bfloat(high)) << 16;
}

inline void follow(int) {}

inline unsigned ticket_memory[ticket_streams * ticket_count];

struct Device {
    int multiprocessors;
    bool clusters;
    unsigned* tickets;
};

inline const Device& known_device(int, const void*, const unsigned*) {
    static Device device;
    return device = {emulated.multiprocessors, emulated.clusters, ticket_memory};
}
inline bool is_capturing(void*) { return emulated.capturing; }
inline void fill_with_zeros(void* data, size_t bytes, void*) { memset(data, 0, bytes); }

// Three blocks of a multiprocessor, but one that is in a cluster or has room of its own.
inline int64_t at_once(int, const Device& device, const void*, int, int cluster, int room) {
    if (cluster > emulated.largest_cluster) return cluster == 1 ? 3 * device.multiprocessors : 0;
    return cluster == 1 && !room ? 3 * device.multiprocessors : std::max(device.multiprocessors / cluster, 1);
}
inline int64_t last_grid = 0;  // blocks of the last launch

// The blocks of one cluster, all their threads.
inline void run_cluster(int64_t first, int64_t blocks, int threads, int size, int room) {
    static std::deque<Fiber> fibers;  // which stay in their places
    const size_t count = size_t(size) * size_t(threads);
    if (fibers.size() < count) fibers.resize(count);
    Cluster cluster;
    cluster.barrier.expected = int(count);
    std::vector<Block> members(static_cast<size_t>(size));
    for (int rank = 0; rank < size; ++rank) {
        Block& block = members[size_t(rank)];
        block.index = first + rank;
        block.blocks = blocks;
        block.threads = threads;
        block.rank = rank;
        block.cluster = &cluster;
        block.shared.assign(4096, char(0xff));
        block.room.assign(size_t(room), char(0xff));
        block.barrier.expected = threads;
        block.warps.resize(size_t(threads / warp_size));
        for (Barrier& warp : block.warps) warp.expected = warp_size;
        block.slots.resize(size_t(2 * threads));
        cluster.shared.push_back(block.shared.data());
        for (int thread = 0; thread < threads; ++thread) {
            Fiber& one = fibers[size_t(rank * threads + thread)];
            one.block = &block;
            one.thread = thread;
            one.shuffles = 0;
            one.awaited = nullptr;
            one.done = false;
        }
    }
    // Each block goes on alone as far as it can: it is as far ahead of the others as it may ever be.
    bool moved = true;
    for (Block* block = members.data(); moved || block != members.data();) {
        if (block == members.data()) moved = false;
        for (bool again = true; again;) {
            again = false;
            for (int thread = 0; thread < threads; ++thread) {
                Fiber& one = fibers[size_t(block->rank * threads + thread)];
                if (one.done || (one.awaited && one.awaited->turn == one.turn)) continue;
                one.awaited = nullptr;
                resume(one);
                moved = again = true;
                // The shared memory of a block ends with it.
                if (one.done && ++block->done == threads) std::fill(block->shared.begin(), block->shared.end(), char(0xff));
            }
        }
        if (++block == members.data() + size) block = members.data();
    }
    if (std::any_of(fibers.begin(), fibers.begin() + int64_t(count), [](const Fiber& one) { return !one.done; })) {
        std::fprintf(stderr, "threads wait for others that do not come\n");
        std::abort();
    }
}

template <class Task>
void launch(void (*kernel)(Task), int64_t blocks, int threads, int cluster, void*, const Task& task, int room = 0) {
    if (blocks == 0) return;
    const bool fits = threads <= 1024 && room <= 226 << 10 && (cluster == 1 || cluster <= emulated.largest_cluster);
    if (threads % warp_size || blocks % cluster || !fits) throw std::logic_error("a launch that CUDA would refuse");
    ++emulated.launches;
    entry = [&] { kernel(task); };
    last_grid = blocks;
    for (int64_t i = 0; i < blocks / cluster; ++i) {
        const int64_t first = (emulated.backwards ? blocks / cluster - 1 - i : i) * cluster;
        run_cluster(first, blocks, threads, cluster, room);
    }
}

}  // namespace fdu::cuda
