// pair_style ubmd: energies, forces and virials of a model file; on request it keeps what fix ubmd needs for u and
// bias.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "atomic_uncertainties.h"
#include "geometry.h"
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

  // Ask the next compute() for features, and for what the bias needs that is to follow. Other calls of compute() (fix
  // numdiff) don't change its results.
  void request(const ubmd::Request &request);
  // An error if compute() didn't run since request().
  void check_evaluated() const;
  // Owned atoms that take part: with an element, and not absent by an exclusion from all others.
  std::int64_t n_atoms() const { return static_cast<std::int64_t>(participants().size()); }
  // Their indices, of the last evaluation.
  const std::vector<int> &participants() const { return geometry_->centres(); }
  // Uncertainties of the last evaluation that computed them, by atom index; 0 for atoms that take no part.
  const double *uncertainties() const { return uncertainties_.data(); }
  // The kept blocks: all of this rank if the request named a bias, else none.
  std::size_t n_pieces() const { return n_kept_; }
  const ubmd::Block &block(std::size_t k) const { return kept_[k]; }
  // Forces of this style alone [nall, 3], ghosts included, and dE/dstrain of this rank [9].
  const std::vector<double> &own_forces() const { return own_forces_; }
  const double *own_strain() const { return own_strain_; }
  // Prepare the bias along weight·phi, or (without a weight) along the sum of all atomic uncertainties. Ranks call it
  // together.
  void set_bias(const std::vector<double> *weight);
  // d(what is biased)/d(vector) [P, 3] of a kept block.
  ubmd::Values bias(std::size_t k);
  // Free what was kept.
  void release();

  // Of a crystal: the largest displacement of any atom from its site in the evaluation that was asked for features, Å;
  // else 0. Ranks call it together.
  double largest_displacement() const;

  ubmd::Model &model();
  // Whether there is a model with an uncertainty that a fix can have no objection to.
  bool is_ready_for_bias() const { return model_ && model_->metadata().projections > 0 && !model_->is_crystal(); }
  ubmd::Timer &timer() { return timer_; }
  // Energies, forces and uncertainties of this style are in it.
  const ubmd::EnergyUnit &unit() const { return unit_; }
  // Element of a LAMMPS type, "" if it has none.
  std::string element(int type) const;
  bool has_element(int type) const { return species_[type - 1] >= 0; }

 private:
  void allocate();
  void read_option(const std::string &, const std::string &);
  std::size_t block_size() const;
  void read_atoms();
  void evaluate(const ubmd::Request &);
  void evaluate_piece(const ubmd::Request &, const ubmd::Block &);
  void add_to_atoms(const ubmd::Request &, const ubmd::Block &, ubmd::Forces);
  void evaluate_uncertainties(const ubmd::Request &, const ubmd::Block &);
  void check_finite(const ubmd::Block &, const ubmd::Forces &) const;
  void tally(const ubmd::Block &, const ubmd::Forces &);
  void tally_virial(const ubmd::Block &, const ubmd::Values &gradient);

  enum class Kept { nothing, requested, done };

  std::optional<ubmd::Precision> precision_;  // that was asked for
  std::string device_ = "cpu";
  bool timing_ = false;
  ubmd::EnergyUnit unit_{1.0, "eV"};
  std::unique_ptr<ubmd::Model> model_;
  std::unique_ptr<ubmd::Geometry> geometry_;
  std::unique_ptr<ubmd::AtomicUncertainties> atomic_;
  std::vector<std::string> names_;  // element of each type or NULL
  std::vector<int> species_;        // species index of each type, -1 for NULL
  std::size_t chunk_ = 0;           // largest block; 0: as the device needs it
  ubmd::Block scratch_;             // the block at hand, if it isn't kept
  std::vector<ubmd::Block> kept_;   // n_kept_ of them in use: the others keep their memory
  std::size_t n_kept_ = 0;
  std::vector<double> own_forces_;  // of the evaluation whose blocks are kept
  double own_strain_[9] = {};
  Kept state_ = Kept::nothing;
  ubmd::Request request_;
  int uncertainty_flag_ = 0;           // set to 1 by fix pair; 2: computed
  std::vector<double> uncertainties_;  // [nmax]
  bool bias_of_atoms_ = false;
  ubmd::Timer timer_;
};

}  // namespace LAMMPS_NS
