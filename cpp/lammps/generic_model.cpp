// Evaluation of any module with the interface of a model file: one graph of all atoms, differentiated by autograd.
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <limits>

#include "torch_model.h"

namespace ubmd {
namespace {

// Vector-Jacobian product; zeros where the outputs don't depend on the input.
torch::Tensor vector_jacobian(const std::vector<torch::Tensor> &outputs, const torch::Tensor &input,
                              const std::vector<torch::Tensor> &cotangents, bool keep_graph, bool create_graph) {
  bool depends = input.numel() > 0;
  for (const auto &output : outputs) depends = depends && output.requires_grad();
  if (!depends) return torch::zeros_like(input);
  const auto gradients = torch::autograd::grad(outputs, {input}, cotangents, keep_graph, create_graph, true);
  return gradients[0].defined() ? gradients[0] : torch::zeros_like(input);
}

class GenericModel : public TorchModel {
 public:
  explicit GenericModel(Loaded loaded)
      : TorchModel(std::move(loaded)),
        forces_(loaded_.module.get_method("forces")),
        forward_(loaded_.module.get_method("forward")) {}

  std::size_t largest_block() const override { return std::numeric_limits<std::size_t>::max(); }
  void warm_up(const Request &) override;
  void start(const Request &request) override;
  Forces evaluate(const Block &block) override;
  void add_features() override;
  Values atomic_uncertainties() override;
  Values member_gradients() override;
  std::vector<double> feature_sum() override;
  void set_weight(const std::vector<double> &weight) override { weight_ = weight; }
  Values bias(std::size_t) override;
  Values atomic_bias(std::size_t, const std::vector<double> &weights) override;
  Values member_bias(std::size_t, const Block &, const std::vector<double> &cotangents) override;
  void release() override;

 private:
  // The graph of an evaluation with features.
  struct Tape {
    torch::Tensor vectors;               // [P, 3], the leaf
    torch::Tensor features;              // [n, p]
    std::vector<torch::Tensor> members;  // of an ensemble: [M] gradients [P, 3]
  };

  void check_reach();
  std::vector<torch::jit::IValue> arguments(const Block &block, bool requires_grad);
  Forces differentiate(const Block &block);
  std::vector<torch::Tensor> differentiate_members(const Tape &tape, bool second_order);

  torch::jit::Method forces_, forward_;
  Request request_;
  Tape last_, kept_;  // of the last evaluation; of the last one with features of the structure
  std::vector<double> sum_, weight_;
  std::vector<std::int64_t> slots_, species_, edges_;  // buffers of arguments()
};

// Atoms on a line, each the neighbour of the next one and the one before.
Block chain(const Metadata &metadata, int n) {
  Block block;
  block.first = {0};
  const auto position = [&](int k) {  // not straight: angles matter, too
    return std::array{0.55 * k * metadata.cutoff, 0.25 * (k % 2) * metadata.cutoff, 0.1 * (k % 3) * metadata.cutoff};
  };
  const auto element = [&](int k) { return static_cast<std::int64_t>(k % metadata.elements.size()); };
  for (int k = 0; k < n; ++k) {
    block.centres.push_back(k);
    block.species.push_back(element(k));
    for (int end : {k - 1, k + 1}) {
      if (end < 0 || end >= n) continue;
      block.ends.push_back(end);
      block.neighbours.push_back(element(end));
      for (int a = 0; a < 3; ++a) block.vectors.push_back(position(end)[a] - position(k)[a]);
    }
    block.first.push_back(static_cast<std::int64_t>(block.ends.size()));
  }
  return block;
}

// A file that is broken is found here instead of in the first step.
void GenericModel::warm_up(const Request &) {
  start({});
  evaluate(chain(metadata_, 2));
  guarded("the evaluation", loaded_.file, false, [&] { check_reach(); });
}

// Whether the first atom of a chain depends on pairs that are further away than the record says: such a module would
// get too few atoms, and no error.
void GenericModel::check_reach() {
  const int layers = metadata_.layers;
  const auto block = chain(metadata_, layers + 2);
  const auto inputs = arguments(block, true);
  const auto result = call(forward_, inputs);
  const auto &outputs = result.toTupleRef().elements();
  const auto of_first = outputs[0].toTensor()[0] + outputs[1].toTensor()[0].sum();
  const auto slopes = vector_jacobian({of_first}, inputs[2].toTensor(), {torch::ones_like(of_first)}, false, false);
  const auto sizes = to_vector(slopes.abs().sum(1));
  const double largest = *std::max_element(sizes.begin(), sizes.end());
  for (auto e = block.first[layers]; e < block.n_pairs(); ++e)
    if (sizes[e] > 1e-9 * largest)
      throw Error("model file " + loaded_.file + " passes messages in more steps than its record says (layers " +
                  std::to_string(layers) + "), so its atoms would get too few neighbours: export it with the right " +
                  "number of layers");
}

void GenericModel::start(const Request &request) {
  request_ = request;
  last_ = {};
  if (!request.structure) return;
  release();
  sum_.assign(metadata_.projections, 0.0);
}

// Inputs of forward(): the centres are the first atoms, the other ends of pairs follow in the order of appearance.
std::vector<torch::jit::IValue> GenericModel::arguments(const Block &block, bool requires_grad) {
  const std::int64_t n = block.n_centres(), n_pairs = block.n_pairs();
  const auto &nodes = block.nodes.empty() ? block.ends : block.nodes;
  int n_atoms = 0;
  for (int i : block.centres) n_atoms = std::max(n_atoms, i + 1);
  for (std::int64_t e = 0; e < n_pairs; ++e) n_atoms = std::max(n_atoms, nodes[e] + 1);
  slots_.assign(n_atoms, -1);
  species_ = block.species;
  edges_.resize(2 * n_pairs);
  for (std::int64_t k = 0; k < n; ++k) slots_[block.centres[k]] = k;
  for (std::int64_t k = 0; k < n; ++k)
    for (std::int64_t e = block.first[k]; e < block.first[k + 1]; ++e) {
      auto &slot = slots_[nodes[e]];
      if (slot < 0) {
        slot = static_cast<std::int64_t>(species_.size());
        species_.push_back(block.neighbours[e]);
      }
      edges_[e] = k;
      edges_[n_pairs + e] = slot;
    }
  const auto copy = [&](const torch::Tensor &tensor, torch::ScalarType type) {
    return tensor.to(loaded_.device, type, false, true);
  };
  const auto vectors = copy(wrap(block.vectors, {n_pairs, 3}), loaded_.dtype).requires_grad_(requires_grad);
  return {copy(wrap(species_, {static_cast<std::int64_t>(species_.size())}), torch::kInt64),
          copy(wrap(edges_, {2, n_pairs}), torch::kInt64), vectors, block.n_energies()};
}

Forces GenericModel::evaluate(const Block &block) {
  return guarded("the evaluation", loaded_.file, false, [&] {
    if (request_.structure || request_.atoms) return differentiate(block);
    const auto result = call(forces_, arguments(block, false));
    const auto &elements = result.toTupleRef().elements();
    return Forces{view(elements[0].toTensor(), loaded_.unit), view(elements[1].toTensor(), loaded_.unit)};
  });
}

// Energies and gradient from one evaluation that also keeps the features, and their graph if a bias follows.
Forces GenericModel::differentiate(const Block &block) {
  const auto inputs = arguments(block, true);
  const auto result = call(forward_, inputs);
  const auto energy = result.toTupleRef().elements()[0].toTensor();
  Tape tape{inputs[2].toTensor(), result.toTupleRef().elements()[1].toTensor(), {}};
  torch::Tensor gradient;
  if (is_ensemble_) {
    tape.members = differentiate_members(tape, request_.bias == Bias::atomic);
    gradient = torch::stack(tape.members).mean(0);
  } else {
    const bool keep = request_.bias != Bias::none;
    gradient = vector_jacobian({energy}, tape.vectors, {torch::ones_like(energy)}, keep, false);
  }
  if (request_.bias == Bias::none) tape.features = tape.features.detach();
  last_ = std::move(tape);
  if (request_.bias != Bias::none) kept_ = last_;
  return {view(energy, loaded_.unit), view(gradient, loaded_.unit)};
}

// Gradients of the columns of an ensemble's features, which are the members' energies up to a constant.
std::vector<torch::Tensor> GenericModel::differentiate_members(const Tape &tape, bool second_order) {
  std::vector<torch::Tensor> gradients;
  for (std::int64_t m = 0; m < tape.features.size(1); ++m) {
    const auto energy = tape.features.select(1, m).sum();
    gradients.push_back(vector_jacobian({energy}, tape.vectors, {torch::ones_like(energy)}, true, second_order));
  }
  return gradients;
}

void GenericModel::add_features() {
  guarded("the sum of the features", loaded_.file, true, [&] {
    const auto sum = to_vector(last_.features.to(torch::kFloat64).sum(0));
    for (std::size_t k = 0; k < sum.size(); ++k) sum_[k] += sum[k];
  });
}

Values GenericModel::atomic_uncertainties() {
  return guarded("the atomic uncertainties", loaded_.file, true,
                 [&] { return uncertainties_of(last_.features.detach()); });
}

Values GenericModel::member_gradients() {
  return guarded("the forces of the members", loaded_.file, true, [&] { return view(torch::stack(last_.members)); });
}

std::vector<double> GenericModel::feature_sum() {
  return sum_;
}

Values GenericModel::bias(std::size_t) {
  return guarded("the bias", loaded_.file, false, [&] {
    const auto &features = kept_.features;
    const auto cotangent =
        wrap(weight_, {projections()}).to(features.device(), features.scalar_type()).expand_as(features);
    return view(vector_jacobian({features}, kept_.vectors, {cotangent}, false, false));
  });
}

Values GenericModel::atomic_bias(std::size_t, const std::vector<double> &weights) {
  return guarded("the bias", loaded_.file, false, [&] {
    const auto cotangent = uncertainty_derivative(kept_.features, weights);
    return view(vector_jacobian({kept_.features}, kept_.vectors, {cotangent}, false, false), loaded_.unit);
  });
}

Values GenericModel::member_bias(std::size_t, const Block &, const std::vector<double> &cotangents) {
  return guarded("the bias", loaded_.file, false, [&] {
    const auto &vectors = kept_.vectors;
    const auto all = wrap(cotangents, {projections(), vectors.size(0), 3}).to(vectors.device(), vectors.scalar_type());
    return view(vector_jacobian(kept_.members, vectors, all.unbind(0), false, false), loaded_.unit);
  });
}

void GenericModel::release() {
  last_ = {};
  kept_ = {};
}

}  // namespace

std::unique_ptr<Model> make_generic_model(Loaded loaded) {
  return std::make_unique<GenericModel>(std::move(loaded));
}

}  // namespace ubmd
