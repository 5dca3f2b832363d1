// A model file: loading, checking, evaluating. No torch type appears here, so that only model.cpp compiles against
// torch.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "graph.h"
#include "metadata.h"

namespace ubmd {

enum class Precision { mixed, single_, double_ };

// What an evaluation keeps for a bias that may follow: nothing, the graph of the features, or second derivatives too,
// which only the sum of an ensemble's atomic uncertainties needs.
enum class Keep { nothing, graph, second_order };

class Model {
 public:
  // Load, check and warm up; `device` is cpu, cuda or cuda:n. Throws Error (one sentence). All energies, forces and
  // uncertainties below are in eV times `energy_unit`.
  Model(const std::string &file, Precision precision, const std::string &device, int threads, double energy_unit = 1.0);
  ~Model();

  const Metadata &metadata() const { return metadata_; }

  // energies [n_local] (eV) and gradient dSum(E)/d(edge vector) [P, 3] (eV/Å).
  void forces(const Graph &graph, std::vector<double> &energies, std::vector<double> &gradient);

  // The same from one evaluation that also keeps the features.
  void forces_and_features(const Graph &graph, Keep keep, std::vector<double> &energies, std::vector<double> &gradient);

  // Sum of the features over the owned atoms [p], of the last forces_and_features().
  std::vector<double> feature_sum() const;

  // Calibrated uncertainties of the owned atoms (eV/Å), of the last forces_and_features().
  std::vector<double> atomic_uncertainties();

  // The same of any graph, from an evaluation of its own; leaves the kept one alone.
  std::vector<double> atomic_uncertainties(const Graph &graph);

  // Whether atomic uncertainties come from the forces of an ensemble's members, that is from the functions below and
  // not from those above; all numbers of members are in eV and eV/Å.
  bool is_ensemble() const { return is_ensemble_; }

  // Gradients [M][P, 3] of the members' energies, of the last forces_and_features() or of an evaluation of its own.
  std::vector<std::vector<double>> member_gradients() const;
  std::vector<std::vector<double>> member_gradients(const Graph &graph);

  // Calibrated uncertainties of n atoms from the members' forces [n, 3, M], and the derivative of their sum with
  // respect to these forces if `derivative` is given.
  std::vector<double> force_uncertainties(const std::vector<double> &forces, std::vector<double> *derivative);

  // d(sum_m cotangent_m·gradient_m)/d(edge vector) [P, 3] of the kept evaluation, which is released.
  std::vector<double> member_bias(const std::vector<std::vector<double>> &cotangents);

  // Calibrated u (eV/atom) of a mean feature [p], and its derivative [p] if `weight` is given.
  double uncertainty(const std::vector<double> &mean, std::vector<double> *weight);

  // d(sum_i weight·phi_i)/d(edge vector) [P, 3] of the kept evaluation, which is released.
  std::vector<double> bias(const std::vector<double> &weight);

  // d(sum_i u_i)/d(edge vector) [P, 3] of the kept evaluation, which is released.
  std::vector<double> atomic_bias();

  // Free the kept evaluation.
  void release();

 private:
  struct Implementation;
  std::unique_ptr<Implementation> impl_;
  Metadata metadata_;
  bool is_ensemble_ = false;
};

// Version of the torch library that is loaded, e.g. 2.13.0; empty if it doesn't say.
std::string loaded_torch_version();

}  // namespace ubmd
