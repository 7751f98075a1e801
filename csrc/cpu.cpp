// Plans of the CPU operations: which order to walk the elements in, what each thread does, how sums join.
//
// All sums are those of groups of fixed size, joined in their order, so the number of threads does not show in a result.

#include "cpu.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "host.h"
#include "layout.h"

namespace fdu {
namespace {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;
    bool available;
};

const std::array<InstructionSet, 3>& every_instruction_set() {
#if defined(FDU_X86)
    static const std::array<InstructionSet, 3> sets{{
        {"avx512", kernels_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl")},
        {"avx2", kernels_avx2,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
        {"baseline", kernels_baseline, true},
    }};
#else
    static const std::array<InstructionSet, 3> sets{{{"baseline", kernels_baseline, true}}};
#endif
    return sets;
}

const InstructionSet* used = nullptr;

const Kernels& kernels_for(Type type) {
    if (!used) used = std::find_if(every_instruction_set().begin(), every_instruction_set().end(), [](auto& set) { return set.available; });
    return used->kernels[int(type)];
}

// Elements below which a thread is not worth waking.
constexpr int64_t thread_grain = 32768;
constexpr int64_t most_partial_sums = 4096;
// Bytes from which an output asks for huge pages, and from which it goes past the caches.
constexpr int64_t huge_output = int64_t(4) << 20, streamed_output = int64_t(12) << 20;

bool is_wide(const DLTensor& tensor) { return type_of(tensor) == Type::float64; }

float widened(uint16_t bits, Type type) {
    if (type == Type::bfloat16) return bit_cast<float>(uint32_t(bits) << 16);
    const int exponent = (bits >> 10) & 31, digits = bits & 1023;
    const float magnitude = exponent == 31 ? (digits ? NAN : INFINITY)
                            : exponent     ? std::ldexp(float(digits + 1024), exponent - 25)
                                           : std::ldexp(float(digits), -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

double number_at(const Numbers& numbers, int64_t i) {
    if (!numbers.data) return numbers.otherwise;
    const char* at = numbers.data + i * numbers.stride * size_of(numbers.type);
    switch (numbers.type) {
        case Type::float32: return *reinterpret_cast<const float*>(at);
        case Type::float64: return *reinterpret_cast<const double*>(at);
        default: return widened(*reinterpret_cast<const uint16_t*>(at), numbers.type);
    }
}

void write(const DLTensor& tensor, int64_t i, double value) {
    if (is_wide(tensor)) {
        reinterpret_cast<double*>(data_of(tensor))[i] = value;
    } else {
        reinterpret_cast<float*>(data_of(tensor))[i] = float(value);
    }
}

void prepare(
    GaussianWork& work, const DLTensor& pred, const DLTensor& target, const DLTensor* mask, const DLTensor* grad) {
    Placement<Operand> placement(pred);
    // The gradient leads: what is written should be written in its order.
    placement.add(grad, work.grad);
    placement.add(&pred, work.pred);
    placement.add(&target, work.target);
    placement.add(mask, work.mask);
    placement.collapse(1, placement.count, work.space);
    work.size = elements_from(pred, 1);
    work.streams = false;
    if (grad) {
        const int64_t bytes = pred.shape[0] * work.size * size_of(work.grad.type);
        if (bytes >= huge_output) prefer_huge_pages(work.grad.data, bytes);
        work.streams = bytes >= streamed_output;
    }
}

const GaussianKernels& kernels_for(const DLTensor& pred, const DLTensor& target) {
    const Type type = type_of(pred);
    const Kernels& kernels = kernels_for(is_wide(target) ? Type::float64 : type);
    return type == type_of(target) ? kernels.gaussian : kernels.mixed;
}

// What a thread takes at once of `count` pieces of `size` elements each.
int64_t grain_of(int64_t size) { return std::max<int64_t>(1, thread_grain / std::max<int64_t>(size, 1)); }

}  // namespace

void gaussian(const Gaussian& task) {
    const DLTensor& pred = *task.pred;
    GaussianWork work;
    prepare(work, pred, *task.target, task.mask, task.grad);
    const GaussianKernels& kernels = kernels_for(pred, *task.target);
    const int64_t batch = pred.shape[0], size = work.size, groups = divide_up(size, group_size);
    const bool count = task.mean_distance && task.mask;
    const double plain_divisor = task.mean_distance ? double(std::max<int64_t>(size, 1)) : 1.0;
    const Numbers sigma = numbers_of(task.sigma_tensor, task.sigma), weight = numbers_of(task.weight, 1.0);
    const double scale = task.grad_scale / (task.reduction == Reduction::mean ? double(batch) : 1.0);

    // Losses are summed over blocks of samples whose size the shape alone decides.
    const bool reduces = task.reduction != Reduction::none;
    const int64_t block = divide_up(batch, most_partial_sums), blocks = divide_up(batch, block);
    double few_sums[64];
    std::unique_ptr<double[]> many_sums;
    double* block_sums = few_sums;
    if (reduces && blocks > 64) {
        many_sums.reset(new double[blocks]);
        block_sums = many_sums.get();
    }

    const auto sums_of_group = [&](int64_t sample, int64_t group) {
        const int64_t begin = group * group_size;
        return kernels.sums(work, sample, begin, std::min(begin + group_size, size), count);
    };
    const auto grad_of_group = [&](int64_t sample, int64_t group, double factor) {
        const int64_t begin = group * group_size;
        kernels.grad(work, sample, begin, std::min(begin + group_size, size), factor);
    };
    // The sample's loss; its factor of mask (pred - target) in the gradient.
    const auto finish = [&](int64_t sample, Sums sums, double& factor) {
        double divisor = count ? (sums.mask == 0 ? 1.0 : sums.mask) : plain_divisor;
        const double sigma_of = number_at(sigma, sample);
        divisor *= sigma_of * sigma_of;
        const double s = sums.square / divisor;
        const Profile::Value h = task.profile(s);
        const double omega = number_at(weight, sample), loss = omega * h.value;
        factor = omega * 2 * h.slope / divisor;
        if (!reduces) write(*task.value, sample, loss);
        if (task.coefficient) write(*task.coefficient, sample, factor);
        if (task.distance) write(*task.distance, sample, s);
        factor *= scale;
        return loss;
    };

    const int64_t most_threads = batch * size > thread_grain ? threads() : 1;
    const int64_t rounds = divide_up(batch, most_threads);
    // Whole samples per thread read everything once, unless some threads would stand idle.
    if (most_threads == 1 || (rounds * most_threads - batch) * 4 <= batch) {
        parallel_for(blocks, most_threads == 1 ? blocks : grain_of(size * block), [&](int64_t first, int64_t last) {
            for (int64_t b = first; b < last; ++b) {
                double block_sum = 0;
                for (int64_t sample = b * block; sample < std::min((b + 1) * block, batch); ++sample) {
                    Sums sums{0, 0};
                    for (int64_t group = 0; group < groups; ++group) {
                        const Sums part = sums_of_group(sample, group);
                        sums.square += part.square;
                        sums.mask += part.mask;
                    }
                    double factor;
                    block_sum += finish(sample, sums, factor);
                    if (!task.grad) continue;
                    // Backwards: what the sums read last is still in the cache.
                    for (int64_t group = groups - 1; group >= 0; --group) grad_of_group(sample, group, factor);
                }
                if (reduces) block_sums[b] = block_sum;
            }
        });
    } else {
        std::unique_ptr<Sums[]> parts(new Sums[batch * groups]);
        std::unique_ptr<double[]> factors(new double[batch]);
        const int64_t grain = grain_of(std::min(size, group_size));
        parallel_for(batch * groups, grain, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) parts[i] = sums_of_group(i / groups, i % groups);
        });
        for (int64_t b = 0; b < blocks; ++b) {
            double block_sum = 0;
            for (int64_t sample = b * block; sample < std::min((b + 1) * block, batch); ++sample) {
                Sums sums{0, 0};
                for (int64_t group = 0; group < groups; ++group) {
                    sums.square += parts[sample * groups + group].square;
                    sums.mask += parts[sample * groups + group].mask;
                }
                block_sum += finish(sample, sums, factors[sample]);
            }
            if (reduces) block_sums[b] = block_sum;
        }
        if (task.grad) {
            parallel_for(batch * groups, grain, [&](int64_t first, int64_t last) {
                for (int64_t i = last - 1; i >= first; --i) grad_of_group(i / groups, i % groups, factors[i / groups]);
            });
        }
    }
    if (reduces) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += block_sums[b];
        write(*task.value, 0, task.reduction == Reduction::mean ? sum / double(batch) : sum);
    }
}

void gaussian_backward(
    const DLTensor& pred, const DLTensor& target, const DLTensor* mask, const DLTensor& coefficient, const DLTensor& grad) {
    GaussianWork work;
    prepare(work, pred, target, mask, &grad);
    const GaussianKernels& kernels = kernels_for(pred, target);
    const int64_t groups = divide_up(work.size, group_size);
    const Numbers factors = numbers_of(&coefficient, 0.0);
    parallel_for(pred.shape[0] * groups, grain_of(std::min(work.size, group_size)), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = i % groups * group_size, end = std::min(begin + group_size, work.size);
            kernels.grad(work, i / groups, begin, end, number_at(factors, i / groups));
        }
    });
}

namespace {

// Sum of a function of groups of elements, which threads share; `elements`: how many are worth waking one.
template <class F>
double sum_of_groups(int64_t size, int64_t elements, const F& sum_of_range) {
    // Groups grow with the tensor, so that their sums never take up much memory.
    const int64_t group = group_size * std::max<int64_t>(1, divide_up(size, group_size * most_partial_sums));
    const int64_t groups = divide_up(size, group);
    if (groups <= 1) return size ? sum_of_range(0, size) : 0.0;
    std::unique_ptr<double[]> sums(new double[groups]);
    parallel_for(groups, std::max<int64_t>(1, elements / group), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) sums[i] = sum_of_range(i * group, std::min((i + 1) * group, size));
    });
    double sum = 0;
    for (int64_t i = 0; i < groups; ++i) sum += sums[i];
    return sum;
}

// Over all elements of the shape it broadcasts to, each of its own elements read once.
double sum_of_mask(const DLTensor& mask, const DLTensor& like, const Kernels& kernels) {
    // What it broadcasts to may be empty, and then it may have no memory of its own.
    const int64_t copied = elements_from(like, 0);
    if (copied == 0) return 0;
    int64_t shape[max_dims];
    for (int d = 0; d < mask.ndim; ++d) shape[d] = mask.strides[d] == 0 ? 1 : mask.shape[d];
    DLTensor own = mask;
    own.shape = shape;
    Operand operand;
    Placement<Operand> placement(own);
    placement.add(&own, operand);
    Space space;
    placement.collapse(0, 1, space);
    const auto sum = [&](int64_t begin, int64_t end) { return kernels.sum(space, operand, begin, end); };
    const int64_t size = elements_from(own, 0);
    return double(copied / size) * sum_of_groups(size, thread_grain, sum);
}

}  // namespace

void expectation(const Expectation& task) {
    const DLTensor& v = *task.v;
    const Kernels& kernels = kernels_for(type_of(v));
    ElementWork work;
    work.numbers = task.numbers;
    const int64_t size = elements_from(v, 0);
    double divisor = 1;
    if (task.reduction == Reduction::mean) {
        divisor = task.mask ? sum_of_mask(*task.mask, v, kernels) : double(size);
        if (task.mask && divisor == 0) divisor = 1;
    }
    work.scale = task.scale / divisor;
    work.size = size;
    work.sums = task.value && task.reduction != Reduction::none;

    const std::optional<WeightAsMask> weight = task.weight ? std::make_optional<WeightAsMask>(*task.weight, v) : std::nullopt;
    Placement<Operand> placement(v);
    placement.add(task.grad, work.grad);
    placement.add(&v, work.v);
    if (task.reduction == Reduction::none) placement.add(task.value, work.terms);
    placement.add(weight ? weight->get() : task.mask, work.factor);
    placement.add(task.upstream, work.upstream);
    placement.collapse(0, placement.count, work.space);
    for (const Operand* output : {&work.grad, &work.terms}) {
        const int64_t bytes = size * size_of(output->type);
        if (output->data && bytes >= huge_output) prefer_huge_pages(output->data, bytes);
    }
    const auto evaluate = [&](int64_t begin, int64_t end) { return kernels.elements(work, begin, end); };
    const double sum = sum_of_groups(size, group_size, evaluate);
    if (work.sums) write(*task.value, 0, sum / divisor);
}

int available_instruction_sets(const char** names) {
    int count = 0;
    for (const InstructionSet& set : every_instruction_set()) {
        if (set.available) names[count++] = set.name;
    }
    return count;
}

bool use_instruction_set(const char* name) {
    for (const InstructionSet& set : every_instruction_set()) {
        if (set.available && std::strcmp(set.name, name) == 0) {
            used = &set;
            return true;
        }
    }
    return false;
}

const char* used_instruction_set() {
    kernels_for(Type::float32);
    return used->name;
}

}  // namespace fdu
