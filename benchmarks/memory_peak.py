"""The most bytes of tensors that a call holds at once, beyond what was there before.

On the CPU torch's profiler reports every allocation and every release of its allocator; on a GPU the caching allocator
keeps the peak itself. Memory that is not torch's, such as a few kilobytes of partial sums in C++, is not seen on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENT = "[memory]"


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Of one call, after another that is not counted; what it returns is counted."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = call()
    del kept
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == MEMORY_EVENT]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """That their elements take up."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
