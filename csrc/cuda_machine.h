// What the kernels and their launches see of the machine: CUDA's own words, or in tests those of an emulation on the host.

#pragma once

#if defined(FDU_EMULATION)
#include FDU_EMULATION
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda_work.h"

// Registers are stated: the assembler would rather spill some than run fewer threads. 128 of them leave room for 512.
#define FDU_KERNEL __global__ void __maxnreg__(128)
#define FDU_DEVICE __device__ __forceinline__
#define FDU_TASK(type) const __grid_constant__ type

namespace fdu {

FDU_HARDWARE float hardware_exp2(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
FDU_HARDWARE float hardware_log2(float x) {
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
FDU_HARDWARE float hardware_reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
FDU_HARDWARE float hardware_least(float x, float y) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
}
FDU_HARDWARE float hardware_greatest(float x, float y) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
}

}  // namespace fdu

namespace fdu::cuda {

// Zeros between launches. Memory of the module and not of an allocator: what torch hands out while it warms up a graph
// belongs to that graph's pool, and is given to others later.
#define FDU_TICKET_MEMORY static __device__ unsigned ticket_memory[ticket_streams * ticket_count];

FDU_DEVICE int thread_index() { return int(threadIdx.x); }
FDU_DEVICE int block_threads() { return int(blockDim.x); }
FDU_DEVICE int64_t block_index() { return blockIdx.x; }
FDU_DEVICE int64_t grid_blocks() { return gridDim.x; }
FDU_DEVICE void sync_block() { __syncthreads(); }

template <class T>
FDU_DEVICE T shuffle_xor(T value, int lanes_apart) {
    return __shfl_xor_sync(0xffffffffu, value, lanes_apart);
}

template <class T>
FDU_DEVICE T& block_shared() {
    __shared__ T memory;
    return memory;
}

// Bytes on their way to the shared memory of a block, one time after the other. Only for launches that may have clusters.
struct Fetched {
    uint64_t barrier;
};
FDU_DEVICE unsigned shared_address(const void* of) { return unsigned(__cvta_generic_to_shared(of)); }

// By one thread, before others use it.
FDU_DEVICE void make_ready(Fetched& fetched) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&fetched.barrier)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// By one thread, when all have read what was fetched before: as many bytes, a multiple of 16, from either place.
FDU_DEVICE void fetch(Fetched& fetched, int bytes, void* to, const void* from, void* other_to, const void* other_from) {
#if __CUDA_ARCH__ >= 900
    const unsigned barrier = shared_address(&fetched.barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(2 * bytes) : "memory");
    const auto copy = [&](void* to, const void* from) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to)),
                     "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                     : "memory");
    };
    copy(to, from);
    copy(other_to, other_from);
#endif
}

// Until what was fetched the `turn`-th time, from 0 on, is there. By every thread that reads it.
FDU_DEVICE void wait_for(Fetched& fetched, int turn) {
#if __CUDA_ARCH__ >= 900
    unsigned there = 0;
    while (!there) {
        asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
                     : "=r"(there)
                     : "r"(shared_address(&fetched.barrier)), "r"(turn % 2)
                     : "memory");
    }
#endif
}

// What a launch has added to the shared memory of a block.
FDU_DEVICE char* block_room() {
    extern __shared__ uint4 room[];
    return reinterpret_cast<char*>(room);
}

// Code for architectures before 9.0 is never launched with a cluster.
#if defined(__CUDA_ARCH__)
constexpr bool launches_clusters = __CUDA_ARCH__ >= 900;
#else
constexpr bool launches_clusters = true;
#endif
FDU_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
}

// The same in two parts, for threads that have nothing to say to each other: their writes are not waited for.
FDU_DEVICE void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
FDU_DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The same variable of another block of the cluster.
template <class T>
FDU_DEVICE const T& of_rank(T& shared, int rank) {
#if __CUDA_ARCH__ >= 900
    return *cooperative_groups::this_cluster().map_shared_rank(&shared, rank);
#else
    (void)rank;
    return shared;
#endif
}

// Whether this is the last of `count` calls, for see_others. The ticket is left as it was found.
FDU_DEVICE bool last_of(unsigned* ticket, unsigned count) {
    __threadfence();
    return atomicInc(ticket, count - 1) == count - 1;
}

// What the threads of the other calls of last_of wrote before is from now on there for load_fresh.
FDU_DEVICE void see_others() { __threadfence(); }

// Past the first-level cache, which does not see what other multiprocessors write.
FDU_DEVICE double load_fresh(const double* from) { return __ldcg(from); }

// As many as are read or written at once, at an address that is a multiple of their size.
template <int n>
struct Words {
    uint32_t at[n];
};

template <int n>
FDU_DEVICE Words<n> load_words(const void* from) {
    if constexpr (n == 4) {
        const uint4 words = __ldg(static_cast<const uint4*>(from));
        return {{words.x, words.y, words.z, words.w}};
    } else {
        static_assert(n == 2);
        const uint2 words = __ldg(static_cast<const uint2*>(from));
        return {{words.x, words.y}};
    }
}
// Said to be global memory: the compiler cannot know it of a pointer in a task.
FDU_DEVICE void store_words(void* to, Words<2> words) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words.at[0]), "r"(words.at[1])
                 : "memory");
}
FDU_DEVICE void store_words(void* to, Words<4> words) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.at[0]),
                 "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3])
                 : "memory");
}
template <class T>
FDU_DEVICE T load_constant(const T* from) {
    return __ldg(from);
}

FDU_DEVICE float widen_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FDU_DEVICE uint16_t narrow_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
FDU_DEVICE uint16_t narrow_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
FDU_DEVICE uint32_t narrow_halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return uint32_t(__half_as_ushort(both.x)) | uint32_t(__half_as_ushort(both.y)) << 16;
}
FDU_DEVICE uint32_t narrow_bfloats(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return uint32_t(__bfloat16_as_ushort(both.x)) | uint32_t(__bfloat16_as_ushort(both.y)) << 16;
}

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("fdu_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// The caller has made the device PyTorch's current one; this runtime, linked beside PyTorch's, follows.
inline void follow(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

struct Device {
    int multiprocessors;
    bool clusters;
    unsigned* tickets;
};

// Of the current device, looked at once; `kernel` is any kernel that makes use of clusters.
template <class Tickets>
const Device& known_device(int index, const void* kernel, const Tickets& tickets) {
    constexpr int most = 64;
    static Device known[most];
    static std::once_flag once[most];
    if (index < 0 || index >= most) throw std::invalid_argument("fdu_kernels: a device index beyond 63");
    std::call_once(once[index], [&] {
        Device& device = known[index];
        int launches = 0;
        check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index), "the device");
        check(cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, index), "the device");
        check(cudaGetSymbolAddress(reinterpret_cast<void**>(&device.tickets), tickets), "the device");
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, kernel), "the kernels do not fit the device");
        // Code made for an older architecture runs on a newer device, but knows no clusters.
        device.clusters = launches && attributes.ptxVersion >= 90;
    });
    return known[index];
}

inline bool is_capturing(void* stream) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

inline void fill_with_zeros(void* data, size_t bytes, void* stream) {
    check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

// How a kernel is launched; room: bytes that are added to the shared memory of a block.
struct Configuration {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t of{};

    Configuration(int64_t blocks, int threads, int cluster, int room) {
        of.gridDim = dim3(unsigned(blocks));
        of.blockDim = dim3(unsigned(threads));
        of.dynamicSmemBytes = size_t(room);
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(cluster), 1, 1};
        of.attrs = &attribute;
        of.numAttrs = cluster > 1;
    }
    Configuration(const Configuration&) = delete;
};

// Clusters of blocks of a kernel that the current device, of this index, can have under way at once, or blocks where a
// cluster is one. 0 where it has no room for any, as a share of a device (MIG, MPS). Asked once.
inline int64_t at_once(int index, const Device& device, const void* kernel, int threads, int cluster, int room) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int, int>, int64_t> known;
    const std::lock_guard<std::mutex> locked(mutex);
    const auto [place, fresh] = known.try_emplace({index, kernel, threads, cluster, room}, 0);
    if (fresh) {
        int count = 0;
        cudaError_t error = cudaSuccess;
        if (room) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
        if (cluster > 8 && error == cudaSuccess) {
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        }
        if (error == cudaSuccess && cluster > 1) {
            const Configuration configuration(cluster, threads, cluster, room);
            error = cudaOccupancyMaxActiveClusters(&count, kernel, &configuration.of);
        } else if (error == cudaSuccess) {
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, size_t(room));
            count *= device.multiprocessors;
        }
        if (error == cudaSuccess) place->second = count;
        cudaGetLastError();  // a refusal is an answer
    }
    return place->second;
}

template <class Task>
void launch(void (*kernel)(Task), int64_t blocks, int threads, int cluster, void* stream, const Task& task, int room = 0) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::invalid_argument("fdu_kernels: more samples than a grid has blocks");
    Configuration configuration(blocks, threads, cluster, room);
    configuration.of.stream = static_cast<cudaStream_t>(stream);
    void* arguments[] = {const_cast<Task*>(&task)};
    check(cudaLaunchKernelExC(&configuration.of, reinterpret_cast<const void*>(kernel), arguments), "launch of a kernel");
}

}  // namespace fdu::cuda

#endif
