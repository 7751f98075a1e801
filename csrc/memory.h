// Large outputs in huge pages: a fresh buffer costs a page fault per page, which is more than computing what goes into it.

#pragma once

#include <cstdint>

namespace fdu {

// Advises the kernel, where it lets programs choose. Pages that are already there stay as they are.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace fdu
