// fix ubmd: the uncertainty of pair_style ubmd as a monitor, and the bias along its gradient.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "fix.h"
#include "model.h"
#include "window.h"

namespace LAMMPS_NS {

class FixUBMD : public Fix {
 public:
  FixUBMD(class LAMMPS *, int, char **);
  ~FixUBMD() override;

  int setmask() override;
  void init() override;
  void post_integrate() override;
  void post_neighbor() override;
  void setup_pre_force(int) override;
  void pre_force(int) override;
  void min_pre_force(int) override;
  void setup(int) override;
  void post_force(int) override;
  void min_setup(int) override;
  void min_post_force(int) override;
  void post_run() override;

  double compute_scalar() override;
  double compute_vector(int) override;
  double memory_usage() override;

  void grow_arrays(int) override;
  void copy_arrays(int, int, int) override;
  void set_arrays(int) override;
  int pack_exchange(int, double *) override;
  int unpack_exchange(int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;

  void write_restart(FILE *) override;
  void restart(char *) override;
  int pack_restart(int, double *) override;
  void unpack_restart(int, int) override;
  int size_restart(int) override;
  int maxsize_restart() override;

 private:
  struct Settings {
    double force = 0.0;                     // tau
    double stress = 0.0;                    // tau_s
    std::map<std::string, double> species;  // factors on tau
    bool atomic = false;                    // bias the sum of atomic uncertainties instead of u
    bool atoms = true;                      // evaluate atomic uncertainties
    int window = 100;
    int every = 1;
    std::string save_file;    // empty: save nothing
    double save_above = 0.0;  // on the largest u_i; in the run's units, as all energies and forces here
    int save_every = 1;
    double stop = -1.0;  // on the largest u_i; negative: never
  };

  // Norms of the last evaluation, summed over all ranks.
  struct Norms {
    double forces = 0.0;              // sum |F|^2
    double uncertainty_forces = 0.0;  // sum |du/dx|^2
    double stress = 0.0;              // |σ|^2
    double uncertainty_stress = 0.0;  // |σ_u|^2
  };

  // Of an atom: tag, type, unwrapped position, u_i.
  using Row = std::array<double, 6>;

  // Where the last run (no minimisation) left the atoms, for the setup of the next; only if frames are saved.
  struct End {
    bigint step = -1;                // negative: no run yet, or already tested
    std::vector<Row> atoms;          // as of gather_atoms()
    std::array<double, 9> box = {};  // as of box()
  };

  // In a setup, atoms and box are as the last run left them, or changed with no step in between, or later.
  enum class Start { same, changed, later };

  void parse(int, char **);
  int parse_species(int, int, char **);
  int parse_save(int, int, char **);
  double positive(const char *, const char *);
  int count(const char *, const char *);
  void check_pair();
  void check_crystal();
  void prepare_species();
  void check_stride();
  void open_file();
  void warm_up();

  bool minimising() const;
  bool on_trial() const;
  bool biasing() const { return (settings_.force > 0.0 || settings_.stress > 0.0) && !minimising(); }
  void request(bool);
  ubmd::Request request_of_evaluation() const;
  void post(int);
  void evaluate();
  void evaluate_uncertainty(std::vector<double> *);
  void collect_atoms();
  Norms evaluate_bias(const std::vector<double> *);
  void add_piece(std::size_t, double *);
  void sum_strain_derivatives(const double *, Norms &);
  void update_bias(const Norms &);
  void clear_bias();
  void apply(bool evaluated);
  void check_stop();
  void check_save();
  Start compare_with_last_run();
  void save_frame();
  std::array<double, 9> box() const;
  std::vector<Row> gather_atoms() const;

  Settings settings_;
  class PairUBMD *pair_ = nullptr;
  std::vector<double> strength_;  // tau of each type
  ubmd::Window force_window_{1}, stress_window_{1};

  bool warm_ = false;
  bool due_ = false;  // this step is evaluated
  bool in_setup_ = false;
  bool listed_ = true;  // the neighbour lists of this step were built, if they are to be
  bool has_first_ = false;
  bigint first_ = 0;                   // first evaluated MD step: evaluations are at first + k * every
  std::vector<double> work_;           // [nall, 6] forces and uncertainty forces
  double uncertainty_strain_[9] = {};  // du/dstrain
  double bias_virial_[6] = {};         // held, whole system

  double u_ = 0.0, u_max_ = 0.0, u_mean_ = 0.0, energy_ = 0.0, ratio_ = 0.0;
  double force_scale_ = 0.0, stress_scale_ = 0.0;
  double sigma_ = 0.0, displacement_ = 0.0;  // of the total energy; largest displacement from a site, Å
  bigint n_atoms_ = 0;                       // with an element, over all ranks
  bool stopped_ = false, forced_timeout_ = false;
  bigint frames_ = 0, last_saved_ = -1, last_block_ = -1;
  End end_;
  FILE *file_ = nullptr;
};

}  // namespace LAMMPS_NS
