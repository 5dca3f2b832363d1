#include "model.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/cuda.h>
#include <torch/script.h>

#include <fstream>
#include <functional>

#include "device.h"
#include "ubmd_error.h"

namespace ubmd {
namespace {

// torch's messages carry C++ and TorchScript traces; the part that says what happened is the last line with text.
std::string essence(const std::exception &exception) {
  const auto *torch_error = dynamic_cast<const c10::Error *>(&exception);
  std::string text = torch_error ? torch_error->what_without_backtrace() : exception.what();
  const auto runtime = text.rfind("RuntimeError: ");
  if (runtime != std::string::npos) text = text.substr(runtime + 14);
  const auto first = text.find_first_not_of(" \n");
  if (first == std::string::npos) return "no reason given";
  return text.substr(first, text.find('\n', first) - first);
}

// Run `work` with what every call into the model needs. TorchScript's optimiser is off: it would compile anew for
// every new shape and at every second call, and the models spend their time in few large operations.
template <typename Work>
auto guarded(const std::string &what, Work work) -> decltype(work()) {
  torch::jit::GraphOptimizerEnabledGuard no_optimiser(false);
  at::AutoGradMode gradients(true);
  try {
    return work();
  } catch (const Error &) {
    throw;
  } catch (const std::exception &exception) {
    throw Error(what + ": " + essence(exception));
  }
}

// The numbers of any kind of tensor as double, on the CPU, times a factor.
std::vector<double> to_vector(const torch::Tensor &tensor, double factor = 1.0) {
  const auto flat = (tensor.detach().to(torch::kCPU, torch::kFloat64) * factor).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

torch::Tensor from_vector(const std::vector<double> &values) {
  return torch::from_blob(const_cast<double *>(values.data()), {static_cast<std::int64_t>(values.size())},
                          torch::kFloat64)
      .clone();
}

torch::jit::Module load(const std::string &file, const torch::Device &device) {
  if (!std::ifstream(file).good()) throw Error("cannot read model file " + file + ": check the path in pair_coeff");
  try {
    return torch::jit::load(file, device);
  } catch (const std::exception &exception) {
    const std::string reason = exception.what();
    if (reason.find("Unknown builtin op") != std::string::npos ||
        reason.find("Couldn't find an operator") != std::string::npos)
      throw Error("model file " + file + " needs an operator that isn't loaded (" + essence(exception) +
                  "): load its library before pair_coeff");
    throw Error("model file " + file + " is not a TorchScript file or is damaged: copy or export it again");
  }
}

// Vector-Jacobian product; zeros where the outputs don't depend on the input.
torch::Tensor vector_jacobian(const std::vector<torch::Tensor> &outputs, const torch::Tensor &input,
                              const std::vector<torch::Tensor> &cotangents, bool keep_graph, bool create_graph) {
  bool depends = input.numel() > 0;
  for (const auto &output : outputs) depends = depends && output.requires_grad();
  if (!depends) return torch::zeros_like(input);
  const auto gradients = torch::autograd::grad(outputs, {input}, cotangents, keep_graph, create_graph, true);
  return gradients[0].defined() ? gradients[0] : torch::zeros_like(input);
}

}  // namespace

struct Model::Implementation {
  explicit Implementation(const std::string &name) : file(name), device(torch::kCPU) {}

  std::vector<torch::jit::IValue> arguments(const Graph &graph, bool requires_grad);
  torch::Tensor gradient_of(const torch::Tensor &output, const torch::Tensor &cotangent, bool keep_graph);
  std::vector<torch::Tensor> member_gradients(const torch::Tensor &features, const torch::Tensor &edges, Keep keep);

  std::string file;
  torch::Device device;
  torch::ScalarType dtype = torch::kFloat64;  // of the edge vectors
  double unit = 1.0;                          // energy unit of the run: one eV in it
  torch::jit::Module module;
  torch::Tensor edge_vector;           // of the kept evaluation
  torch::Tensor features;              // [n_local, p]
  std::vector<torch::Tensor> members;  // of an ensemble: [M] gradients [P, 3]
};

// Inputs of a model's forward().
std::vector<torch::jit::IValue> Model::Implementation::arguments(const Graph &graph, bool requires_grad) {
  const auto integers = [&](const std::vector<std::int64_t> &values, at::IntArrayRef shape) {
    return torch::from_blob(const_cast<std::int64_t *>(values.data()), shape, torch::kInt64)
        .to(device, torch::kInt64, false, true);
  };
  const auto vectors =
      torch::from_blob(const_cast<double *>(graph.vectors.data()), {graph.n_edges(), 3}, torch::kFloat64);
  const auto copy = vectors.to(device, dtype, false, true);
  copy.requires_grad_(requires_grad);
  const auto n = static_cast<std::int64_t>(graph.species.size());
  return {integers(graph.species, {n}), integers(graph.edges, {2, graph.n_edges()}), copy, graph.n_local};
}

// Vector-Jacobian product with respect to the kept edge vectors.
torch::Tensor Model::Implementation::gradient_of(const torch::Tensor &output, const torch::Tensor &cotangent,
                                                 bool keep_graph) {
  return vector_jacobian({output}, edge_vector, {cotangent}, keep_graph, false);
}

// Gradients of the columns of an ensemble's features, which are the members' energies up to a constant.
std::vector<torch::Tensor> Model::Implementation::member_gradients(const torch::Tensor &features,
                                                                   const torch::Tensor &edges, Keep keep) {
  std::vector<torch::Tensor> gradients;
  for (std::int64_t m = 0; m < features.size(1); ++m) {
    const auto energy = features.select(1, m).sum();
    gradients.push_back(vector_jacobian({energy}, edges, {torch::ones_like(energy)}, true, keep == Keep::second_order));
  }
  return gradients;
}

Model::Model(const std::string &file, Precision precision, const std::string &device, int threads, double energy_unit)
    : impl_(std::make_unique<Implementation>(file)) {
  at::set_num_threads(threads);
  guarded("model file " + file + " cannot be used", [&] {
    auto &impl = *impl_;
    impl.unit = energy_unit;
    impl.device = torch::Device(device_of_rank(device, local_rank(), static_cast<int>(torch::cuda::device_count())));
    impl.dtype = precision == Precision::single_ ? torch::kFloat32 : torch::kFloat64;
    impl.module = load(file, impl.device);
    impl.module.eval();
    // Only parameters follow the requested precision: buffers (posterior factor, energy shifts) stay as stored.
    const auto parameter_type = precision == Precision::double_ ? torch::kFloat64 : torch::kFloat32;
    for (auto parameter : impl.module.parameters()) {
      parameter.set_data(parameter.detach().to(parameter_type));
      parameter.requires_grad_(false);
    }
    is_ensemble_ = impl.module.find_method("force_uncertainties").has_value();
    const char *atoms = is_ensemble_ ? "force_uncertainties" : "atomic_uncertainties";
    for (const char *method : {"metadata", "forces", "forward", "uncertainty", atoms})
      if (!impl.module.find_method(method))
        throw Error("file " + file + " is TorchScript but has no method " + method + ": it is not a ubmd model file");
    metadata_ = parse_metadata(impl.module.get_method("metadata")({}).toStringRef(), file);
  });
  // warm up: compiles the methods, and a broken file is found here instead of in the first step
  Graph pair;
  pair.species = {0, 0};
  pair.edges = {0, 1, 1, 0};
  pair.vectors = {0.5 * metadata_.cutoff, 0.0, 0.0, -0.5 * metadata_.cutoff, 0.0, 0.0};
  pair.n_local = 2;
  std::vector<double> energies, gradient;
  forces(pair, energies, gradient);
}

Model::~Model() = default;

void Model::forces(const Graph &graph, std::vector<double> &energies, std::vector<double> &gradient) {
  guarded("model file " + impl_->file + " failed to evaluate", [&] {
    const auto result = impl_->module.get_method("forces")(impl_->arguments(graph, false)).toTuple();
    energies = to_vector(result->elements()[0].toTensor(), impl_->unit);
    gradient = to_vector(result->elements()[1].toTensor(), impl_->unit);
  });
}

void Model::forces_and_features(const Graph &graph, Keep keep, std::vector<double> &energies,
                                std::vector<double> &gradient) {
  guarded("model file " + impl_->file + " failed to evaluate", [&] {
    release();
    auto &impl = *impl_;
    const auto inputs = impl.arguments(graph, true);
    impl.edge_vector = inputs[2].toTensor();
    const auto result = impl.module.forward(inputs).toTuple();
    const auto energy = result->elements()[0].toTensor();
    impl.features = result->elements()[1].toTensor();
    energies = to_vector(energy, impl.unit);
    if (is_ensemble_) {
      impl.members = impl.member_gradients(impl.features, impl.edge_vector, keep);
      gradient = to_vector(torch::stack(impl.members).mean(0), impl.unit);
    } else {
      gradient = to_vector(impl.gradient_of(energy, torch::ones_like(energy), keep != Keep::nothing), impl.unit);
    }
    if (keep == Keep::nothing) impl.features = impl.features.detach();
  });
}

std::vector<double> Model::feature_sum() const {
  return guarded("the features of model file " + impl_->file + " are wrong",
                 [&] { return to_vector(impl_->features.detach().to(torch::kFloat64).sum(0)); });
}

std::vector<double> Model::atomic_uncertainties() {
  return guarded("atomic uncertainties of model file " + impl_->file + " failed", [&] {
    torch::NoGradGuard no_gradients;
    const auto values = impl_->module.get_method("atomic_uncertainties")({impl_->features.detach()}).toTensor();
    return to_vector(values, impl_->unit);
  });
}

std::vector<double> Model::atomic_uncertainties(const Graph &graph) {
  return guarded("atomic uncertainties of model file " + impl_->file + " failed", [&] {
    torch::NoGradGuard no_gradients;
    const auto result = impl_->module.forward(impl_->arguments(graph, false)).toTuple();
    const auto values = impl_->module.get_method("atomic_uncertainties")({result->elements()[1]}).toTensor();
    return to_vector(values, impl_->unit);
  });
}

std::vector<std::vector<double>> Model::member_gradients() const {
  std::vector<std::vector<double>> gradients;
  for (const auto &gradient : impl_->members) gradients.push_back(to_vector(gradient));
  return gradients;
}

std::vector<std::vector<double>> Model::member_gradients(const Graph &graph) {
  return guarded("the members' forces of model file " + impl_->file + " failed", [&] {
    const auto inputs = impl_->arguments(graph, true);
    const auto features = impl_->module.forward(inputs).toTuple()->elements()[1].toTensor();
    std::vector<std::vector<double>> gradients;
    for (const auto &gradient : impl_->member_gradients(features, inputs[2].toTensor(), Keep::nothing))
      gradients.push_back(to_vector(gradient));
    return gradients;
  });
}

std::vector<double> Model::force_uncertainties(const std::vector<double> &forces, std::vector<double> *derivative) {
  return guarded("atomic uncertainties of model file " + impl_->file + " failed", [&] {
    const auto n_members = static_cast<std::int64_t>(metadata_.projections);
    const auto leaf = from_vector(forces)
                          .view({static_cast<std::int64_t>(forces.size()) / (3 * n_members), 3, n_members})
                          .to(impl_->device)
                          .requires_grad_(derivative != nullptr);
    const auto u = impl_->module.get_method("force_uncertainties")({leaf}).toTensor();
    if (derivative) *derivative = to_vector(torch::autograd::grad({u.sum()}, {leaf})[0]);
    return to_vector(u, impl_->unit);
  });
}

std::vector<double> Model::member_bias(const std::vector<std::vector<double>> &cotangents) {
  return guarded("the bias of model file " + impl_->file + " failed", [&] {
    const auto &edges = impl_->edge_vector;
    std::vector<torch::Tensor> tensors;
    for (const auto &cotangent : cotangents)
      tensors.push_back(from_vector(cotangent).to(edges.device(), edges.scalar_type()).view_as(edges));
    const auto gradient = to_vector(vector_jacobian(impl_->members, edges, tensors, false, false), impl_->unit);
    release();
    return gradient;
  });
}

double Model::uncertainty(const std::vector<double> &mean, std::vector<double> *weight) {
  return guarded("the uncertainty of model file " + impl_->file + " failed", [&] {
    const auto phi = from_vector(mean).to(impl_->device).requires_grad_(weight != nullptr);
    const auto u = impl_->module.get_method("uncertainty")({phi}).toTensor();
    if (weight) *weight = to_vector(torch::autograd::grad({u}, {phi})[0], impl_->unit);
    return impl_->unit * u.item<double>();
  });
}

std::vector<double> Model::bias(const std::vector<double> &weight) {
  return guarded("the bias of model file " + impl_->file + " failed", [&] {
    const auto &features = impl_->features;
    const auto cotangent = from_vector(weight).to(features.device(), features.scalar_type()).expand_as(features);
    const auto gradient = to_vector(impl_->gradient_of(features, cotangent, false));
    release();
    return gradient;
  });
}

std::vector<double> Model::atomic_bias() {
  return guarded("the bias of model file " + impl_->file + " failed", [&] {
    const auto leaf = impl_->features.detach().requires_grad_(true);
    const auto sum = impl_->module.get_method("atomic_uncertainties")({leaf}).toTensor().sum();
    const auto cotangent = torch::autograd::grad({sum}, {leaf})[0];
    const auto gradient = to_vector(impl_->gradient_of(impl_->features, cotangent, false), impl_->unit);
    release();
    return gradient;
  });
}

void Model::release() {
  impl_->edge_vector = torch::Tensor();
  impl_->features = torch::Tensor();
  impl_->members.clear();
}

std::string loaded_torch_version() {
  const std::string config = at::show_config();
  const std::string key = "TORCH_VERSION=";
  const auto start = config.find(key);
  if (start == std::string::npos) return "";
  const auto first = start + key.size();
  return config.substr(first, config.find_first_not_of("0123456789.", first) - first);
}

}  // namespace ubmd
