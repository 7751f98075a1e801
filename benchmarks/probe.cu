// Times variants of the kernel that holds samples on chip: elements per thread, threads per block, blocks per cluster,
// blocks that come to their barriers before or after they store the gradient, and clusters that fetch their next sample
// ahead. Prints a line of JSON per variant.
//
// gpu_probe.py compiles and runs it: probe MEGABYTES ROUNDS SIZE... A rehearsal compiles it for the host, with the
// emulation of the tests.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "cuda_gaussian.cuh"
#include "cuda_launch.h"

#if defined(FDU_EMULATION)
#include <chrono>
#endif

namespace fdu::cuda {
namespace {

#if defined(FDU_EMULATION)

void* room(size_t bytes, int filling) { return memset(std::malloc(bytes), filling, bytes); }
void fetch(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
Device this_device() { return {3, true, nullptr}; }

template <class F>
double microseconds(const F& run) {
    const auto began = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - began).count();
}

#else

void* room(size_t bytes, int filling) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "memory");
    check(cudaMemset(data, filling, bytes), "memory");
    return data;
}
void fetch(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "a variant");
}
void copy(void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr), "a copy");
}
Device this_device() {
    Device device{};
    int launches = 0;
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, 0), "the device");
    check(cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, 0), "the device");
    device.clusters = launches;
    return device;
}

template <class F>
double microseconds(const F& run) {
    cudaEvent_t start, end;
    check(cudaEventCreate(&start), "an event");
    check(cudaEventCreate(&end), "an event");
    check(cudaEventRecord(start, nullptr), "an event");
    run();
    check(cudaEventRecord(end, nullptr), "an event");
    check(cudaEventSynchronize(end), "a variant");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, end), "an event");
    return 1e3 * milliseconds;
}

#endif

// The shortest of some runs, after one that is not timed.
template <class F>
double shortest(int rounds, const F& run) {
    microseconds(run);
    double found = INFINITY;
    for (int round = 0; round < rounds; ++round) found = std::min(found, microseconds(run));
    return found;
}

// All bytes of pred, and of target: in either dtype all elements are then the same number.
constexpr int pred_byte = 0x3f, target_byte = 0x3e;

struct Memory {
    size_t bytes;
    void *pred, *target, *grad;
    unsigned* tickets;
    double* losses;
    float* value;

    explicit Memory(size_t bytes_)
        : bytes(bytes_), pred(room(bytes, pred_byte)), target(room(bytes, target_byte)), grad(room(bytes, 0)),
          tickets(static_cast<unsigned*>(room(4 * ticket_count, 0))),
          losses(static_cast<double*>(room(8 * (bytes / 256 + 1), 0))), value(static_cast<float*>(room(4, 0))) {}
};

// Squared Hellinger, mean over the batch, of samples one after the other.
template <class T>
GaussianTask task_of(const Memory& memory, int64_t size) {
    const int64_t width = T::type == Type::float32 ? 4 : 2;
    GaussianTask task{};
    task.size = size;
    task.batch = int64_t(memory.bytes) / (size * width);
    Operand* const operands[] = {&task.pred, &task.target, &task.grad};
    void* const data[] = {memory.pred, memory.target, memory.grad};
    for (int i = 0; i < 3; ++i) {
        operands[i]->data = static_cast<char*>(data[i]);
        operands[i]->type = T::type;
        operands[i]->batch_stride = size;
        operands[i]->strides[0] = 1;
    }
    task.profile = {0.125, -0.125, 512.0, nullptr};
    task.divisor = double(size);
    task.scale = 1 / double(task.batch);
    task.reduction = Reduction::mean;
    task.value = memory.value;
    task.tickets = memory.tickets;
    task.losses = memory.losses;
    return task;
}

// Whether the loss is right, and the gradient at both ends.
template <class T>
bool is_right(const Memory& memory, const GaussianTask& task) {
    const size_t width = T::type == Type::float32 ? 4 : 2;
    const uint32_t repeated = width == 4 ? 0x01010101 : 0x0101;
    const auto number = [&](uint32_t word) { return double(bit_cast<float>(width == 4 ? word : word << 16)); };
    const double difference = number(pred_byte * repeated) - number(target_byte * repeated);
    const double s = difference * difference;
    const double loss = -std::expm1(-s / 8), elements = double(task.size) * double(task.batch);
    const double slope = difference * std::exp(-s / 8) / 4 / elements;
    float value;
    uint32_t first = 0, last = 0;
    fetch(&value, memory.value, 4);
    fetch(&first, memory.grad, width);
    fetch(&last, static_cast<char*>(memory.grad) + memory.bytes - width, width);
    const double allowed = (width == 4 ? 1e-5 : 1e-2) * slope;
    return std::fabs(double(value) - loss) <= 1e-5 * loss && std::fabs(number(first) - slope) <= allowed &&
           std::fabs(number(last) - slope) <= allowed;
}

// When blocks come to their barriers; ahead: early, and in clusters that fetch their next sample meanwhile.
enum class Arrival { early, late, ahead };

template <class T, int elements, Arrival arrival>
void time_variant(const Memory& memory, int64_t size, int cluster, int rounds) {
    constexpr bool ahead = arrival == Arrival::ahead;
    const Device device = this_device();
    GaussianTask task = task_of<T>(memory, size);
    const int64_t threads = ahead ? chip_threads : size / elements / cluster, most = threads * elements * cluster;
    if (threads < 2 * warp_size || threads > chip_threads || threads % warp_size) return;
    if (ahead ? !device.clusters || size > most || (cluster > 1 && 2 * size < most) : size != most) return;
    GaussianKernel kernel = gaussian_on_chip<T, false, elements, arrival == Arrival::late>;
    if (ahead) kernel = gaussian_in_clusters<T, true>;
    const int room = ahead ? cluster_room<T, true> : 0;
    const int64_t clusters = at_once(0, device, reinterpret_cast<const void*>(kernel), int(threads), cluster, room);
    if (clusters == 0) return;
    task.warps = int(threads / warp_size);
    task.parts = cluster;
    task.finishers = unsigned(ahead ? std::min(task.batch, clusters) : task.batch);
    copy(memory.grad, memory.pred, memory.bytes);  // what an earlier variant wrote must not count
    copy(memory.value, memory.pred, 4);
    const double taken = shortest(rounds, [&] {
        launch(kernel, int64_t(task.finishers) * cluster, int(threads), cluster, nullptr, task, room);
    });
    constexpr const char* names[] = {"early", "late", "ahead"};
    std::printf("{\"dtype\": \"%s\", \"size\": %lld, \"elements\": %d, \"threads\": %d, \"cluster\": %d, "
                "\"arrival\": \"%s\", \"us\": %.3f, \"right\": %s}\n",
                T::type == Type::float32 ? "float32" : "bfloat16", static_cast<long long>(size), elements, int(threads),
                cluster, names[int(arrival)], taken, is_right<T>(memory, task) ? "true" : "false");
    std::fflush(stdout);
}

template <class T>
void time_variants(const Memory& memory, int64_t size, int rounds) {
    for (int cluster = 1; cluster <= (this_device().clusters ? most_cluster : 1); cluster *= 2) {
        time_variant<T, 16, Arrival::early>(memory, size, cluster, rounds);
        time_variant<T, 16, Arrival::late>(memory, size, cluster, rounds);
        time_variant<T, 32, Arrival::early>(memory, size, cluster, rounds);
        time_variant<T, 32, Arrival::late>(memory, size, cluster, rounds);
        time_variant<T, 64, Arrival::early>(memory, size, cluster, rounds);
        time_variant<T, 64, Arrival::late>(memory, size, cluster, rounds);
        time_variant<T, 64, Arrival::ahead>(memory, size, cluster, rounds);
    }
}

}  // namespace
}  // namespace fdu::cuda

int main(int count, char** given) {
    using namespace fdu::cuda;
    try {
        const Memory memory(size_t(std::atof(given[1]) * 0x1p20));
        const int rounds = std::atoi(given[2]);
        const double copied = shortest(rounds, [&] { copy(memory.grad, memory.pred, memory.bytes); });
        std::printf("{\"copy_us\": %.3f}\n", copied);
        for (int i = 3; i < count; ++i) {
            time_variants<fdu::cuda::Float>(memory, std::atoll(given[i]), rounds);
            time_variants<fdu::cuda::BFloat16>(memory, std::atoll(given[i]), rounds);
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
