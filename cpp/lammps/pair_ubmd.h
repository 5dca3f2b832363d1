// pair_style ubmd: energies, forces and virials of a model file; on request it keeps what fix ubmd needs for u and
// bias.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "graph.h"
#include "model.h"
#include "pair.h"
#include "ubmd_timer.h"
#include "units.h"

namespace LAMMPS_NS {

class PairUBMD : public Pair {
 public:
  explicit PairUBMD(class LAMMPS *);
  ~PairUBMD() override;

  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  void finish() override;
  double memory_usage() override;
  void *extract(const char *, int &) override;
  void *extract_peratom(const char *, int &) override;
  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;

  // ---- for fix ubmd ----

  // What one evaluation leaves for the fix. Other calls of compute() (fix numdiff) don't touch it.
  struct Evaluation {
    ubmd::Graph graph;
    std::vector<double> energies;  // [n_local], in the run's unit as all below
    std::vector<double> gradient;  // [P, 3] dE/d(edge vector)
  };

  // Ask the next compute() to keep its evaluation, and of the model's graph what the bias needs that is to follow.
  void request(ubmd::Keep keep);
  // The kept evaluation; an error if compute() didn't run since request().
  const Evaluation &kept() const;
  // Uncertainties of the owned atoms (graph order) of the kept evaluation. Ranks must call it together.
  std::vector<double> atomic_uncertainties();
  // d(sum of all atomic uncertainties)/d(edge vector) [P, 3] of the kept evaluation, after atomic_uncertainties().
  std::vector<double> atomic_bias();
  // Free what was kept.
  void release();

  ubmd::Model &model();
  ubmd::Timer &timer() { return timer_; }
  // Energies, forces and uncertainties of this style are in it.
  const ubmd::EnergyUnit &unit() const { return unit_; }
  // Element of a LAMMPS type, "" if it has none.
  std::string element(int type) const;
  bool has_element(int type) const { return species_[type - 1] >= 0; }

  // Add the edge gradients to f [nall, stride], its first three columns: sign * dE/dx for E with this gradient (sign
  // -1: forces). Ghosts included.
  static void scatter(const ubmd::Graph &, const std::vector<double> &gradient, double sign, double *f, int stride = 3);
  // Sum over edges of r ⊗ gradient (dE/dstrain of this rank), rows of r first: xx xy xz yx ...
  static void strain_derivative(const ubmd::Graph &, const std::vector<double> &gradient, double *derivative);

 private:
  void allocate();
  void read_option(const std::string &, const std::string &);
  void evaluate(Evaluation &);
  void evaluate_atoms(const Evaluation &);
  void sum_member_forces(const ubmd::Graph &, const std::vector<std::vector<double>> &);
  void check_finite(const Evaluation &) const;
  void tally(const Evaluation &);
  void tally_virial(const Evaluation &);
  void build(Evaluation &);

  enum class Kept { nothing, requested, done };

  ubmd::Precision precision_ = ubmd::Precision::mixed;
  std::string device_ = "cpu";
  bool timing_ = false;
  ubmd::EnergyUnit unit_{1.0, "eV"};
  std::unique_ptr<ubmd::Model> model_;
  std::vector<std::string> names_;  // element of each type or NULL
  std::vector<int> species_;        // species index of each type, -1 for NULL
  Evaluation scratch_, kept_;
  Kept state_ = Kept::nothing;
  ubmd::Keep keep_ = ubmd::Keep::nothing;
  int uncertainty_flag_ = 0;           // set to 1 by fix pair; 2: computed
  std::vector<double> uncertainties_;  // [nmax] for fix pair
  std::vector<double> member_forces_;  // [n_local, 3, M] of an ensemble, eV/Å
  std::vector<double> exchanged_;      // [nall, 3] what one communication moves
  ubmd::Timer timer_;
};

}  // namespace LAMMPS_NS
