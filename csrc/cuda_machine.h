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

// Code for architectures before 9.0 is never launched with a cluster.
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

// Whether the current device has room for a cluster of blocks of a kernel, asked once: a share of it (MIG, MPS) may have none.
inline bool takes_clusters(int index, const void* kernel, int threads, int cluster) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int>, bool> known;
    const std::lock_guard<std::mutex> locked(mutex);
    const auto [place, fresh] = known.try_emplace({index, kernel, threads, cluster}, false);
    if (fresh) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(cluster), 1, 1};
        cudaLaunchConfig_t configuration{};
        configuration.gridDim = dim3(unsigned(cluster));
        configuration.blockDim = dim3(unsigned(threads));
        configuration.attrs = &attribute;
        configuration.numAttrs = 1;
        int count = 0;
        place->second = cudaOccupancyMaxActiveClusters(&count, kernel, &configuration) == cudaSuccess && count > 0;
        cudaGetLastError();  // a refusal is an answer
    }
    return place->second;
}

inline bool is_capturing(void* stream) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

inline void fill_with_zeros(void* data, size_t bytes, void* stream) {
    check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

// Blocks of a kernel that the current device, of this index, can have under way at once. Looked at once a kernel.
inline int64_t resident_blocks(int index, const Device& device, const void* kernel, int threads) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int>, int> known;
    const std::lock_guard<std::mutex> locked(mutex);
    const auto [place, is_new] = known.try_emplace({index, kernel, threads}, 1);
    if (is_new) {
        int blocks = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "the occupancy of a kernel");
        if (blocks > 0) place->second = blocks;
    }
    return int64_t(place->second) * device.multiprocessors;
}

template <class Task>
void launch(void (*kernel)(Task), int64_t blocks, int threads, int cluster, void* stream, const Task& task) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::invalid_argument("fdu_kernels: more samples than a grid has blocks");
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(unsigned(blocks));
    configuration.blockDim = dim3(unsigned(threads));
    configuration.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    if (cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(cluster), 1, 1};
        configuration.attrs = &attribute;
        configuration.numAttrs = 1;
    }
    void* arguments[] = {const_cast<Task*>(&task)};
    check(cudaLaunchKernelExC(&configuration, reinterpret_cast<const void*>(kernel), arguments), "launch of a kernel");
}

}  // namespace fdu::cuda

#endif
