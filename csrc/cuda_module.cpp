// The CUDA operations on torch tensors, as part of an extension module.

#include "borrowed.h"
#include "cuda.h"

namespace py = pybind11;

namespace fdu::cuda {

void bind(py::module_& module);

namespace {

// What a launch needs beside tensors; on the stream that torch works on.
struct Surroundings {
    Borrowed workspace;
    Context context;

    Surroundings(const DLTensor& tensor, py::handle workspace_)
        : workspace(workspace_), context{nullptr, workspace.get()} {
        if (exchange->current_work_stream(tensor.device.device_type, tensor.device.device_id, &context.stream)) {
            throw py::error_already_set();
        }
    }
};

bool bind_gaussian(
    py::handle pred, py::handle target, double c, double k, double linear_beyond, py::handle table, py::handle sigma,
    py::handle weight, py::handle mask, bool mean_distance, int reduction, py::handle grad_scale, py::handle value,
    py::handle coefficient, py::handle grad, py::handle distance, py::handle workspace) {
    const Borrowed pred_(pred), target_(target), table_(table), weight_(weight), mask_(mask), value_(value);
    const Borrowed coefficient_(coefficient), grad_(grad), distance_(distance);
    const NumberOrTensor sigma_(sigma), scale_(grad_scale);
    const Surroundings around(*pred_, workspace);
    GaussianCall call{{}, scale_.tensor()};
    Gaussian& of = call.of;
    of.pred = pred_.get();
    of.target = target_.get();
    of.mask = mask_.get();
    of.profile = profile_of(c, k, linear_beyond, table_);
    of.sigma_tensor = sigma_.tensor();
    of.sigma = sigma_.number();
    of.weight = weight_.get();
    of.mean_distance = mean_distance;
    of.reduction = static_cast<Reduction>(reduction);
    of.grad_scale = scale_.number();
    of.value = value_.get();
    of.coefficient = coefficient_.get();
    of.grad = grad_.get();
    of.distance = distance_.get();
    return gaussian(call, around.context);
}

bool bind_gaussian_backward(py::handle pred, py::handle target, py::handle mask, py::handle coefficient, py::handle grad) {
    const Borrowed pred_(pred), target_(target), mask_(mask), coefficient_(coefficient), grad_(grad);
    const Surroundings around(*pred_, py::none());
    return gaussian_backward(*pred_, *target_, mask_.get(), *coefficient_, *grad_, around.context);
}

bool bind_expectation(
    py::handle v, py::tuple numbers, py::handle factor, py::handle mask_total, int reduction, py::handle grad_scale,
    py::handle upstream, py::handle value, py::handle grad, py::handle workspace) {
    const FunctionNumbers function(numbers);
    const Borrowed v_(v), factor_(factor), mask_total_(mask_total), upstream_(upstream);
    const Borrowed value_(value), grad_(grad);
    const NumberOrTensor scale_(grad_scale);
    const Surroundings around(*v_, workspace);
    ExpectationCall call{{}, mask_total_.get(), scale_.tensor()};
    call.of = {v_.get(), nullptr, factor_.get(), function.of, static_cast<Reduction>(reduction), scale_.number(),
               upstream_.get(), value_.get(), grad_.get()};
    return expectation(call, around.context);
}

}  // namespace

void bind(py::module_& module) {
    module.def("cuda_gaussian", &bind_gaussian);
    module.def("cuda_gaussian_backward", &bind_gaussian_backward);
    module.def("cuda_expectation", &bind_expectation);
    module.def("cuda_why_unusable", &why_unusable, "Empty, or why the kernels cannot run on a device of this index.");
    module.attr("CUDA_WORKSPACE") = py::make_tuple(workspace_bytes, workspace_bytes_per_sample);
}

}  // namespace fdu::cuda
