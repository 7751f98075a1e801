// What the operations get from Python: tensors, through the DLPack exchange table of torch.Tensor and without owning them,
// profiles and functions.

#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "element_function.h"

namespace fdu {

inline const DLPackExchangeAPI* exchange = nullptr;

inline void find_exchange() {
    namespace py = pybind11;
    const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    auto* found = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    if (found->header.version.major != DLPACK_MAJOR_VERSION) {
        throw std::runtime_error("this torch speaks another major version of DLPack than the one fdu_kernels was built with");
    }
    exchange = found;
}

// A tensor, or none; valid as long as the caller holds it.
class Borrowed {
  public:
    explicit Borrowed(pybind11::handle object) : given_(!object.is_none()) {
        if (!given_) return;
        if (exchange->dltensor_from_py_object_no_sync(object.ptr(), &tensor_)) throw pybind11::error_already_set();
        if (!tensor_.data) {
            for (int d = 0; d < tensor_.ndim; ++d) {
                if (tensor_.shape[d] == 0) return;
            }
            throw std::invalid_argument("fdu_kernels: a tensor without data");
        }
    }
    const DLTensor* get() const { return given_ ? &tensor_ : nullptr; }
    const DLTensor& operator*() const { return tensor_; }

  private:
    DLTensor tensor_;
    bool given_;
};

// A tensor, or a number.
class NumberOrTensor {
  public:
    explicit NumberOrTensor(pybind11::handle object)
        : is_number_(PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr())),
          tensor_(is_number_ ? pybind11::handle(Py_None) : object),
          number_(is_number_ ? object.cast<double>() : 1.0) {}

    const DLTensor* tensor() const { return tensor_.get(); }
    // 1 beside a tensor.
    double number() const { return number_; }

  private:
    bool is_number_;
    Borrowed tensor_;
    double number_;
};

// A Gaussian profile: two numbers, or a table.
inline Profile profile_of(double c, double k, double linear_beyond, const Borrowed& table) {
    if (!table.get()) return {c, k, linear_beyond, nullptr};
    return {c, k, linear_beyond, static_cast<const double*>((*table).data)};
}

// The numbers of fdu_kernels.critic.ElementFunction.
struct FunctionNumbers {
    double of[function_numbers];

    explicit FunctionNumbers(const pybind11::tuple& numbers) {
        if (numbers.size() != function_numbers) throw std::invalid_argument("fdu_kernels: an ElementFunction has 34 numbers");
        for (size_t i = 0; i < function_numbers; ++i) of[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), i));
        if (PyErr_Occurred()) throw pybind11::error_already_set();
    }
};

}  // namespace fdu
