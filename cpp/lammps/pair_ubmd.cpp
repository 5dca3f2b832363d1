#include "pair_ubmd.h"

#include <mpi.h>

#include <cmath>

#include "atom.h"
#include "citeme.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "loaders.h"
#include "memory.h"
#include "replica_group.h"
#include "ubmd_error.h"
#include "update.h"
#include "utils.h"

namespace LAMMPS_NS {

namespace {

const char cite_pair_ubmd[] =
    "pair_style ubmd: doi:10.1021/acs.jctc.0c00347, doi:10.1021/acs.jctc.1c00527\n\n"
    "@Article{Zaverkin2020,\n"
    " author = {Zaverkin, V. and K{\\\"a}stner, J.},\n"
    " title = {{G}aussian Moments as Physically Inspired Molecular Descriptors for Accurate and Scalable\n"
    "          Machine Learning Potentials},\n"
    " journal = {J.~Chem.\\ Theory Comput.},\n"
    " year = 2020,\n"
    " volume = 16,\n"
    " pages = {5410--5421},\n"
    " doi = {10.1021/acs.jctc.0c00347}\n"
    "}\n\n"
    "@Article{Zaverkin2021,\n"
    " author = {Zaverkin, V. and Holzm{\\\"u}ller, D. and Steinwart, I. and K{\\\"a}stner, J.},\n"
    " title = {Fast and Sample-Efficient Interatomic Neural Network Potentials for Molecules and Materials Based on\n"
    "          {G}aussian Moments},\n"
    " journal = {J.~Chem.\\ Theory Comput.},\n"
    " year = 2021,\n"
    " volume = 17,\n"
    " pages = {6658--6670},\n"
    " doi = {10.1021/acs.jctc.1c00527}\n"
    "}\n\n"
    "@Misc{ubmd,\n"
    " author = {{The ubmd developers}},\n"
    " title = {ubmd: uncertainty-biased molecular dynamics for learning interatomic potentials}\n"
    "}\n\n";

}  // namespace

PairUBMD::PairUBMD(LAMMPS *lmp) : Pair(lmp) {
  if (lmp->citeme) lmp->citeme->add(cite_pair_ubmd);
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

// pair_style ubmd [precision mixed|single|double] [device cpu|cuda[:n]] [timing yes|no] [chunk N]
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
      error->all(FLERR, "pair_style ubmd: precision must be mixed, single or double, not '{}'", value);
  } else if (keyword == "device") {
    if (value != "cpu" && value != "cuda" && !utils::strmatch(value, "^cuda:\\d+$"))
      error->all(FLERR, "pair_style ubmd: device must be cpu, cuda or cuda:n, not '{}'", value);
    device_ = value;
  } else if (keyword == "timing") {
    timing_ = utils::logical(FLERR, value, false, lmp) == 1;
  } else if (keyword == "chunk") {
    const int atoms = utils::inumeric(FLERR, value, false, lmp);
    if (atoms < 1) error->all(FLERR, "pair_style ubmd: chunk must be 1 or more, not {}", value);
    chunk_ = static_cast<std::size_t>(atoms);
  } else {
    error->all(FLERR, "pair_style ubmd has no keyword '{}': use precision, device, timing or chunk", keyword);
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
    const auto &loader = ubmd::loader_of(arg[2]);
    const auto record = loader.record(arg[2]);
    if (record) ubmd::map_elements(ubmd::parse_metadata(*record, arg[2]), names_, arg[2]);  // before its code runs
    auto model = ubmd::ReplicaGroup::load(loader, arg[2], record,
                                          {precision_, device_, comm->nthreads, unit_.per_ev, block_size()});
    species_ = ubmd::map_elements(model->metadata(), names_, arg[2]);
    geometry_ = ubmd::make_geometry(lmp, *this, *model, species_, timer_);
    atomic_ = ubmd::make_atomic_uncertainties(lmp, *this, *model, timer_);
    model_ = std::move(model);
    if (model_->metadata().layers > 1 && chunk_ > 0)
      error->all(FLERR,
                 "pair_style ubmd: model file {} has message passing, which needs all atoms at once: remove 'chunk {}'",
                 arg[2], chunk_);
    ubmd::Request plain;
    plain.n_atoms = atom->nlocal;
    model_->warm_up(plain);
  } catch (const ubmd::Error &problem) {
    error->all(FLERR, "pair_style ubmd: {}", problem.what());
  }
  for (int i = 1; i <= atom->ntypes; ++i)
    for (int j = 1; j <= atom->ntypes; ++j) setflag[i][j] = has_element(i) && has_element(j);
}

// Large matrix products, little memory; a GPU needs more atoms to be used well.
std::size_t PairUBMD::block_size() const {
  if (chunk_ > 0) return chunk_;
  return device_ == "cpu" ? 512 : 4096;
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
               "pair_style ubmd needs Newton's third law across processors: put 'newton on' before the box is created");
  if (!atom->tag_enable) error->all(FLERR, "pair_style ubmd needs atom IDs: remove 'atom_modify id no'");
  if (atom->molecular != Atom::ATOMIC)
    for (int k = 1; k < 4; ++k)
      if (force->special_lj[k] == 0.0 && force->special_coul[k] == 0.0)
        error->all(FLERR, "pair_style ubmd needs bonded neighbours too: add 'special_bonds lj/coul 1.0 1.0 1.0'");
  model();  // or an error
  geometry_->init();
}

double PairUBMD::init_one(int, int) {
  return geometry_->range();
}

void PairUBMD::compute(int eflag, int vflag) {
  ev_init(eflag, vflag);
  if ((vflag_atom || cvflag_atom) && model_->metadata().layers > 1)
    error->all(FLERR,
               "pair_style ubmd has no virials per atom for a model with message passing, whose energies depend on "
               "atoms beyond the cutoff: remove compute stress/atom, centroid/stress/atom and heat/flux");
  read_atoms();
  ubmd::Request request = state_ == Kept::requested ? request_ : ubmd::Request();
  request.n_atoms = n_atoms();
  request.strain = model_->is_crystal() && vflag_global;
  if (uncertainty_flag_ == 1) request.atoms = true;  // of fix pair: once, because fix numdiff calls compute() again
  try {
    evaluate(request);
  } catch (const ubmd::Error &problem) {
    error->one(FLERR, "pair_style ubmd: {}", problem.what());
  }
  if (uncertainty_flag_ == 1) uncertainty_flag_ = 2;
  if (state_ == Kept::requested) state_ = Kept::done;
}

void PairUBMD::read_atoms() {
  const ubmd::Timer::Scope scope(timer_, ubmd::Timer::graph);
  const int bad = ubmd::find_non_finite(ubmd::atoms_of(*atom));
  if (bad >= 0)
    error->one(
        FLERR,
        "the position of atom {} is not a number at step {}: use a shorter time step or a better initial structure",
        atom->tag[bad], update->ntimestep);
  geometry_->read(state_ == Kept::requested);
}

// Block by block, of equal sizes.
void PairUBMD::evaluate(const ubmd::Request &request) {
  if (request.structure) n_kept_ = 0;
  if (request.bias != ubmd::Bias::none) {
    own_forces_.assign(3 * static_cast<std::size_t>(atom->nlocal + atom->nghost), 0.0);
    for (double &component : own_strain_) component = 0.0;
  }
  if (request.atoms) uncertainties_.assign(atom->nmax, 0.0);
  if (request.atoms) atomic_->start();
  model_->start(request);
  const std::size_t n = geometry_->centres().size(), limit = model_->largest_block();
  const std::size_t n_blocks = n / limit + (n % limit != 0);
  const auto build = [&](ubmd::Block &block, std::size_t k) -> const ubmd::Block & {
    const ubmd::Timer::Scope scope(timer_, ubmd::Timer::graph);
    geometry_->build(block, k * n / n_blocks, (k + 1) * n / n_blocks);
    return block;
  };
  const bool keep = request.bias != ubmd::Bias::none;
  if (keep) n_kept_ = n_blocks;
  if (kept_.size() < n_kept_) kept_.resize(n_kept_);
  // All of them before the first result: they keep their memory, and between results it would divide what these free.
  for (std::size_t k = 0; keep && k < n_blocks; ++k) build(kept_[k], k);
  for (std::size_t k = 0; k < n_blocks; ++k) evaluate_piece(request, keep ? kept_[k] : build(scratch_, k));
  if (request.atoms) atomic_->finish(geometry_->centres(), uncertainties_.data());
}

void PairUBMD::evaluate_piece(const ubmd::Request &request, const ubmd::Block &block) {
  ubmd::Forces result;
  {
    const ubmd::Timer::Scope scope(timer_, ubmd::Timer::network);
    result = model_->evaluate(block);
  }
  add_to_atoms(request, block, std::move(result));
  evaluate_uncertainties(request, block);
}

// Energies, forces and virials of a block; its gradient is not needed any more.
void PairUBMD::add_to_atoms(const ubmd::Request &request, const ubmd::Block &block, ubmd::Forces result) {
  const ubmd::Timer::Scope scope(timer_, ubmd::Timer::graph);
  if (vflag_global) geometry_->subtract_strain_derivative(block, result.gradient, virial);
  result.gradient = geometry_->in_box(std::move(result.gradient));
  check_finite(block, result);
  ubmd::add_gradient(block, result.gradient.data(), -1.0, atom->f[0], 3);
  tally(block, result);
  if (request.bias == ubmd::Bias::none) return;
  ubmd::add_gradient(block, result.gradient.data(), -1.0, own_forces_.data(), 3);
  if (!block.of_sites) ubmd::add_strain_derivative(block, result.gradient.data(), own_strain_);
}

// What the request asks of the block that was just evaluated.
void PairUBMD::evaluate_uncertainties(const ubmd::Request &request, const ubmd::Block &block) {
  const ubmd::Timer::Scope scope(timer_, ubmd::Timer::uncertainty);
  if (request.structure) model_->add_features();
  if (request.atoms) atomic_->add(block, uncertainties_.data());
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

void PairUBMD::check_finite(const ubmd::Block &block, const ubmd::Forces &result) const {
  for (std::size_t i = 0; i < result.energies.size(); ++i)
    if (!std::isfinite(result.energies[i]))
      error->one(FLERR, "the energy of atom {} is not a number at step {}: two atoms may lie on top of each other",
                 atom->tag[block.centres[i]], update->ntimestep);
}

// Energies, and virials per atom.
void PairUBMD::tally(const ubmd::Block &block, const ubmd::Forces &result) {
  if (eflag_global)
    for (double energy : result.energies) eng_vdwl += energy;
  if (eflag_atom)
    for (std::size_t i = 0; i < result.energies.size(); ++i) eatom[block.centres[i]] += result.energies[i];
  if (vflag_atom || cvflag_atom) tally_virial(block, result.gradient);
}

// An edge gives all of -r ⊗ dE_centre/dr to its neighbour: only this split makes the heat flux correct, because the
// energy E_centre moves through the motion of the neighbour.
void PairUBMD::tally_virial(const ubmd::Block &block, const ubmd::Values &gradient) {
  static const int rows[9] = {0, 1, 2, 0, 0, 1, 1, 2, 2};
  static const int columns[9] = {0, 1, 2, 1, 2, 2, 0, 0, 1};
  for (std::size_t i = 0; i < block.centres.size(); ++i)
    for (auto e = block.first[i]; e < block.first[i + 1]; ++e) {
      const int j = block.ends[e];
      const double *centre = atom->x[block.centres[i]], *end = atom->x[j];
      const double r[3] = {end[0] - centre[0], end[1] - centre[1], end[2] - centre[2]};
      const double *g = gradient.data() + 3 * e;
      if (vflag_atom)
        for (int k = 0; k < 6; ++k) vatom[j][k] -= r[rows[k]] * g[columns[k]];
      if (cvflag_atom)
        for (int k = 0; k < 9; ++k) cvatom[j][k] -= r[rows[k]] * g[columns[k]];
    }
}

void PairUBMD::request(const ubmd::Request &request) {
  state_ = Kept::requested;
  request_ = request;
}

void PairUBMD::check_evaluated() const {
  if (state_ != Kept::done)
    error->all(FLERR, "fix ubmd found no forces of pair_style ubmd in this step: remove 'pair_modify compute no'");
}

void PairUBMD::set_bias(const std::vector<double> *weight) {
  bias_of_atoms_ = weight == nullptr;
  if (weight) model_->set_weight(*weight);
  if (bias_of_atoms_) atomic_->start_bias();
}

ubmd::Values PairUBMD::bias(std::size_t k) {
  return bias_of_atoms_ ? atomic_->bias(k, kept_[k]) : geometry_->in_box(model_->bias(k));
}

void PairUBMD::release() {
  state_ = Kept::nothing;
  n_kept_ = 0;
  model().release();
}

int PairUBMD::pack_forward_comm(int n, int *list, double *buffer, int, int *) {
  return atomic_->pack_forward_comm(n, list, buffer);
}

void PairUBMD::unpack_forward_comm(int n, int first, double *buffer) {
  atomic_->unpack_forward_comm(n, first, buffer);
}

int PairUBMD::pack_reverse_comm(int n, int first, double *buffer) {
  return atomic_->pack_reverse_comm(n, first, buffer);
}

void PairUBMD::unpack_reverse_comm(int n, int *list, double *buffer) {
  atomic_->unpack_reverse_comm(n, list, buffer);
}

double PairUBMD::largest_displacement() const {
  return geometry_->largest_displacement();
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
  double bytes = Pair::memory_usage() + scratch_.bytes();
  for (const auto &block : kept_) bytes += block.bytes();
  if (geometry_) bytes += geometry_->bytes() + atomic_->bytes();
  return bytes + static_cast<double>((uncertainties_.capacity() + own_forces_.capacity()) * sizeof(double));
}

}  // namespace LAMMPS_NS
