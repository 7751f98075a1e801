// What the CPU backend asks of the machine: PyTorch's threads, and huge pages for large outputs.

#pragma once

#include <cstdint>

namespace fdu {

int64_t threads();

// Calls body(context, begin, end) on ranges that make up [0, count), each of at least `grain`.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
    if (count <= grain) return body(0, count);
    const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    parallel_for(count, grain, call, const_cast<F*>(&body));
}

// Asks for huge pages where Linux lets programs choose: a fresh buffer costs a page fault per page, which is more than
// computing what goes into it. Pages that are already there stay as they are.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace fdu
