#include "torch_model.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cctype>

#include "device.h"
#include "loaders.h"

namespace ubmd {
namespace {

constexpr const char *atomic_method = "atomic_uncertainties";
constexpr const char *ensemble_method = "force_uncertainties";

constexpr const char *record_name = "extra/ubmd.json";
constexpr std::size_t largest_record = std::size_t{64} << 20;  // bytes

Error damaged(const std::string &file) {
  return Error("model file " + file + " is not a TorchScript file or is damaged: copy or export it again");
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

std::optional<std::string> read_record(const std::string &file) {
  caffe2::serialize::PyTorchStreamReader reader(file);
  const auto names = reader.getAllRecords();
  const auto copies = std::count_if(names.begin(), names.end(), [](const auto &n) { return lower(n) == record_name; });
  if (copies == 0) return std::nullopt;
  if (copies > 1 || reader.getRecordSize(record_name) > largest_record)
    throw Error("model file " + file + " has more than one record, or one that is too large: export it again");
  const auto [content, size] = reader.getRecord(record_name);
  return std::string(static_cast<const char *>(content.get()), size);
}

torch::jit::Module load(const std::string &file, const torch::Device &device) {
  try {
    return torch::jit::load(file, device);
  } catch (const std::exception &exception) {
    const std::string reason = exception.what();
    if (reason.find("Unknown builtin op") != std::string::npos ||
        reason.find("Couldn't find an operator") != std::string::npos)
      throw Error("model file " + file + " needs an operator that isn't loaded (" + essence(exception) +
                  "): load its library before pair_coeff");
    throw damaged(file);
  }
}

// Only parameters follow the requested precision: buffers (posterior factor, energy shifts) stay as stored.
void set_precision(torch::jit::Module &module, Precision precision) {
  const auto type = precision == Precision::double_ ? torch::kFloat64 : torch::kFloat32;
  for (auto parameter : module.parameters()) parameter.set_data(parameter.detach().to(type));
}

// Energies of message passing are differentiated by autograd, from whole graphs, and with one force for all members.
void check_layers(const torch::jit::Module &module, const Metadata &metadata, const std::string &file) {
  if (metadata.layers == 1) return;
  if (module.find_method(ensemble_method))
    throw Error("model file " + file + " is an ensemble of networks with message passing, which is not supported: " +
                "export it with another uncertainty");
  if (module.find_method("evaluate"))
    throw Error("model file " + file + " has message passing and the method evaluate, which is of local models: " +
                "export it without this method");
}

const char *name_of(Precision precision) {
  return precision == Precision::double_ ? "double" : precision == Precision::single_ ? "single" : "mixed";
}

Precision choose_precision(const Metadata &metadata, std::optional<Precision> wanted, const std::string &file) {
  if (metadata.precision && wanted.value_or(*metadata.precision) != *metadata.precision)
    throw Error("model file " + file + " runs in " + name_of(*metadata.precision) + " precision only: remove " +
                "'precision " + name_of(*wanted) + "'");
  return metadata.precision.value_or(wanted.value_or(Precision::mixed));
}

void check_methods(const torch::jit::Module &module, const std::vector<const char *> &methods,
                   const std::string &file) {
  for (const char *method : methods)
    if (!module.find_method(method))
      throw Error("file " + file + " is TorchScript but has no method " + method + ": it is not a ubmd model file");
}

// The file's own record counts, if it has one; what the module's code returns must be the same.
Metadata read_metadata(const torch::jit::Module &module, const std::optional<std::string> &record,
                       const std::string &file) {
  check_methods(module, {"metadata"}, file);
  const std::string said = module.get_method("metadata")({}).toStringRef();
  auto metadata = parse_metadata(record.value_or(said), file);
  if (record && !same_record(*record, said, file))
    throw Error("model file " + file +
                " is refused: its code gives another description than its record; export the model again, or ask its "
                "author for a new copy");
  if (metadata.lattice) {
    check_methods(module,
                  {"evaluate", "uncertainty", "site_uncertainties", "strain_derivative", "by_structure", "features",
                   "feature_sum", "directions", "feature_gradient"},
                  file);
  } else {
    const char *atoms = module.find_method(ensemble_method) ? ensemble_method : atomic_method;
    check_methods(module, {"forces", "forward", "uncertainty", atoms}, file);
  }
  check_layers(module, metadata, file);
  return metadata;
}

std::optional<torch::jit::Method> atomic_uncertainties_of(const torch::jit::Module &module) {
  auto of_members = module.find_method(ensemble_method);
  return of_members ? of_members : module.find_method(atomic_method);
}

}  // namespace

// torch's messages contain C++ and TorchScript traces; the part that says what happened is the last line with text.
std::string essence(const std::exception &exception) {
  const auto *torch_error = dynamic_cast<const c10::Error *>(&exception);
  std::string text = torch_error ? torch_error->what_without_backtrace() : exception.what();
  const auto runtime = text.rfind("RuntimeError: ");
  if (runtime != std::string::npos) text = text.substr(runtime + 14);
  const auto first = text.find_first_not_of(" \n");
  if (first == std::string::npos) return "no reason given";
  return text.substr(first, text.find('\n', first) - first);
}

Values view(const torch::Tensor &tensor, double factor) {
  auto numbers = tensor.detach().to(torch::kCPU, torch::kFloat64);
  if (factor != 1.0) numbers = numbers * factor;
  const auto owner = std::make_shared<const torch::Tensor>(numbers.contiguous());
  return {owner, owner->const_data_ptr<double>(), static_cast<std::size_t>(owner->numel())};
}

std::vector<double> to_vector(const torch::Tensor &tensor, double factor) {
  const auto values = view(tensor, factor);
  return {values.begin(), values.end()};
}

torch::Tensor wrap(const std::vector<double> &values, at::IntArrayRef shape) {
  return torch::from_blob(const_cast<double *>(values.data()), shape, torch::kFloat64);
}

torch::Tensor wrap(const std::vector<std::int64_t> &values, at::IntArrayRef shape) {
  return torch::from_blob(const_cast<std::int64_t *>(values.data()), shape, torch::kInt64);
}

namespace {

// By its directory: LAMMPS and Python have other files that are zip archives, too.
bool is_torchscript(const std::string &file) {
  try {
    return caffe2::serialize::PyTorchStreamReader(file).hasRecord("constants.pkl");
  } catch (const std::exception &) {
    return false;
  }
}

std::optional<std::string> stored_record(const std::string &file) {
  try {
    return read_record(file);
  } catch (const Error &) {
    throw;
  } catch (const std::exception &) {
    throw damaged(file);
  }
}

std::unique_ptr<Model> load_torchscript(const std::string &file, const std::optional<std::string> &record,
                                        const RunOptions &options) {
  at::set_num_threads(options.threads);
  return guarded("loading", file, false, [&] {
    Loaded loaded;
    loaded.file = file;
    loaded.unit = options.energy_unit;
    const auto device = device_of_rank(options.device, local_rank(), static_cast<int>(torch::cuda::device_count()));
    loaded.device = torch::Device(device);
    loaded.module = load(file, loaded.device);
    loaded.module.eval();
    loaded.metadata = read_metadata(loaded.module, record, file);
    for (auto parameter : loaded.module.parameters()) parameter.requires_grad_(false);
    const auto precision = choose_precision(loaded.metadata, options.precision, file);
    if (!loaded.metadata.precision) set_precision(loaded.module, precision);
    if (precision == Precision::single_ && !loaded.metadata.lattice) loaded.dtype = torch::kFloat32;
    if (loaded.metadata.lattice && !loaded.device.is_cpu())
      throw Error("model file " + file + " is a force-constant model, which runs on the CPU only: remove 'device " +
                  options.device + "'");
    const bool has_blocks = loaded.module.find_method("evaluate").has_value();
    return has_blocks ? make_block_model(std::move(loaded), options.block_size) : make_generic_model(std::move(loaded));
  });
}

}  // namespace

const Loader torchscript_loader{is_torchscript, stored_record, load_torchscript};

TorchModel::TorchModel(Loaded loaded)
    : loaded_(std::move(loaded)),
      uncertainty_(loaded_.module.get_method("uncertainty")),
      atoms_(atomic_uncertainties_of(loaded_.module)),
      of_several_(loaded_.module.find_method("uncertainties")) {
  metadata_ = loaded_.metadata;
  is_ensemble_ = loaded_.module.find_method(ensemble_method).has_value();
}

double TorchModel::uncertainty(const std::vector<double> &mean, std::vector<double> *weight) {
  if (of_several_) {  // without autograd, which takes five times as long
    std::vector<double> weights;
    const double u = uncertainties(mean, weights).front();
    if (weight) *weight = std::move(weights);
    return u;
  }
  return guarded("the uncertainty", loaded_.file, false, [&] {
    const auto phi = wrap(mean, {projections()}).to(loaded_.device, torch::kFloat64, false, true);
    phi.requires_grad_(weight != nullptr);
    const auto u = call(uncertainty_, {phi}).toTensor();
    if (weight) *weight = to_vector(torch::autograd::grad({u}, {phi})[0], loaded_.unit);
    return loaded_.unit * u.item<double>();
  });
}

std::vector<double> TorchModel::uncertainties(const std::vector<double> &means, std::vector<double> &weights) {
  const auto p = static_cast<std::size_t>(projections()), n = means.size() / p;
  if (of_several_)
    return guarded("the uncertainty", loaded_.file, true, [&] {
      const auto rows = wrap(means, {static_cast<std::int64_t>(n), projections()}).to(loaded_.device);
      const auto result = call(*of_several_, {rows});
      weights = to_vector(result.toTupleRef().elements()[1].toTensor(), loaded_.unit);
      return to_vector(result.toTupleRef().elements()[0].toTensor(), loaded_.unit);
    });
  std::vector<double> found;
  weights.clear();
  for (std::size_t r = 0; r < n; ++r) {
    std::vector<double> weight(p, 0.0);
    const auto begin = means.begin() + static_cast<std::ptrdiff_t>(p * r);
    found.push_back(uncertainty({begin, begin + projections()}, &weight));
    weights.insert(weights.end(), weight.begin(), weight.end());
  }
  return found;
}

Values TorchModel::uncertainties_of(const torch::Tensor &features) {
  return view(call(atoms_.value(), {features}).toTensor(), loaded_.unit);
}

torch::Tensor TorchModel::uncertainty_derivative(const torch::Tensor &features, const std::vector<double> &weights) {
  const auto leaf = features.detach().clone().requires_grad_(true);  // a tensor made without autograd can't be a leaf
  const auto u = call(atoms_.value(), {leaf}).toTensor();
  const auto cotangent = wrap(weights, {u.size(0)}).to(u.device(), u.scalar_type());
  return torch::autograd::grad({u}, {leaf}, {cotangent})[0];
}

Values TorchModel::force_uncertainties(const std::vector<double> &forces, std::vector<double> *derivative) {
  return guarded("the atomic uncertainties", loaded_.file, false, [&] {
    const auto n = static_cast<std::int64_t>(forces.size()) / (3 * projections());
    const auto leaf = wrap(forces, {n, 3, projections()}).to(loaded_.device, torch::kFloat64, false, true);
    leaf.requires_grad_(derivative != nullptr);
    const auto u = call(atoms_.value(), {leaf}).toTensor();
    if (derivative) *derivative = to_vector(torch::autograd::grad({u.sum()}, {leaf})[0]);
    return view(u, loaded_.unit);
  });
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
