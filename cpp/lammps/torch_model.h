// What all evaluations of model files through torch share: guards, conversions, and the methods on few numbers.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model.h"
#include "ubmd_error.h"

namespace ubmd {

// The part of an exception's message that says what happened.
std::string essence(const std::exception &exception);

// What every call into a model needs. TorchScript's optimiser is off: it would compile again for every new shape and at
// every second call, and the models spend their time in few large operations.
class Guards {
 public:
  explicit Guards(bool inference) : gradients_(!inference) {
    if (inference) inference_.emplace();
  }

 private:
  torch::jit::GraphOptimizerEnabledGuard no_optimiser_{false};
  at::AutoGradMode gradients_;
  std::optional<c10::InferenceMode> inference_;
};

// Run `work`; torch's errors become a sentence that starts with `what`.
template <typename Work>
auto guarded(const char *what, const std::string &file, bool inference, Work work) -> decltype(work()) {
  const Guards guards(inference);
  try {
    return work();
  } catch (const Error &) {
    throw;
  } catch (const std::exception &exception) {
    throw Error(std::string(what) + " of model file " + file + " failed: " + essence(exception));
  }
}

// A tensor's numbers (float64 on the CPU, times a factor) without a copy where it is one already.
Values view(const torch::Tensor &tensor, double factor = 1.0);
std::vector<double> to_vector(const torch::Tensor &tensor, double factor = 1.0);

// A tensor on the numbers of an array, which must outlive it.
torch::Tensor wrap(const std::vector<double> &values, at::IntArrayRef shape);
torch::Tensor wrap(const std::vector<std::int64_t> &values, at::IntArrayRef shape);

// A loaded module and how it is to be run.
struct Loaded {
  std::string file;
  torch::jit::Module module;
  torch::Device device = torch::kCPU;
  torch::ScalarType dtype = torch::kFloat64;  // of the vectors
  double unit = 1.0;                          // energy unit of the run: one eV in it
  Metadata metadata;
};

class TorchModel : public Model {
 public:
  explicit TorchModel(Loaded loaded);

  double uncertainty(const std::vector<double> &mean, std::vector<double> *weight) override;
  std::vector<double> uncertainties(const std::vector<double> &means, std::vector<double> &weights) override;
  Values force_uncertainties(const std::vector<double> &forces, std::vector<double> *derivative) override;

 protected:
  // The atomic uncertainties of features [n, p], and the derivative of their sum with weights [n].
  Values uncertainties_of(const torch::Tensor &features);
  torch::Tensor uncertainty_derivative(const torch::Tensor &features, const std::vector<double> &weights);

  torch::jit::IValue call(const torch::jit::Method &method, std::vector<torch::jit::IValue> arguments) const {
    return method(std::move(arguments));
  }
  std::int64_t projections() const { return metadata_.projections; }

  Loaded loaded_;

 private:
  torch::jit::Method uncertainty_;
  std::optional<torch::jit::Method> atoms_;       // not of a crystal
  std::optional<torch::jit::Method> of_several_;  // in newer files of networks
};

// The two ways to evaluate: any module, by differentiating forward(); or one with the closed forms of `evaluate`.
std::unique_ptr<Model> make_generic_model(Loaded loaded);
std::unique_ptr<Model> make_block_model(Loaded loaded, std::size_t block_size);

}  // namespace ubmd
