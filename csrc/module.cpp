// The extension module fdu_kernels._C: the operations on torch tensors, and how it was built.
//
// Tensors come through the DLPack exchange table of torch.Tensor, a C interface that costs some tens of nanoseconds per
// tensor; threads through the stable ABI of LibTorch. So one build serves every torch from 2.10 on.

#include <pybind11/pybind11.h>

#include <string>

#include "borrowed.h"
#include "build_info.h"
#include "cpu.h"

namespace py = pybind11;
using fdu::Borrowed;

#if defined(FDU_CUDA)
namespace fdu::cuda {
void bind(py::module_& module);
}
#endif

namespace {

fdu::Reduction reduction_of(int number) { return static_cast<fdu::Reduction>(number); }

int64_t elements(const DLTensor& tensor) {
    int64_t count = 1;
    for (int d = 0; d < tensor.ndim; ++d) count *= tensor.shape[d];
    return count;
}

// Lets other Python threads run where it takes longer than changing over.
template <class F>
void run(const DLTensor& tensor, const F& body) {
    if (elements(tensor) < 65536) return body();
    py::gil_scoped_release released;
    body();
}

void gaussian(
    py::handle pred, py::handle target, double c, double k, double linear_beyond, py::handle table, py::handle sigma,
    py::handle weight, py::handle mask, bool mean_distance, int reduction, double grad_scale, py::handle value,
    py::handle coefficient, py::handle grad, py::handle distance) {
    const Borrowed pred_(pred), target_(target), table_(table), weight_(weight), mask_(mask), value_(value);
    const Borrowed coefficient_(coefficient), grad_(grad), distance_(distance);
    const fdu::NumberOrTensor sigma_(sigma);
    const fdu::Gaussian task{
        pred_.get(), target_.get(), mask_.get(), fdu::profile_of(c, k, linear_beyond, table_), sigma_.tensor(),
        sigma_.number(), weight_.get(), mean_distance, reduction_of(reduction),
        grad_scale, value_.get(), coefficient_.get(), grad_.get(), distance_.get(),
    };
    run(*pred_, [&] { fdu::gaussian(task); });
}

void gaussian_backward(py::handle pred, py::handle target, py::handle mask, py::handle coefficient, py::handle grad) {
    const Borrowed pred_(pred), target_(target), mask_(mask), coefficient_(coefficient), grad_(grad);
    run(*pred_, [&] { fdu::gaussian_backward(*pred_, *target_, mask_.get(), *coefficient_, *grad_); });
}

void expectation(
    py::handle v, py::tuple numbers, py::handle weight, py::handle mask, int reduction, double scale, py::handle upstream,
    py::handle value, py::handle grad) {
    const fdu::FunctionNumbers function(numbers);
    const Borrowed v_(v), weight_(weight), mask_(mask), upstream_(upstream), value_(value), grad_(grad);
    const fdu::Expectation task{v_.get(), weight_.get(), mask_.get(), function.of, reduction_of(reduction), scale,
                                upstream_.get(), value_.get(), grad_.get()};
    run(*v_, [&] { fdu::expectation(task); });
}

py::tuple instruction_sets() {
    const char* names[8];
    const int count = fdu::available_instruction_sets(names);
    py::tuple result(count);
    for (int i = 0; i < count; ++i) result[i] = py::str(names[i]);
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    fdu::find_exchange();
    module.doc() = "The compiled kernels of fdu_kernels. Internal; see fdu_kernels.kernels.native.";
    module.def("gaussian", &gaussian);
    module.def("gaussian_backward", &gaussian_backward);
    module.def("expectation", &expectation);
    module.def("instruction_sets", &instruction_sets, "Those that this machine has, the fastest first.");
    module.def("instruction_set", &fdu::used_instruction_set, "The one in use.");
    module.def(
        "use_instruction_set",
        [](const std::string& name) {
            if (!fdu::use_instruction_set(name.c_str())) throw py::value_error("not an instruction set of this machine: " + name);
        },
        "Compute with another one, in the whole process. For tests.");
#if defined(FDU_CUDA)
    fdu::cuda::bind(module);
#endif
    module.attr("BUILD") = FDU_BUILD;
}
