// Evaluation of a model file that has `evaluate`: closed forms on blocks of centres. No graph of the whole system
// exists, and without a bias no more than one block's intermediate results do.
#include <algorithm>
#include <cmath>

#include "torch_model.h"

namespace ubmd {
namespace {

// Size of a warm-up: atoms enough for the kernels of large matrices, and the neighbours of ordinary matter at the usual
// cutoffs.
constexpr std::size_t usual_atoms = 64;
constexpr int usual_neighbours = 60;

class BlockModel : public TorchModel {
 public:
  BlockModel(Loaded loaded, std::size_t block_size);

  std::size_t largest_block() const override { return block_size_; }
  void warm_up(const Request &request) override;
  void start(const Request &request) override;
  Forces evaluate(const Block &block) override;
  void add_features() override;
  Values atomic_uncertainties() override;
  Values strain_derivative() override;
  Values member_gradients() override;
  std::vector<double> feature_sum() override;
  void set_weight(const std::vector<double> &weight) override;
  Values bias(std::size_t k) override;
  Values atomic_bias(std::size_t k, const std::vector<double> &weights) override;
  Values member_bias(std::size_t k, const Block &block, const std::vector<double> &cotangents) override;
  void release() override;
  bool has_atom_features() const override { return metadata_.projections > 0 && !is_ensemble_ && !metadata_.lattice; }
  Values features() override;
  Values feature_weights(std::size_t k, const std::vector<double> &weights) override;
  Values feature_bias(std::size_t k, const std::vector<double> &weights) override;

 private:
  // What features and bias of a block are made from.
  struct Tape {
    torch::jit::IValue layers;  // of evaluate()
    bool has_features = false;
    torch::Tensor features;      // [n, p]
    torch::jit::IValue factors;  // of features()
  };

  std::vector<torch::jit::IValue> arguments(const Block &block) const;
  bool structure_path();
  void make_features();
  Values atom_by_atom(const Tape &tape, const torch::Tensor &weight, double factor);
  torch::Tensor on_device(const torch::Tensor &tensor, torch::ScalarType type) const {
    return tensor.to(loaded_.device, type);
  }

  torch::jit::Method evaluate_, by_structure_, features_, feature_sum_, directions_, feature_gradient_;
  std::optional<torch::jit::Method> member_gradients_, member_bias_, site_uncertainties_, strain_derivative_,
      kept_for_bias_;
  std::size_t block_size_;
  bool inference_;  // whether the methods need no autograd inside
  Request request_;
  bool kept_by_structure_ = false;
  std::int64_t path_of_ = -1;  // number of atoms that path_ was decided for
  bool path_ = false;
  Tape last_;
  std::vector<Tape> kept_;
  std::vector<torch::Tensor> sums_;
  torch::Tensor weight_;
  torch::jit::IValue direction_;
};

BlockModel::BlockModel(Loaded loaded, std::size_t block_size)
    : TorchModel(std::move(loaded)),
      evaluate_(loaded_.module.get_method("evaluate")),
      by_structure_(loaded_.module.get_method("by_structure")),
      features_(loaded_.module.get_method("features")),
      feature_sum_(loaded_.module.get_method("feature_sum")),
      directions_(loaded_.module.get_method("directions")),
      feature_gradient_(loaded_.module.get_method("feature_gradient")),
      member_gradients_(loaded_.module.find_method("member_gradients")),
      member_bias_(loaded_.module.find_method("member_bias")),
      site_uncertainties_(loaded_.module.find_method("site_uncertainties")),
      strain_derivative_(loaded_.module.find_method("strain_derivative")),
      kept_for_bias_(loaded_.module.find_method("kept_for_bias")),
      block_size_(block_size),
      // the operators have closed derivatives on the CPU; elsewhere, and without them, the descriptor uses autograd
      inference_(!metadata_.operators.empty() && loaded_.device.is_cpu()) {}

// A block of atoms with neighbours in all directions.
Block sample_block(std::size_t n, std::int64_t n_elements, double cutoff) {
  Block block;
  block.first.push_back(0);
  for (std::size_t i = 0; i < n; ++i) {
    block.centres.push_back(static_cast<int>(i));
    block.species.push_back(static_cast<std::int64_t>(i) % n_elements);
    for (int k = 0; k < usual_neighbours; ++k) {
      const double z = 1.0 - (2.0 * k + 1.0) / usual_neighbours, angle = 2.4 * k;  // a spiral over the sphere
      const double r =
          cutoff * (0.4 + 0.59 * std::fmod(0.618 * static_cast<double>(k + 1) + 0.1 * static_cast<double>(i), 1.0));
      const double rho = r * std::sqrt(1.0 - z * z);
      block.ends.push_back(0);
      block.neighbours.push_back(k % n_elements);
      block.vectors.insert(block.vectors.end(), {rho * std::cos(angle), rho * std::sin(angle), r * z});
    }
    block.first.push_back(static_cast<std::int64_t>(block.ends.size()));
  }
  return block;
}

// A block of centres on all sublattices with slightly displaced sites.
Block sample_sites(std::size_t n, const Lattice &lattice) {
  Block block;
  block.of_sites = true;
  block.first.push_back(0);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t sublattice = i * lattice.sites.size() / n;
    block.centres.push_back(static_cast<int>(i));
    block.species.push_back(static_cast<std::int64_t>(sublattice));
    for (const auto &site : lattice.sites[sublattice]) {
      block.neighbours.push_back(site[3]);
      const double angle = 2.4 * static_cast<double>(block.neighbours.size());
      block.displacements.insert(block.displacements.end(), {0.01 * std::cos(angle), 0.01 * std::sin(angle), 0.0});
    }
    block.first.push_back(static_cast<std::int64_t>(block.neighbours.size()));
  }
  return block;
}

void BlockModel::warm_up(const Request &request) {
  const auto n = std::clamp<std::size_t>(static_cast<std::size_t>(request.n_atoms), 1, usual_atoms);
  const auto block = metadata_.lattice
                         ? sample_sites(n, *metadata_.lattice)
                         : sample_block(n, static_cast<std::int64_t>(metadata_.elements.size()), metadata_.cutoff);
  start(request);
  evaluate(block);
  if (request.structure) add_features();
  if (request.structure) {
    auto mean = feature_sum();
    for (double &component : mean) component /= static_cast<double>(n);
    std::vector<double> weight;
    uncertainty(mean, &weight);
    if (request.bias == Bias::structure) {
      set_weight(weight);
      bias(0);
    }
  }
  if (request.atoms && !is_ensemble_) atomic_uncertainties();
  if (request.strain && strain_derivative_) strain_derivative();
  if (request.bias == Bias::atomic && !is_ensemble_) atomic_bias(0, std::vector<double>(n, 1.0));
  release();
}

void BlockModel::start(const Request &request) {
  request_ = request;
  last_ = {};
  if (!request.structure) return;
  release();
  sums_.clear();
  kept_by_structure_ = structure_path();
}

// Whether the sum of the features is made without the features of each atom. Asked once per number of atoms.
bool BlockModel::structure_path() {
  if (site_uncertainties_) return true;  // uncertainties of atoms come from the tape, not from features
  if (request_.atoms || request_.bias == Bias::atomic) return false;
  if (path_of_ != request_.n_atoms) {
    path_ = guarded("the choice of a path", loaded_.file, inference_,
                    [&] { return call(by_structure_, {request_.n_atoms}).toBool(); });
    path_of_ = request_.n_atoms;
  }
  return path_;
}

// species, first, neighbours, vectors: on the block's own numbers where the model is on the CPU.
std::vector<torch::jit::IValue> BlockModel::arguments(const Block &block) const {
  const auto n = block.n_centres(), n_pairs = block.n_pairs();
  std::vector<torch::jit::IValue> values;
  values.reserve(7);
  values.emplace_back(on_device(wrap(block.species, {n}), torch::kInt64));
  values.emplace_back(on_device(wrap(block.first, {n + 1}), torch::kInt64));
  values.emplace_back(on_device(wrap(block.neighbours, {n_pairs}), torch::kInt64));
  const auto &edges = block.of_sites ? block.displacements : block.vectors;
  values.emplace_back(on_device(wrap(edges, {n_pairs, 3}), loaded_.dtype));
  return values;
}

Forces BlockModel::evaluate(const Block &block) {
  return guarded("the evaluation", loaded_.file, inference_, [&] {
    last_ = {};
    auto inputs = arguments(block);
    const bool keep = request_.structure || request_.atoms || request_.strain;
    inputs.emplace_back(keep);
    const auto result = call(evaluate_, std::move(inputs));
    const auto &elements = result.toTupleRef().elements();
    if (keep) last_.layers = elements[2];
    if (request_.bias != Bias::none) kept_.push_back(last_);
    return Forces{view(elements[0].toTensor(), loaded_.unit), view(elements[1].toTensor(), loaded_.unit)};
  });
}

// The features of the last block, with its part of the sums.
void BlockModel::make_features() {
  if (last_.has_features) return;
  const bool by_structure = request_.structure && kept_by_structure_;
  const auto result = call(features_, {last_.layers, by_structure});
  const auto &elements = result.toTupleRef().elements();
  last_.has_features = true;
  last_.features = elements[1].toTensor();
  last_.factors = elements[2];
  if (request_.structure) {
    auto parts = elements[0].toTensorVector();
    for (std::size_t k = 0; k < sums_.size(); ++k) parts[k] = parts[k] + sums_[k];
    sums_ = std::move(parts);
  }
  if (request_.bias == Bias::none) return;
  if (kept_for_bias_) last_.layers = call(*kept_for_bias_, {last_.layers, by_structure});
  kept_.back() = last_;
  if (request_.bias == Bias::structure) kept_.back().features = torch::Tensor();
}

void BlockModel::add_features() {
  guarded("the sum of the features", loaded_.file, inference_, [&] { make_features(); });
}

Values BlockModel::atomic_uncertainties() {
  if (site_uncertainties_)
    return guarded("the atomic uncertainties", loaded_.file, inference_,
                   [&] { return view(call(*site_uncertainties_, {last_.layers}).toTensor(), loaded_.unit); });
  return guarded("the atomic uncertainties", loaded_.file, true, [&] {
    make_features();
    return uncertainties_of(last_.features);
  });
}

Values BlockModel::strain_derivative() {
  return guarded("the virial", loaded_.file, inference_,
                 [&] { return view(call(strain_derivative_.value(), {last_.layers}).toTensor(), loaded_.unit); });
}

Values BlockModel::member_gradients() {
  return guarded("the forces of the members", loaded_.file, inference_,
                 [&] { return view(call(member_gradients_.value(), {last_.layers}).toTensor()); });
}

std::vector<double> BlockModel::feature_sum() {
  if (sums_.empty()) return std::vector<double>(metadata_.projections, 0.0);
  return guarded("the sum of the features", loaded_.file, inference_,
                 [&] { return to_vector(call(feature_sum_, {c10::List<torch::Tensor>(sums_)}).toTensor()); });
}

void BlockModel::set_weight(const std::vector<double> &weight) {
  if (kept_.empty()) return;
  guarded("the bias", loaded_.file, inference_, [&] {
    weight_ = on_device(wrap(weight, {projections()}).clone(), torch::kFloat64);
    direction_ = call(directions_, {weight_, kept_by_structure_});
  });
}

Values BlockModel::bias(std::size_t k) {
  return guarded("the bias", loaded_.file, inference_, [&] {
    const auto &tape = kept_[k];
    return view(call(feature_gradient_, {tape.layers, tape.factors, direction_, weight_}).toTensor());
  });
}

Values BlockModel::atomic_bias(std::size_t k, const std::vector<double> &weights) {
  const auto &tape = kept_[k];
  const auto weight =
      guarded("the bias", loaded_.file, false, [&] { return uncertainty_derivative(tape.features, weights); });
  return atom_by_atom(tape, weight, loaded_.unit);
}

// d(sum_i weight_i·phi_i)/d(vector) [P, 3] times a factor, for weights [n, p].
Values BlockModel::atom_by_atom(const Tape &tape, const torch::Tensor &weight, double factor) {
  return guarded("the bias", loaded_.file, inference_, [&] {
    const c10::List<torch::Tensor> no_directions;
    return view(call(feature_gradient_, {tape.layers, tape.factors, no_directions, weight}).toTensor(), factor);
  });
}

Values BlockModel::features() {
  return guarded("the features", loaded_.file, inference_, [&] {
    make_features();
    return view(last_.features);
  });
}

Values BlockModel::feature_weights(std::size_t k, const std::vector<double> &weights) {
  return guarded("the bias", loaded_.file, false,
                 [&] { return view(uncertainty_derivative(kept_[k].features, weights), loaded_.unit); });
}

Values BlockModel::feature_bias(std::size_t k, const std::vector<double> &weights) {
  const auto n = static_cast<std::int64_t>(weights.size()) / projections();
  return atom_by_atom(kept_[k], on_device(wrap(weights, {n, projections()}), torch::kFloat64), 1.0);
}

Values BlockModel::member_bias(std::size_t, const Block &block, const std::vector<double> &cotangents) {
  return guarded("the bias", loaded_.file, inference_, [&] {
    auto inputs = arguments(block);
    inputs.emplace_back(on_device(wrap(cotangents, {projections(), block.n_pairs(), 3}), torch::kFloat64));
    return view(call(member_bias_.value(), std::move(inputs)).toTensor(), loaded_.unit);
  });
}

void BlockModel::release() {
  last_ = {};
  kept_.clear();
  sums_.clear();
  weight_ = torch::Tensor();
  direction_ = {};
}

}  // namespace

std::unique_ptr<Model> make_block_model(Loaded loaded, std::size_t block_size) {
  return std::make_unique<BlockModel>(std::move(loaded), block_size);
}

}  // namespace ubmd
