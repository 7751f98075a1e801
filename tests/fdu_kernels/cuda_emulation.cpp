// An extension module with the CUDA operations on CPU tensors, computed by the emulation.

#include "cuda_emulation.h"

#include "cuda_module.cpp"
#include "cuda_plan.h"

using namespace fdu::cuda;

PYBIND11_MODULE(cuda_emulation, module) {
    fdu::find_exchange();
    bind(module);
    module.def("machine", [](int multiprocessors, bool clusters, bool capturing, bool backwards) {
        emulated = {multiprocessors, clusters, capturing, backwards};
    });
    module.def("largest_cluster", [](int blocks) { emulated.largest_cluster = blocks; }, "That there is room for.");
    module.def("counts", [] {
        return py::make_tuple(emulated.launches, emulated.wide_accesses, emulated.narrow_loads);
    });
    module.def("blocks", [] { return last_grid; });
    module.def("tickets", [] { return py::memoryview::from_memory(ticket_memory, sizeof ticket_memory); });
    module.def("divide", [](int64_t number, int64_t by) { return divide(number, divisor_of(uint64_t(by))); });
    module.def("on_chip", [](int64_t size, int64_t batch, bool mixed, int64_t vector, int multiprocessors, bool clusters) {
        const Held most = mixed ? held<Mixed> : held<Half>;
        const OnChip place = on_chip(size, batch, vector, most, multiprocessors, clusters, !mixed && size % vector == 0);
        return py::make_tuple(place.elements, place.warps, place.parts);
    });
    module.def("walk", [](int64_t size, int64_t batch, int64_t vector, int64_t resident) {
        const Walk shared = walk(size, batch, vector, resident);
        return py::make_tuple(shared.warps, shared.parts);
    });
}
