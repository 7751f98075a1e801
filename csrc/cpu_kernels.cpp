// The CPU kernels over element ranges; compiled once per instruction set, named by FDU_KERNELS.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of those, possibly the one
// that was compiled for an instruction set which this machine lacks.

#include "cpu_kernels.h"
#include "element_function.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fdu {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

constexpr int float_lanes = vector_bytes / 4;
typedef float FloatVector __attribute__((vector_size(vector_bytes)));
typedef double DoubleVector __attribute__((vector_size(vector_bytes)));
typedef uint32_t WordVector __attribute__((vector_size(vector_bytes)));
typedef int32_t SignedVector __attribute__((vector_size(vector_bytes)));
typedef int64_t LongVector __attribute__((vector_size(vector_bytes)));
typedef uint16_t ShortVector __attribute__((vector_size(vector_bytes / 2)));

template <>
struct NumberTraits<FloatVector> {
    using Lane = float;
    using Integer = SignedVector;
    FDU_FUNCTION static FloatVector from(SignedVector n) { return __builtin_convertvector(n, FloatVector); }
};

template <>
struct NumberTraits<DoubleVector> {
    using Lane = double;
    using Integer = LongVector;
    FDU_FUNCTION static DoubleVector from(LongVector n) { return __builtin_convertvector(n, DoubleVector); }
};

template <class T>
FDU_FUNCTION T load_unaligned(const void* from) {
    T value;
    __builtin_memcpy(&value, from, sizeof(T));
    return value;
}

template <class T>
FDU_FUNCTION void store_unaligned(void* to, T value) {
    __builtin_memcpy(to, &value, sizeof(T));
}

// The same past the caches, to an address that is a multiple of the size.
template <class T>
FDU_FUNCTION void stream(void* to, T value) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)value);
#endif
#if defined(__AVX__)
    if constexpr (sizeof(T) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)value);
#endif
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 16) return _mm_stream_si128((__m128i*)to, (__m128i)value);
    if constexpr (sizeof(T) == 8) return _mm_stream_si64((long long*)to, (long long)value);
#endif
    store_unaligned(to, value);
}

// What was streamed becomes visible to other threads no later than what is written from here on.
FDU_FUNCTION void end_of_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// How a dtype is read into a vector of its accumulation dtype, and rounded back.
template <class T>
struct Element;

template <>
struct Element<float> {
    using Accumulator = float;
    using Vector = FloatVector;
    FDU_FUNCTION static Vector load(const float* from) { return load_unaligned<Vector>(from); }
    FDU_FUNCTION static Vector round(Vector value) { return value; }
};

template <>
struct Element<double> {
    using Accumulator = double;
    using Vector = DoubleVector;
    FDU_FUNCTION static Vector load(const double* from) { return load_unaligned<Vector>(from); }
    FDU_FUNCTION static Vector round(Vector value) { return value; }
};

template <>
struct Element<BFloat16> {
    using Accumulator = float;
    using Vector = FloatVector;
    FDU_FUNCTION static Vector load(const BFloat16* from) {
        return (FloatVector)(__builtin_convertvector(load_unaligned<ShortVector>(from), WordVector) << 16);
    }
    FDU_FUNCTION static ShortVector round(Vector value) {
        const WordVector bits = (WordVector)value;
        const WordVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const WordVector nan = (WordVector)(value != value);
        return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), ShortVector);
    }
};

FDU_FUNCTION float widen(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
    // 2^112 moves the exponent's bias; it is exact, for subnormals too.
    float value = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(239) << 23);
    value = magnitude >= (uint32_t(0x7c00) << 13) ? bit_cast<float>(magnitude | 0x7f800000u) : value;
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

FDU_FUNCTION uint16_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (uint32_t(112) << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 1/2 leaves the subnormal's digits, rounded, in the low bits.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < (uint32_t(113) << 23) ? subnormal : normal;
    half = half > 0x7c00 || magnitude >= (uint32_t(143) << 23) ? 0x7c00 : half;
    half = magnitude > 0x7f800000u ? 0x7e00 : half;
    return uint16_t(half | sign);
}

template <>
struct Element<Half> {
    using Accumulator = float;
    using Vector = FloatVector;
    FDU_FUNCTION static Vector load(const Half* from) {
#if defined(__AVX512F__)
        return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
        return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
        Vector value;
        for (int i = 0; i < float_lanes; ++i) value[i] = widen(from[i].bits);
        return value;
#endif
    }
    FDU_FUNCTION static ShortVector round(Vector value) {
#if defined(__AVX512F__)
        return (ShortVector)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
        return (ShortVector)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
        ShortVector half;
        for (int i = 0; i < float_lanes; ++i) half[i] = narrow(value[i]);
        return half;
#endif
    }
};

template <class T>
using Accumulator = typename Element<T>::Accumulator;
template <class T>
using Vector = typename Element<T>::Vector;
template <class T>
constexpr int width = sizeof(Vector<T>) / sizeof(Accumulator<T>);

template <class T>
FDU_FUNCTION void store(T* to, Vector<T> value) {
    store_unaligned(to, Element<T>::round(value));
}

// A partial vector, filled up with zeros.
template <class T>
FDU_FUNCTION Vector<T> load_some(const T* from, int64_t count) {
    T padded[width<T>] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
    return Element<T>::load(padded);
}

template <class T>
FDU_FUNCTION void store_some(T* to, Vector<T> value, int64_t count) {
    T padded[width<T>];
    store<T>(padded, value);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Where in its dimensions an element lies, and the runs along the innermost one that follow it.
struct Walk {
    const Space& space;
    const int64_t* strides;
    int64_t inside;   // in the innermost dimension
    int64_t offset;   // of the run's first element
    int64_t at[max_dims];

    Walk(const Space& walked, const int64_t* walked_strides, int64_t element)
        : space(walked), strides(walked_strides), inside(element), offset(0) {
        if (space.dims < 2) return;
        inside = element % space.sizes[0];
        int64_t rest = element / space.sizes[0];
        for (int d = 1; d < space.dims; ++d) {
            at[d] = rest % space.sizes[d];
            rest /= space.sizes[d];
            offset += at[d] * strides[d];
        }
    }

    int64_t left() const { return space.sizes[0] - inside; }

    void next_run() {
        inside = 0;
        for (int d = 1; d < space.dims; ++d) {
            offset += strides[d];
            if (++at[d] < space.sizes[d]) return;
            offset -= strides[d] * space.sizes[d];
            at[d] = 0;
        }
    }
};

template <class From, class To>
FDU_FUNCTION To convert(From value) {
    return To(value);
}
template <>
FDU_FUNCTION float convert<Half, float>(Half value) {
    return widen(value.bits);
}
template <>
FDU_FUNCTION double convert<Half, double>(Half value) {
    return widen(value.bits);
}
template <>
FDU_FUNCTION float convert<BFloat16, float>(BFloat16 value) {
    return bit_cast<float>(uint32_t(value.bits) << 16);
}
template <>
FDU_FUNCTION double convert<BFloat16, double>(BFloat16 value) {
    return bit_cast<float>(uint32_t(value.bits) << 16);
}
template <>
FDU_FUNCTION Half convert<Half, Half>(Half value) {
    return value;
}
template <>
FDU_FUNCTION BFloat16 convert<BFloat16, BFloat16>(BFloat16 value) {
    return value;
}

// Cut off, with an odd last digit where something is lost: so a second rounding, to a half, is as if it were the only one.
FDU_FUNCTION float cut_to_odd(double value) {
    const float nearest = float(value);
    const double excess = value < 0 ? value - nearest : nearest - value;
    const uint32_t bits = bit_cast<uint32_t>(nearest) - (excess > 0);
    return bit_cast<float>(value == nearest ? bits : bits | 1);
}
template <>
FDU_FUNCTION Half convert<double, Half>(double value) {
    return {narrow(cut_to_odd(value))};
}
template <>
FDU_FUNCTION BFloat16 convert<double, BFloat16>(double value) {
    const uint32_t bits = bit_cast<uint32_t>(cut_to_odd(value));
    return {uint16_t(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0)};
}

template <class From, class To>
void gather_converted(const Space& space, const From* data, const int64_t* strides, int64_t begin, int64_t count, To* to) {
    Walk walk(space, strides, begin);
    const int64_t stride = strides[0];
    for (int64_t done = 0; done < count; walk.next_run()) {
        const From* from = data + walk.offset + walk.inside * stride;
        int64_t length = walk.left();
        length = length < count - done ? length : count - done;
        To* const run = to + done;
        if (stride == 1) {
            for (int64_t i = 0; i < length; ++i) run[i] = convert<From, To>(from[i]);
        } else if (stride == 0) {
            const To value = convert<From, To>(*from);
            for (int64_t i = 0; i < length; ++i) run[i] = value;
        } else {
            for (int64_t i = 0; i < length; ++i) run[i] = convert<From, To>(from[i * stride]);
        }
        done += length;
    }
}

template <class From, class To>
void scatter_converted(
    const Space& space, To* data, const int64_t* strides, int64_t begin, int64_t count, const From* from) {
    Walk walk(space, strides, begin);
    const int64_t stride = strides[0];
    for (int64_t done = 0; done < count; walk.next_run()) {
        To* to = data + walk.offset + walk.inside * stride;
        int64_t length = walk.left();
        length = length < count - done ? length : count - done;
        for (int64_t i = 0; i < length; ++i) to[i * stride] = convert<From, To>(from[done + i]);
        done += length;
    }
}

// The place of `count` elements where they lie one after the other in memory, else null.
template <class T>
FDU_FUNCTION T* adjacent(const Space& space, T* data, const int64_t* strides, int64_t begin, int64_t count) {
    if (strides[0] != 1 && space.sizes[0] > 1) return nullptr;
    if (space.dims < 2) return data + begin;
    const Walk walk(space, strides, begin);
    return count <= walk.left() ? data + walk.offset + walk.inside : nullptr;
}

// `count` elements one after the other: in place, or gathered in the buffer.
template <class T>
const T* gathered(const Space& space, const Operand& operand, int64_t sample, int64_t begin, int64_t count, T* buffer) {
    const T* data = (const T*)operand.data + sample * operand.batch_stride;
    const T* place = adjacent(space, data, operand.strides, begin, count);
    if (place) return place;
    gather_converted<T, T>(space, data, operand.strides, begin, count, buffer);
    return buffer;
}

// The same for an operand of any dtype, converted to the accumulation dtype.
template <class A>
const A* gathered_as(const Space& space, const Operand& operand, int64_t sample, int64_t begin, int64_t count, A* buffer) {
    const int64_t offset = sample * operand.batch_stride;
    const int64_t* strides = operand.strides;
    switch (operand.type) {
        case Type::float16:
            gather_converted(space, (const Half*)operand.data + offset, strides, begin, count, buffer);
            break;
        case Type::bfloat16:
            gather_converted(space, (const BFloat16*)operand.data + offset, strides, begin, count, buffer);
            break;
        case Type::float32:
            if (sizeof(A) == sizeof(float)) return (const A*)gathered(space, operand, sample, begin, count, (float*)buffer);
            gather_converted(space, (const float*)operand.data + offset, strides, begin, count, buffer);
            break;
        case Type::float64:
            if (sizeof(A) == sizeof(double)) return (const A*)gathered(space, operand, sample, begin, count, (double*)buffer);
            gather_converted(space, (const double*)operand.data + offset, strides, begin, count, buffer);
            break;
        case Type::boolean:
            gather_converted(space, (const uint8_t*)operand.data + offset, strides, begin, count, buffer);
            break;
    }
    return buffer;
}

// As Ts: an operand of that dtype; where T is an accumulation dtype, of any.
template <class T>
FDU_FUNCTION const T* gathered_for(
    const Space& space, const Operand& operand, int64_t sample, int64_t begin, int64_t count, T* buffer) {
    if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
        constexpr Type own = sizeof(T) == sizeof(double) ? Type::float64 : Type::float32;
        if (operand.type == own) return gathered(space, operand, sample, begin, count, buffer);
        return gathered_as(space, operand, sample, begin, count, buffer);
    } else {
        return gathered(space, operand, sample, begin, count, buffer);
    }
}

// Spreads `count` elements over an operand of their dtype; doubles over one of any.
template <class T>
void scatter(const Space& space, const Operand& operand, int64_t sample, int64_t begin, int64_t count, const T* from) {
    const int64_t offset = sample * operand.batch_stride;
    const int64_t* strides = operand.strides;
    if constexpr (sizeof(T) == sizeof(double)) {
        switch (operand.type) {
            case Type::float16: return scatter_converted(space, (Half*)operand.data + offset, strides, begin, count, from);
            case Type::bfloat16: return scatter_converted(space, (BFloat16*)operand.data + offset, strides, begin, count, from);
            case Type::float32: return scatter_converted(space, (float*)operand.data + offset, strides, begin, count, from);
            default: break;
        }
    }
    scatter_converted(space, (T*)operand.data + offset, strides, begin, count, from);
}

constexpr int lanes = 64;

// Adds the lanes' sums in double, in an order of its own that is always the same.
template <class A>
FDU_FUNCTION void join(const A* sums, double* joined) {
    for (int i = 0; i < lanes; i += 8) {
        for (int j = 0; j < 8; ++j) joined[j] += double(sums[i + j]);
    }
}

FDU_FUNCTION double total(const double* joined) {
    return ((joined[0] + joined[4]) + (joined[2] + joined[6])) + ((joined[1] + joined[5]) + (joined[3] + joined[7]));
}

// `Other`: what the target is read as, T or its accumulation dtype.
template <class T, class Other, bool masked>
FDU_FUNCTION void add_squares(const T* pred, const Other* target, const Accumulator<T>* mask, int64_t count, double* joined) {
    using A = Accumulator<T>;
    using V = Vector<T>;
    constexpr int w = width<T>, vectors = lanes / w;
    V sums[vectors] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) {
            const V d = Element<T>::load(pred + i + j * w) - Element<Other>::load(target + i + j * w);
            if (masked) {
                sums[j] += Element<A>::load(mask + i + j * w) * d * d;
            } else {
                sums[j] += d * d;
            }
        }
    }
    for (; i < count; i += w) {
        const int64_t left = count - i < w ? count - i : w;
        V d = load_some(pred + i, left) - load_some(target + i, left);
        if (masked) {
            sums[0] += load_some(mask + i, left) * d * d;
        } else {
            sums[0] += d * d;
        }
    }
    alignas(64) A spread[lanes];
    for (int j = 0; j < vectors; ++j) store<A>(spread + j * w, sums[j]);
    join(spread, joined);
}

template <class A>
FDU_FUNCTION void add(const A* values, int64_t count, double* joined) {
    alignas(64) A sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        for (int j = 0; j < lanes; ++j) sums[j] += values[i + j];
    }
    for (int j = 0; i + j < count; ++j) sums[j] += values[i + j];
    join(sums, joined);
}

template <class T, class Other>
Sums gaussian_sums(const GaussianWork& work, int64_t sample, int64_t begin, int64_t end, bool count) {
    using A = Accumulator<T>;
    alignas(64) T pred_buffer[chunk_size];
    alignas(64) Other target_buffer[chunk_size];
    alignas(64) A mask_buffer[chunk_size];
    double squares[8] = {}, masks[8] = {};
    for (int64_t i = begin; i < end; i += chunk_size) {
        const int64_t n = end - i < chunk_size ? end - i : chunk_size;
        const T* pred = gathered_for(work.space, work.pred, sample, i, n, pred_buffer);
        const Other* target = gathered_for(work.space, work.target, sample, i, n, target_buffer);
        if (!work.mask.data) {
            add_squares<T, Other, false>(pred, target, nullptr, n, squares);
            continue;
        }
        const A* mask = gathered_as(work.space, work.mask, sample, i, n, mask_buffer);
        add_squares<T, Other, true>(pred, target, mask, n, squares);
        if (count) add(mask, n, masks);
    }
    return {total(squares), total(masks)};
}

// Where `count` elements of an operand are to be written: in place where they are adjacent, else in the buffer, from which
// finish() spreads them.
template <class T>
struct Output {
    const Space& space;
    const Operand& operand;
    const int64_t sample, begin, count;
    T* const place;
    T* const data;

    FDU_FUNCTION Output(
        const Space& walked, const Operand& written, int64_t first, int64_t length, T* buffer, int64_t of_sample = 0)
        : space(walked), operand(written), sample(of_sample), begin(first), count(length), place(find_place()),
          data(place || !operand.data ? place : buffer) {}

    FDU_FUNCTION T* find_place() const {
        // Of all dtypes only doubles are written where they are of another one.
        if (!operand.data || (sizeof(T) == sizeof(double) && operand.type != Type::float64)) return nullptr;
        return adjacent(space, (T*)operand.data + sample * operand.batch_stride, operand.strides, begin, count);
    }

    FDU_FUNCTION void finish() const {
        if (data != place) scatter(space, operand, sample, begin, count, data);
    }
};

template <class T, class Other, bool masked, bool streams>
void write_grad(
    const T* pred, const Other* target, const Accumulator<T>* mask, int64_t count, Accumulator<T> coefficient, T* grad) {
    using A = Accumulator<T>;
    using V = Vector<T>;
    constexpr int w = width<T>;
    int64_t i = 0;
    for (; i + w <= count; i += w) {
        V d = Element<T>::load(pred + i) - Element<Other>::load(target + i);
        if (masked) d *= Element<A>::load(mask + i);
        if (streams) {
            stream(grad + i, Element<T>::round(coefficient * d));
        } else {
            store<T>(grad + i, coefficient * d);
        }
    }
    if (i < count) {
        V d = load_some(pred + i, count - i) - load_some(target + i, count - i);
        if (masked) d *= load_some(mask + i, count - i);
        store_some(grad + i, coefficient * d, count - i);
    }
}

template <class T, class Other>
void gaussian_grad(const GaussianWork& work, int64_t sample, int64_t begin, int64_t end, double coefficient) {
    using A = Accumulator<T>;
    alignas(64) T pred_buffer[chunk_size], grad_buffer[chunk_size];
    alignas(64) Other target_buffer[chunk_size];
    alignas(64) A mask_buffer[chunk_size];
    using Packed = decltype(Element<T>::round(Vector<T>{}));
    bool streamed = false;
    for (int64_t i = begin; i < end; i += chunk_size) {
        const int64_t n = end - i < chunk_size ? end - i : chunk_size;
        const T* pred = gathered_for(work.space, work.pred, sample, i, n, pred_buffer);
        const Other* target = gathered_for(work.space, work.target, sample, i, n, target_buffer);
        const Output<T> grad(work.space, work.grad, i, n, grad_buffer, sample);
        const bool streams = work.streams && grad.place && (uintptr_t)grad.place % sizeof(Packed) == 0;
        if (work.mask.data) {
            const A* mask = gathered_as(work.space, work.mask, sample, i, n, mask_buffer);
            const auto write = streams ? write_grad<T, Other, true, true> : write_grad<T, Other, true, false>;
            write(pred, target, mask, n, A(coefficient), grad.data);
        } else {
            const auto write = streams ? write_grad<T, Other, false, true> : write_grad<T, Other, false, false>;
            write(pred, target, nullptr, n, A(coefficient), grad.data);
        }
        grad.finish();
        streamed |= streams;
    }
    if (streamed) end_of_stream();
}

template <class V>
FDU_FUNCTION V first_lanes(V value, int64_t count) {
    alignas(64) Lane<V> spread[sizeof(V) / sizeof(Lane<V>)];
    store_unaligned(spread, value);
    return load_some((const Lane<V>*)spread, count);
}

// Vectors that share the branches of a function's terms.
constexpr int at_once = 4;

template <class T, Known known, bool sloped>
double elements_of(const ElementWork& work, int64_t begin, int64_t end) {
    using A = Accumulator<T>;
    using V = Vector<T>;
    constexpr int w = width<T>;
    alignas(64) T v_buffer[chunk_size], grad_buffer[chunk_size];
    alignas(64) A factor_buffer[chunk_size], upstream_buffer[chunk_size], terms_buffer[chunk_size];
    const ElementFunction<A> function = read_element_function<A>(work.numbers);
    const A scale = A(work.scale);
    double joined[8] = {};
    for (int64_t begun = begin; begun < end; begun += chunk_size) {
        const int64_t n = end - begun < chunk_size ? end - begun : chunk_size;
        const T* v = gathered(work.space, work.v, 0, begun, n, v_buffer);
        const A *factor = nullptr, *upstream = nullptr;
        if (work.factor.data) factor = gathered_as(work.space, work.factor, 0, begun, n, factor_buffer);
        if (work.upstream.data) upstream = gathered_as(work.space, work.upstream, 0, begun, n, upstream_buffer);
        const Output<A> terms(work.space, work.terms, begun, n, terms_buffer);
        const Output<T> grad(work.space, work.grad, begun, n, grad_buffer);

        V sums[lanes / w] = {};
        int64_t i = 0;
        for (; i + at_once * w <= n; i += at_once * w) {
            V x[at_once], value[at_once], slope[at_once];
#pragma GCC unroll 4
            for (int j = 0; j < at_once; ++j) x[j] = Element<T>::load(v + i + j * w);
            evaluate<known, sloped>(function, x, value, slope);
#pragma GCC unroll 4
            for (int j = 0; j < at_once; ++j) {
                const int64_t at = i + j * w;
                if (sloped) slope[j] *= scale;
                if (sloped && upstream) slope[j] *= Element<A>::load(upstream + at);
                if (factor) {
                    const V m = Element<A>::load(factor + at);
                    value[j] *= m;
                    if (sloped) slope[j] *= m;
                }
                sums[at / w % (lanes / w)] += value[j];
                if (terms.data) store<A>(terms.data + at, value[j]);
                if (sloped) store<T>(grad.data + at, slope[j]);
            }
        }
        for (; i < n; i += w) {
            const int64_t left = n - i < w ? n - i : w;
            const V x[1] = {load_some(v + i, left)};
            V value[1], slope[1];
            evaluate<known, sloped>(function, x, value, slope);
            if (sloped) slope[0] *= scale;
            if (sloped && upstream) slope[0] *= load_some(upstream + i, left);
            if (factor) {
                const V m = load_some(factor + i, left);
                value[0] *= m;
                if (sloped) slope[0] *= m;
            }
            sums[i / w % (lanes / w)] += first_lanes(value[0], left);
            if (terms.data) store_some(terms.data + i, value[0], left);
            if (sloped) store_some(grad.data + i, slope[0], left);
        }
        if (work.sums) {
            alignas(64) A spread[lanes];
            for (int j = 0; j < lanes / w; ++j) store<A>(spread + j * w, sums[j]);
            join(spread, joined);
        }
        terms.finish();
        grad.finish();
    }
    return total(joined);
}

template <class T, Known known>
double elements_known(const ElementWork& work, int64_t begin, int64_t end) {
    return (work.grad.data ? elements_of<T, known, true> : elements_of<T, known, false>)(work, begin, end);
}

template <class T>
double elements(const ElementWork& work, int64_t begin, int64_t end) {
    const bool alone = known_of(read_element_function<Accumulator<T>>(work.numbers)) == Known::softplus_alone;
    return (alone ? elements_known<T, Known::softplus_alone> : elements_known<T, Known::nothing>)(work, begin, end);
}

template <class A>
double sum(const Space& space, const Operand& operand, int64_t begin, int64_t end) {
    alignas(64) A buffer[chunk_size];
    double joined[8] = {};
    for (int64_t i = begin; i < end; i += chunk_size) {
        const int64_t n = end - i < chunk_size ? end - i : chunk_size;
        add(gathered_as(space, operand, 0, i, n, buffer), n, joined);
    }
    return total(joined);
}

template <class T>
constexpr Kernels table() {
    using A = Accumulator<T>;
    return {{gaussian_sums<T, T>, gaussian_grad<T, T>}, {gaussian_sums<T, A>, gaussian_grad<T, A>}, elements<T>, sum<A>};
}

}  // namespace

extern const Kernels FDU_KERNELS[value_types] = {table<Half>(), table<BFloat16>(), table<float>(), table<double>()};

}  // namespace fdu
