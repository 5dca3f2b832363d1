#include "pair_ubmd.h"

#include <mpi.h>

#include <cmath>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "ubmd_error.h"
#include "update.h"
#include "utils.h"

namespace LAMMPS_NS {

PairUBMD::PairUBMD(LAMMPS *lmp) : Pair(lmp) {
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  no_virial_fdotr_compute = 1;  // the virial is summed over edges, as is the per-atom one
  centroidstressflag = CENTROID_AVAIL;
  comm_forward = comm_reverse = 3;  // a member of an ensemble at a time
}

PairUBMD::~PairUBMD() {
  if (copymode || !allocated) return;
  memory->destroy(setflag);
  memory->destroy(cutsq);
}

// pair_style ubmd [precision mixed|single|double] [device cpu|cuda[:n]] [timing yes|no]
void PairUBMD::settings(int narg, char **arg) {
  if (narg % 2)
    error->all(FLERR, "pair_style ubmd takes pairs of a keyword and a value, but '{}' has no value", arg[narg - 1]);
  for (int i = 0; i < narg; i += 2) read_option(arg[i], arg[i + 1]);
}

void PairUBMD::read_option(const std::string &keyword, const std::string &value) {
  if (keyword == "precision") {
    if (value == "mixed")
      precision_ = ubmd::Precision::mixed;
    else if (value == "single")
      precision_ = ubmd::Precision::single_;
    else if (value == "double")
      precision_ = ubmd::Precision::double_;
    else
      error->all(FLERR, "pair_style ubmd: precision is mixed, single or double, not '{}'", value);
  } else if (keyword == "device") {
    if (value != "cpu" && value != "cuda" && !utils::strmatch(value, "^cuda:\\d+$"))
      error->all(FLERR, "pair_style ubmd: device is cpu, cuda or cuda:n, not '{}'", value);
    device_ = value;
  } else if (keyword == "timing") {
    timing_ = utils::logical(FLERR, value, false, lmp) == 1;
  } else {
    error->all(FLERR, "pair_style ubmd has no keyword '{}': use precision, device or timing", keyword);
  }
}

// pair_coeff * * model.pt name-of-type-1 name-of-type-2 ...
void PairUBMD::coeff(int narg, char **arg) {
  if (!allocated) allocate();
  if (narg < 3)
    error->all(FLERR, "pair_coeff of pair_style ubmd is: pair_coeff * * model.pt name-of-type-1 name-of-type-2 ...");
  if (narg - 3 != atom->ntypes)
    error->all(
        FLERR,
        "pair_coeff of pair_style ubmd names {} elements but there are {} atom types: give one name (or NULL) per type",
        narg - 3, atom->ntypes);
  names_.assign(arg + 3, arg + narg);
  try {
    unit_ = ubmd::energy_unit(update->unit_style);
    model_ = std::make_unique<ubmd::Model>(arg[2], precision_, device_, comm->nthreads, unit_.per_ev);
    species_ = ubmd::map_elements(model_->metadata(), names_, arg[2]);
  } catch (const ubmd::Error &problem) {
    error->all(FLERR, "pair_style ubmd: {}", problem.what());
  }
  for (int i = 1; i <= atom->ntypes; ++i)
    for (int j = 1; j <= atom->ntypes; ++j) setflag[i][j] = has_element(i) && has_element(j);
}

void PairUBMD::allocate() {
  allocated = 1;
  const int n = atom->ntypes + 1;
  memory->create(setflag, n, n, "pair:setflag");
  memory->create(cutsq, n, n, "pair:cutsq");
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) setflag[i][j] = 0;
}

void PairUBMD::init_style() {
  if (!force->newton_pair)
    error->all(FLERR,
               "pair_style ubmd needs Newton's third law across processors: put 'newton on' before the box is made");
  if (!atom->tag_enable) error->all(FLERR, "pair_style ubmd needs atom IDs: remove 'atom_modify id no'");
  if (atom->molecular != Atom::ATOMIC)
    for (int k = 1; k < 4; ++k)
      if (force->special_lj[k] == 0.0 && force->special_coul[k] == 0.0)
        error->all(FLERR, "pair_style ubmd needs bonded neighbours too: add 'special_bonds lj/coul 1.0 1.0 1.0'");
  neighbor->add_request(this, NeighConst::REQ_FULL);
}

double PairUBMD::init_one(int, int) {
  return model().metadata().cutoff;
}

void PairUBMD::compute(int eflag, int vflag) {
  ev_init(eflag, vflag);
  Evaluation &evaluation = state_ == Kept::requested ? kept_ : scratch_;
  build(evaluation);
  evaluate(evaluation);
  check_finite(evaluation);
  if (uncertainty_flag_ == 1) evaluate_atoms(evaluation);
  if (state_ == Kept::requested) state_ = Kept::done;
  scatter(evaluation.graph, evaluation.gradient, -1.0, atom->f[0]);
  tally(evaluation);
}

void PairUBMD::build(Evaluation &evaluation) {
  const ubmd::Timer::Scope scope(timer_, ubmd::Timer::graph);
  const int nall = atom->nlocal + atom->nghost;
  const ubmd::Atoms atoms{atom->nlocal, nall, nall ? atom->x[0] : nullptr, atom->type};
  const int bad = ubmd::find_non_finite(atoms);
  if (bad >= 0)
    error->one(FLERR, "the position of atom {} is not a number at step {}: use a shorter time step or a better start",
               atom->tag[bad], update->ntimestep);
  const ubmd::Neighbours neighbours{list->inum, list->ilist, list->numneigh, list->firstneigh, NEIGHMASK};
  ubmd::build_graph(atoms, neighbours, species_, model_->metadata().cutoff, evaluation.graph);
}

void PairUBMD::evaluate(Evaluation &evaluation) {
  const ubmd::Timer::Scope scope(timer_, ubmd::Timer::network);
  try {
    if (state_ == Kept::requested)
      model_->forces_and_features(evaluation.graph, keep_, evaluation.energies, evaluation.gradient);
    else
      model_->forces(evaluation.graph, evaluation.energies, evaluation.gradient);
  } catch (const std::exception &problem) {
    error->one(FLERR, "pair_style ubmd: {}", problem.what());
  }
}

// Atomic uncertainties for fix pair: only in steps that ask, and once (fix numdiff calls compute() again).
void PairUBMD::evaluate_atoms(const Evaluation &evaluation) {
  const ubmd::Timer::Scope scope(timer_, ubmd::Timer::uncertainty);
  uncertainty_flag_ = 2;
  uncertainties_.assign(atom->nmax, 0.0);
  try {
    std::vector<double> values;
    if (model_->is_ensemble()) {
      sum_member_forces(evaluation.graph, model_->member_gradients(evaluation.graph));
      values = model_->force_uncertainties(member_forces_, nullptr);
    } else {
      values = model_->atomic_uncertainties(evaluation.graph);
    }
    for (std::size_t i = 0; i < values.size(); ++i) uncertainties_[evaluation.graph.atoms[i]] = values[i];
  } catch (const std::exception &problem) {
    error->one(FLERR, "pair_style ubmd: {}", problem.what());
  }
}

// `fix ID group pair N ubmd uncertainty 1` gives atomic uncertainties to dumps and computes.
void *PairUBMD::extract(const char *name, int &dimension) {
  dimension = 0;
  return std::string(name) == "uncertainty_flag" ? &uncertainty_flag_ : nullptr;
}

void *PairUBMD::extract_peratom(const char *name, int &columns) {
  if (std::string(name) != "uncertainty") return nullptr;
  columns = 0;
  if (uncertainties_.size() < static_cast<std::size_t>(atom->nmax)) uncertainties_.resize(atom->nmax, 0.0);
  return uncertainties_.data();
}

void PairUBMD::check_finite(const Evaluation &evaluation) const {
  for (std::size_t i = 0; i < evaluation.energies.size(); ++i)
    if (!std::isfinite(evaluation.energies[i]))
      error->one(FLERR, "the energy of atom {} is not a number at step {}: two atoms may lie on top of each other",
                 atom->tag[evaluation.graph.atoms[i]], update->ntimestep);
}

void PairUBMD::scatter(const ubmd::Graph &graph, const std::vector<double> &gradient, double sign, double *f,
                       int stride) {
  const auto n = graph.n_edges();
  for (std::int64_t e = 0; e < n; ++e) {
    double *centre = f + stride * graph.atoms[graph.edges[e]];
    double *neighbour = f + stride * graph.atoms[graph.edges[n + e]];
    for (int k = 0; k < 3; ++k) {
      const double g = sign * gradient[3 * e + k];  // the vector is x_neighbour - x_centre
      neighbour[k] += g;
      centre[k] -= g;
    }
  }
}

void PairUBMD::strain_derivative(const ubmd::Graph &graph, const std::vector<double> &gradient, double *derivative) {
  for (int k = 0; k < 9; ++k) derivative[k] = 0.0;
  for (std::int64_t e = 0; e < graph.n_edges(); ++e)
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) derivative[3 * a + b] += graph.vectors[3 * e + a] * gradient[3 * e + b];
}

// Energies and virials, global and per atom.
void PairUBMD::tally(const Evaluation &evaluation) {
  for (std::size_t i = 0; i < evaluation.energies.size(); ++i) {
    if (eflag_global) eng_vdwl += evaluation.energies[i];
    if (eflag_atom) eatom[evaluation.graph.atoms[i]] += evaluation.energies[i];
  }
  if (vflag_global) {
    double d[9];
    strain_derivative(evaluation.graph, evaluation.gradient, d);
    const double lammps_order[6] = {d[0], d[4], d[8], d[1], d[2], d[5]};
    for (int k = 0; k < 6; ++k) virial[k] -= lammps_order[k];
  }
  if (vflag_atom || cvflag_atom) tally_virial(evaluation);
}

// An edge gives all of -r ⊗ dE_centre/dr to its neighbour: only this split makes the heat flux right, because the
// energy E_centre moves through the motion of the neighbour.
void PairUBMD::tally_virial(const Evaluation &evaluation) {
  static const int rows[9] = {0, 1, 2, 0, 0, 1, 1, 2, 2};
  static const int columns[9] = {0, 1, 2, 1, 2, 2, 0, 0, 1};
  const auto &graph = evaluation.graph;
  const auto n = graph.n_edges();
  for (std::int64_t e = 0; e < n; ++e) {
    const int j = graph.atoms[graph.edges[n + e]];
    const double *r = &graph.vectors[3 * e];
    const double *g = &evaluation.gradient[3 * e];
    if (vflag_atom)
      for (int k = 0; k < 6; ++k) vatom[j][k] -= r[rows[k]] * g[columns[k]];
    if (cvflag_atom)
      for (int k = 0; k < 9; ++k) cvatom[j][k] -= r[rows[k]] * g[columns[k]];
  }
}

void PairUBMD::request(ubmd::Keep keep) {
  state_ = Kept::requested;
  keep_ = keep;
}

const PairUBMD::Evaluation &PairUBMD::kept() const {
  if (state_ != Kept::done)
    error->all(FLERR, "fix ubmd found no forces of pair_style ubmd in this step: remove 'pair_modify compute no'");
  return kept_;
}

std::vector<double> PairUBMD::atomic_uncertainties() {
  if (!model().is_ensemble()) return model_->atomic_uncertainties();
  sum_member_forces(kept_.graph, model_->member_gradients());
  return model_->force_uncertainties(member_forces_, nullptr);
}

// For an ensemble the derivatives of u_i with respect to the members' forces go to the ghosts, whose edges may be
// owned by other ranks; then follows the second-order product.
std::vector<double> PairUBMD::atomic_bias() {
  if (!model().is_ensemble()) return model_->atomic_bias();
  std::vector<double> derivative;
  model_->force_uncertainties(member_forces_, &derivative);
  const auto &graph = kept_.graph;
  const auto n = graph.n_edges();
  const auto n_members = static_cast<std::size_t>(model_->metadata().projections);
  std::vector<std::vector<double>> cotangents(n_members, std::vector<double>(3 * n));
  for (std::size_t m = 0; m < n_members; ++m) {
    exchanged_.assign(3 * (atom->nlocal + atom->nghost), 0.0);
    for (std::int64_t i = 0; i < graph.n_local; ++i)
      for (int k = 0; k < 3; ++k) exchanged_[3 * graph.atoms[i] + k] = derivative[(3 * i + k) * n_members + m];
    comm->forward_comm(this);
    // an edge's gradient is added to the force of its centre and taken from that of its neighbour
    for (std::int64_t e = 0; e < n; ++e)
      for (int k = 0; k < 3; ++k)
        cotangents[m][3 * e + k] =
            exchanged_[3 * graph.atoms[graph.edges[e]] + k] - exchanged_[3 * graph.atoms[graph.edges[n + e]] + k];
  }
  return model_->member_bias(cotangents);
}

// Forces of each member of an ensemble on the owned atoms, with the shares of other ranks.
void PairUBMD::sum_member_forces(const ubmd::Graph &graph, const std::vector<std::vector<double>> &gradients) {
  const auto n_members = gradients.size();
  member_forces_.assign(3 * graph.n_local * n_members, 0.0);
  for (std::size_t m = 0; m < n_members; ++m) {
    exchanged_.assign(3 * (atom->nlocal + atom->nghost), 0.0);
    scatter(graph, gradients[m], -1.0, exchanged_.data());
    comm->reverse_comm(this);
    for (std::int64_t i = 0; i < graph.n_local; ++i)
      for (int k = 0; k < 3; ++k) member_forces_[(3 * i + k) * n_members + m] = exchanged_[3 * graph.atoms[i] + k];
  }
}

int PairUBMD::pack_forward_comm(int n, int *list, double *buffer, int, int *) {
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 3; ++k) buffer[3 * i + k] = exchanged_[3 * list[i] + k];
  return 3 * n;
}

void PairUBMD::unpack_forward_comm(int n, int first, double *buffer) {
  for (int m = 0; m < 3 * n; ++m) exchanged_[3 * first + m] = buffer[m];
}

int PairUBMD::pack_reverse_comm(int n, int first, double *buffer) {
  for (int m = 0; m < 3 * n; ++m) buffer[m] = exchanged_[3 * first + m];
  return 3 * n;
}

void PairUBMD::unpack_reverse_comm(int n, int *list, double *buffer) {
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 3; ++k) exchanged_[3 * list[i] + k] += buffer[3 * i + k];
}

void PairUBMD::release() {
  state_ = Kept::nothing;
  model().release();
}

ubmd::Model &PairUBMD::model() {
  if (!model_)
    error->all(FLERR, "pair_style ubmd has no model: add 'pair_coeff * * model.pt' with one element name per type");
  return *model_;
}

std::string PairUBMD::element(int type) const {
  return has_element(type) ? names_[type - 1] : "";
}

// Printed after a run with `timing yes`.
void PairUBMD::finish() {
  if (!timing_) return;
  auto seconds = timer_.seconds();
  auto largest = seconds;
  MPI_Reduce(seconds.data(), largest.data(), static_cast<int>(seconds.size()), MPI_DOUBLE, MPI_MAX, 0, world);
  if (comm->me == 0) utils::logmesg(lmp, ubmd::Timer::report(largest));
}

double PairUBMD::memory_usage() {
  double bytes = Pair::memory_usage();
  for (const auto *evaluation : {&scratch_, &kept_})
    bytes += static_cast<double>(evaluation->graph.edges.capacity() + evaluation->graph.vectors.capacity() +
                                 evaluation->gradient.capacity() + evaluation->energies.capacity()) *
             sizeof(double);
  return bytes;
}

}  // namespace LAMMPS_NS
