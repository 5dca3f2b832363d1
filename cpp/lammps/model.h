// A model: what pair style ubmd asks of it, whatever its file's format is (loaders.h). No torch type appears here, so
// that only the files named *model.cpp compile against torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "graph.h"
#include "metadata.h"

namespace ubmd {

enum class Bias { none, structure, atomic };

// What an evaluation computes besides energies and gradient.
struct Request {
  bool structure = false;    // features of the structure, for u
  bool atoms = false;        // atomic uncertainties, or what an ensemble needs for them
  bool strain = false;       // strain derivative of a crystal
  Bias bias = Bias::none;    // which bias follows: it needs the evaluations of all blocks to be kept
  std::int64_t n_atoms = 0;  // owned atoms with an element
};

// Numbers that a model computed. They are not copied: they live as long as this object.
class Values {
 public:
  Values() = default;
  Values(std::shared_ptr<const void> owner, const double *data, std::size_t size)
      : owner_(std::move(owner)), data_(data), size_(size) {}

  const double *data() const { return data_; }
  std::size_t size() const { return size_; }
  double operator[](std::size_t k) const { return data_[k]; }
  // Some of them, from number `begin` on.
  Values part(std::size_t begin, std::size_t size) const { return {owner_, data_ + begin, size}; }
  const double *begin() const { return data_; }
  const double *end() const { return data_ + size_; }

 private:
  std::shared_ptr<const void> owner_;
  const double *data_ = nullptr;
  std::size_t size_ = 0;
};

struct Forces {
  Values energies;  // [n]
  Values gradient;  // [P, 3] dSum(E)/d(vector)
};

// The order of calls: start(); for each block evaluate(), then what was requested of it; when all blocks were
// evaluated, feature_sum() and the bias of each kept block. All energies, forces and uncertainties are in eV times
// `energy_unit`, features and numbers of an ensemble's members in eV and eV/Å.
class Model {
 public:
  virtual ~Model() = default;

  const Metadata &metadata() const { return metadata_; }

  // Whether this is a force-constant model of a crystal: blocks then are of sites.
  bool is_crystal() const { return metadata_.lattice.has_value(); }

  // Whether atomic uncertainties come from the forces of an ensemble's members.
  bool is_ensemble() const { return is_ensemble_; }

  // Blocks may have any size up to this one.
  virtual std::size_t largest_block() const = 0;

  // A warm-up: one evaluation as in the steps of the run, so that the first of them is no slower than the others.
  virtual void warm_up(const Request &request) = 0;

  // Begin an evaluation. One with `structure` takes the place of the last such one; others leave it alone.
  virtual void start(const Request &request) = 0;

  virtual Forces evaluate(const Block &block) = 0;

  // Enter the features of the block evaluated last into the sum over all blocks.
  virtual void add_features() = 0;

  // Uncertainties [n] of the block evaluated last (not of an ensemble). Here and below, uncertainties of atoms are
  // those that the module gives: the factors of the elements (`Metadata::atom_scale`) are the caller's business.
  virtual Values atomic_uncertainties() = 0;

  // dSum(E)/d(strain of the ideal positions) [3, 3] of the block evaluated last, in the model's frame (crystal only).
  virtual Values strain_derivative() { return {}; }

  // Gradients [M, P, 3] of the members' energies of the block evaluated last (ensemble only).
  virtual Values member_gradients() = 0;

  // Sum of the features over all blocks, [p].
  virtual std::vector<double> feature_sum() = 0;

  // Calibrated u (per atom) of a mean feature [p], and its derivative [p] if `weight` is given.
  virtual double uncertainty(const std::vector<double> &mean, std::vector<double> *weight) = 0;

  // Uncertainties of n atoms from the members' forces [n, 3, M], and the derivative of their sum with respect to these
  // forces if `derivative` is given.
  virtual Values force_uncertainties(const std::vector<double> &forces, std::vector<double> *derivative) = 0;

  // The weight of the bias of all blocks that follows.
  virtual void set_weight(const std::vector<double> &weight) = 0;

  // Of block number k (from 0): d(sum_i weight·phi_i)/d(vector) [P, 3] for the weight that was set.
  virtual Values bias(std::size_t k) = 0;

  // d(sum_i weight_i u_i)/d(vector) [P, 3] of block number k for weights [n] (not of an ensemble).
  virtual Values atomic_bias(std::size_t k, const std::vector<double> &weights) = 0;

  // d(sum_m cotangent_m·gradient_m)/d(vector) [P, 3] of block number k for cotangents [M, P, 3] (ensemble only).
  virtual Values member_bias(std::size_t k, const Block &block, const std::vector<double> &cotangents) = 0;

  // Forget what is kept of the blocks.
  virtual void release() = 0;

  // ---- of blocks that hold several systems (replica_group.h) ----

  // Whether a model has what follows.
  virtual bool has_atom_features() const { return false; }

  // Features [n, p] of the block evaluated last, in a request with `atoms`.
  virtual Values features() { return {}; }

  // Calibrated u (per atom) [R] of mean features [R, p], and their derivatives [R, p].
  virtual std::vector<double> uncertainties(const std::vector<double> &, std::vector<double> &) { return {}; }

  // d(sum_i weight_i u_i)/d(features) [n, p] of block number k for weights [n].
  virtual Values feature_weights(std::size_t, const std::vector<double> &) { return {}; }

  // d(sum_i weights_i·phi_i)/d(vector) [P, 3] of block number k for weights [n, p].
  virtual Values feature_bias(std::size_t, const std::vector<double> &) { return {}; }

 protected:
  Metadata metadata_;
  bool is_ensemble_ = false;
};

// Version of the torch library that is loaded, e.g. 2.13.0; empty if it doesn't say.
std::string loaded_torch_version();

}  // namespace ubmd
