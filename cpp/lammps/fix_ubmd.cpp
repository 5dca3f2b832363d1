#include "fix_ubmd.h"

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "atom.h"
#include "citeme.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "frames.h"
#include "memory.h"
#include "modify.h"
#include "neighbor.h"
#include "pair_ubmd.h"
#include "timer.h"
#include "ubmd_error.h"
#include "universe.h"
#include "update.h"
#include "utils.h"

namespace LAMMPS_NS {

using namespace FixConst;

namespace {

const char cite_fix_ubmd[] =
    "fix ubmd: doi:10.1038/s41524-024-01254-1\n\n"
    "@Article{Zaverkin2024,\n"
    " author = {Zaverkin, V. and Holzm{\\\"u}ller, D. and Christiansen, H. and Errica, F. and Alesiani, F. and\n"
    "           Takamoto, M. and Niepert, M. and K{\\\"a}stner, J.},\n"
    " title = {Uncertainty-biased molecular dynamics for learning uniformly accurate interatomic potentials},\n"
    " journal = {npj Comput.\\ Mater.},\n"
    " year = 2024,\n"
    " volume = 10,\n"
    " pages = {83},\n"
    " doi = {10.1038/s41524-024-01254-1}\n"
    "}\n\n";

constexpr int n_columns = 4;   // per-atom array: u_i, fbias_x, fbias_y, fbias_z
constexpr int n_outputs = 10;  // of the vector
// Added to the first number of the state in restart files; the first format had none and lacks two numbers.
constexpr double state_format = 2.0;

bool is_keyword(const char *word) {
  for (const char *keyword : {"force", "stress", "uncertainty", "species", "window", "every", "atoms", "save", "stop"})
    if (std::strcmp(word, keyword) == 0) return true;
  return false;
}

}  // namespace

FixUBMD::FixUBMD(LAMMPS *lmp, int narg, char **arg) : Fix(lmp, narg, arg) {
  if (lmp->citeme) lmp->citeme->add(cite_fix_ubmd);
  parse(narg, arg);
  force_window_ = ubmd::Window(settings_.window);
  stress_window_ = ubmd::Window(settings_.window);

  scalar_flag = vector_flag = peratom_flag = 1;
  size_vector = n_outputs;
  size_peratom_cols = n_columns;
  global_freq = peratom_freq = 1;
  extscalar = 1;
  extvector = 0;
  energy_global_flag = 1;
  virial_global_flag = thermo_virial = 1;
  restart_global = restart_peratom = 1;
  dynamic_group_allow = 1;
  create_attribute = 1;  // atoms created in a run start without bias
  comm_reverse = 6;
  // a barostat that comes earlier in the script reads it in its setup, before this fix has been set up
  for (double &component : virial) component = 0.0;
  maxexchange = n_columns;

  grow_arrays(atom->nmax);
  for (int i = 0; i < atom->nmax; ++i) set_arrays(i);
  atom->add_callback(Atom::GROW);
  atom->add_callback(Atom::RESTART);
  // scripts have the pair style first, as a rule: then the warm-up is over before the first run begins
  pair_ = dynamic_cast<PairUBMD *>(force->pair_match("ubmd", 1));
  if (pair_ && pair_->is_ready_for_bias()) warm_up();
}

FixUBMD::~FixUBMD() {
  if (copymode) return;
  atom->delete_callback(id, Atom::GROW);
  atom->delete_callback(id, Atom::RESTART);
  memory->destroy(array_atom);
  if (file_) std::fclose(file_);
}

// ---- settings ----

// fix ID group ubmd [force TAU] [stress TAU_S] [uncertainty energy|atomic] [species H 0.0 ...] [window N] [every K]
//                   [atoms yes|no] [save U file every M] [stop U]
void FixUBMD::parse(int narg, char **arg) {
  int i = 3;
  while (i < narg) {
    const std::string key = arg[i];
    if (!is_keyword(arg[i]))
      error->all(
          FLERR,
          "fix ubmd has no keyword '{}': use force, stress, uncertainty, species, window, every, atoms, save or stop",
          key);
    if (i + 1 >= narg) error->all(FLERR, "fix ubmd: keyword '{}' has no value", key);
    if (key == "species") {
      i = parse_species(i + 1, narg, arg);
      continue;
    }
    if (key == "save") {
      i = parse_save(i + 1, narg, arg);
      continue;
    }
    if (key == "force") settings_.force = positive("force", arg[i + 1]);
    if (key == "stress") settings_.stress = positive("stress", arg[i + 1]);
    if (key == "stop") settings_.stop = positive("stop", arg[i + 1]);
    if (key == "window") settings_.window = count("window", arg[i + 1]);
    if (key == "every") settings_.every = count("every", arg[i + 1]);
    if (key == "atoms") settings_.atoms = utils::logical(FLERR, arg[i + 1], false, lmp) == 1;
    if (key == "uncertainty") {
      settings_.atomic = std::strcmp(arg[i + 1], "atomic") == 0;
      if (!settings_.atomic && std::strcmp(arg[i + 1], "energy") != 0)
        error->all(FLERR, "fix ubmd: uncertainty must be energy or atomic, not '{}'", arg[i + 1]);
    }
    i += 2;
  }
  if (!settings_.atoms && (settings_.stop >= 0.0 || !settings_.save_file.empty() || settings_.atomic))
    error->all(FLERR,
               "fix ubmd: 'atoms no' skips the atomic uncertainties that stop, save and 'uncertainty atomic' need: "
               "remove it");
}

int FixUBMD::parse_species(int i, int narg, char **arg) {
  for (; i < narg && !is_keyword(arg[i]); i += 2) {
    if (i + 1 >= narg) error->all(FLERR, "fix ubmd: element {} of 'species' has no strength", arg[i]);
    settings_.species[arg[i]] = positive(arg[i], arg[i + 1]);
  }
  return i;
}

int FixUBMD::parse_save(int i, int narg, char **arg) {
  if (i + 1 >= narg)
    error->all(FLERR,
               "fix ubmd: save takes an atomic uncertainty and a file name, as in 'save 0.5 frames.extxyz every 100'");
  settings_.save_above = positive("save", arg[i]);
  settings_.save_file = arg[i + 1];
  if (i + 3 < narg && std::strcmp(arg[i + 2], "every") == 0) {
    settings_.save_every = count("save ... every", arg[i + 3]);
    return i + 4;
  }
  return i + 2;
}

double FixUBMD::positive(const char *name, const char *text) {
  const double value = utils::numeric(FLERR, text, false, lmp);
  if (!(value >= 0.0)) error->all(FLERR, "fix ubmd: {} must be zero or positive, not {}", name, text);
  return value;
}

int FixUBMD::count(const char *name, const char *text) {
  const int value = utils::inumeric(FLERR, text, false, lmp);
  if (value < 1) error->all(FLERR, "fix ubmd: {} must be 1 or more, not {}", name, text);
  return value;
}

int FixUBMD::setmask() {
  return POST_INTEGRATE | POST_NEIGHBOR | PRE_FORCE | POST_FORCE | MIN_PRE_FORCE | MIN_POST_FORCE | POST_RUN;
}

void FixUBMD::init() {
  if (modify->get_fix_by_style("^ubmd$").size() > 1)
    error->all(FLERR, "only one fix ubmd can be used at a time: put all keywords into one fix, or unfix the other");
  check_pair();
  check_crystal();
  prepare_species();
  check_stride();
  open_file();
  if (utils::strmatch(update->integrate_style, "^respa"))
    error->all(FLERR, "fix ubmd doesn't work with run_style respa: use run_style verlet");
  if (settings_.stress > 0.0 && !(domain->xperiodic || domain->yperiodic || domain->zperiodic))
    error->all(FLERR,
               "fix ubmd: a stress bias needs a box that is periodic in at least one direction: use 'boundary p p p' "
               "or remove 'stress'");
  warm_up();
}

// So that the first step takes no longer than the others; once, though every run begins with init().
void FixUBMD::warm_up() {
  if (warm_) return;
  warm_ = true;
  try {
    auto what = request_of_evaluation();
    what.n_atoms = atom->nlocal;
    pair_->model().warm_up(what);
  } catch (const ubmd::Error &problem) {
    error->one(FLERR, "fix ubmd: {}", problem.what());
  }
}

void FixUBMD::check_pair() {
  pair_ = dynamic_cast<PairUBMD *>(force->pair_match("ubmd", 1));
  if (!pair_)
    error->all(FLERR, "fix ubmd needs one pair_style ubmd: put 'pair_style ubmd' and its pair_coeff before the run");
  if (pair_->model().metadata().projections < 1)
    error->all(FLERR, "fix ubmd: the model file contains no uncertainty: export it again with an [uncertainty] table");
}

// A force-constant model has closed forms for the energy's uncertainty only, in its fixed cell.
void FixUBMD::check_crystal() {
  if (!pair_->model().is_crystal()) return;
  if (settings_.atomic && biasing())
    error->all(FLERR,
               "fix ubmd: 'uncertainty atomic' is not available for the force-constant model of a crystal: use "
               "'uncertainty energy'");
  if (settings_.stress > 0.0)
    error->all(
        FLERR,
        "fix ubmd: a stress bias is not available for the force-constant model of a crystal, whose cell is fixed: "
        "remove 'stress'");
}

// Strength of each type, after checking the names of `species`.
void FixUBMD::prepare_species() {
  const auto &known = pair_->model().metadata().elements;
  for (const auto &[name, factor] : settings_.species) {
    bool found = false;
    for (const auto &element : known) found = found || element == name;
    if (!found) error->all(FLERR, "fix ubmd: element {} of 'species' is not in the model", name);
  }
  strength_.assign(atom->ntypes, 0.0);
  for (int type = 1; type <= atom->ntypes; ++type) {
    if (!pair_->has_element(type)) continue;
    const auto factor = settings_.species.find(pair_->element(type));
    strength_[type - 1] = settings_.force * (factor == settings_.species.end() ? 1.0 : factor->second);
  }
}

// Impulses that come too rarely for the fastest vibrations heat them: r-RESPA needs several in a period. Periods of
// bonds to the lightest biased element: 9 fs with hydrogen (O-H, 3700 /cm), 15 fs between second-row atoms (C-O).
void FixUBMD::check_stride() {
  if (settings_.every == 1 || settings_.force == 0.0 || update->dt <= 0.0) return;
  double lightest = 0.0;
  for (int type = 1; type <= atom->ntypes; ++type) {
    const double mass = atom->rmass || !atom->mass ? 0.0 : atom->mass[type];
    if (strength_[type - 1] != 0.0 && mass > 0.0 && (lightest == 0.0 || mass < lightest)) lightest = mass;
  }
  if (lightest == 0.0) return;
  const double fs = 1.0 / force->femtosecond;
  const double longest = (lightest < 4.0 ? 2.9 : 1.5) * std::sqrt(lightest);  // fs, a third of a period
  const double stride = settings_.every * update->dt * fs;
  if (stride > longest && comm->me == 0)
    error->warning(FLERR,
                   "fix ubmd: bias forces every {} steps ({:.3g} fs) are too rare for the vibrations of atoms of mass "
                   "{:.3g}, which they may heat: use every {}",
                   settings_.every, stride, lightest, std::max(1, static_cast<int>(longest / (update->dt * fs))));
}

// A run that continues from a restart file appends; otherwise an old file is replaced.
void FixUBMD::open_file() {
  if (settings_.save_file.empty()) return;
  int ok = 1;
  if (comm->me == 0 && !file_) {
    file_ = std::fopen(settings_.save_file.c_str(), frames_ > 0 ? "a" : "w");
    ok = file_ != nullptr;
  }
  MPI_Bcast(&ok, 1, MPI_INT, 0, world);
  if (!ok) error->all(FLERR, "fix ubmd cannot write {}: check that its folder exists", settings_.save_file);
}

// ---- when to evaluate ----

bool FixUBMD::minimising() const {
  return update->whichflag == 2;
}

// Monte Carlo fixes (gcmc, widom, atom/swap, ...) evaluate trial configurations through all fixes, before atoms are
// exchanged and the step's own lists are built. These are not the run's: they are neither tested nor saved, don't
// stop it, and don't count in the window. A step that keeps its lists has no trials, and lists that are older.
bool FixUBMD::on_trial() const {
  return !listed_ && neighbor->ago == 0;
}
void FixUBMD::post_integrate() {
  listed_ = false;
}
void FixUBMD::post_neighbor() {
  listed_ = true;
}

// Evaluations of an MD run lie at first + k * every, however many run commands it is split into. A monitor also
// evaluates every setup, so that `run 0` and `rerun` report the positions they are given.
void FixUBMD::request(bool in_setup) {
  const bigint step = update->ntimestep;
  in_setup_ = in_setup;
  if (minimising()) {
    due_ = in_setup || step % settings_.every == 0;
  } else {
    if (!has_first_) first_ = step;
    has_first_ = true;
    due_ = (step - first_) % settings_.every == 0 || (in_setup && !biasing());
  }
  if (due_) pair_->request(request_of_evaluation());
}

ubmd::Request FixUBMD::request_of_evaluation() const {
  ubmd::Request request;
  request.structure = true;
  request.atoms = settings_.atoms;
  if (biasing()) request.bias = settings_.atomic ? ubmd::Bias::atomic : ubmd::Bias::structure;
  return request;
}

void FixUBMD::setup_pre_force(int) {
  listed_ = true;
  request(true);
}
void FixUBMD::pre_force(int) {
  if (!on_trial()) request(false);
}
void FixUBMD::min_pre_force(int) {
  request(false);
}
void FixUBMD::setup(int vflag) {
  post(vflag);
}
void FixUBMD::post_force(int vflag) {
  if (!on_trial()) post(vflag);
}
void FixUBMD::min_setup(int vflag) {
  post(vflag);
}
void FixUBMD::min_post_force(int vflag) {
  post(vflag);
}

void FixUBMD::post(int vflag) {
  v_init(vflag);
  if (minimising()) clear_bias();
  const bool evaluated = due_;
  if (evaluated) evaluate();
  due_ = false;
  apply(evaluated);
}

// ---- evaluation: two phases, because u is a non-linear function of a sum over all ranks ----

void FixUBMD::evaluate() {
  pair_->check_evaluated();
  try {
    std::vector<double> weight;
    const bool of_structure = biasing() && !settings_.atomic;
    evaluate_uncertainty(of_structure ? &weight : nullptr);
    if (settings_.atoms) collect_atoms();
    if (biasing()) update_bias(evaluate_bias(of_structure ? &weight : nullptr));
  } catch (const ubmd::Error &problem) {
    error->one(FLERR, "fix ubmd: {}", problem.what());
  }
  pair_->release();
  check_stop();
  check_save();
}

// Phase 1: u of the mean feature over all atoms, and the cotangent of each atom's feature.
void FixUBMD::evaluate_uncertainty(std::vector<double> *weight) {
  std::vector<double> local, mean;
  {
    const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::uncertainty);
    local = pair_->model().feature_sum();
  }
  local.push_back(static_cast<double>(pair_->n_atoms()));
  mean.resize(local.size());
  {
    const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::communication);
    MPI_Allreduce(local.data(), mean.data(), static_cast<int>(local.size()), MPI_DOUBLE, MPI_SUM, world);
  }
  const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::uncertainty);
  n_atoms_ = static_cast<bigint>(mean.back());
  mean.pop_back();
  const double n = std::max(1.0, static_cast<double>(n_atoms_));
  for (double &component : mean) component /= n;
  if (weight) weight->assign(mean.size(), 0.0);
  u_ = n_atoms_ > 0 ? pair_->model().uncertainty(mean, weight) : 0.0;  // fix gcmc may empty the box
  if (n_atoms_ == 0 && in_setup_ && comm->me == 0)
    error->warning(FLERR, "fix ubmd: no atom has an element of the model, u is 0: check the names in pair_coeff");
  if (!std::isfinite(u_))
    error->all(FLERR, "the uncertainty is not a number at step {}: train or export the model again", update->ntimestep);
  sigma_ = u_ * static_cast<double>(n_atoms_);
  displacement_ = pair_->largest_displacement();
  if (weight)
    for (double &component : *weight) component /= n;
}

// The atomic uncertainties, which the pair style computed with the forces. The largest one is that of the group.
void FixUBMD::collect_atoms() {
  const double *values = pair_->uncertainties();
  double sum = 0.0, largest = 0.0;
  for (int i = 0; i < atom->nlocal; ++i) {
    array_atom[i][0] = values[i];
    sum += values[i];
    if (atom->mask[i] & groupbit) largest = std::max(largest, values[i]);
  }
  const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::communication);
  MPI_Allreduce(&largest, &u_max_, 1, MPI_DOUBLE, MPI_MAX, world);
  MPI_Allreduce(&sum, &u_mean_, 1, MPI_DOUBLE, MPI_SUM, world);
  u_mean_ /= std::max(1.0, static_cast<double>(n_atoms_));
}

// Phase 2: forces and uncertainty forces of this pair style on the owned atoms (work_), and their norms over the atoms
// of the group: fixed atoms are not moved by either.
FixUBMD::Norms FixUBMD::evaluate_bias(const std::vector<double> *weight) {
  double strain[18] = {};  // dE/dstrain and d(what is biased)/dstrain of this rank
  std::copy_n(pair_->own_strain(), 9, strain);
  pair_->set_bias(weight);
  const std::size_t n_all = atom->nlocal + atom->nghost;
  work_.assign(6 * n_all, 0.0);
  for (std::size_t i = 0; i < n_all; ++i) std::copy_n(&pair_->own_forces()[3 * i], 3, &work_[6 * i]);
  for (std::size_t k = 0; k < pair_->n_pieces(); ++k) add_piece(k, strain);
  const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::communication);
  comm->reverse_comm(this);
  double local[2] = {0.0, 0.0}, sums[2];
  for (int i = 0; i < atom->nlocal; ++i)
    if (atom->mask[i] & groupbit)
      for (int k = 0; k < 6; ++k) local[k / 3] += work_[6 * i + k] * work_[6 * i + k];
  MPI_Allreduce(local, sums, 2, MPI_DOUBLE, MPI_SUM, world);
  Norms norms;
  norms.forces = sums[0];
  norms.uncertainty_forces = sums[1];
  if (settings_.stress > 0.0) sum_strain_derivatives(strain, norms);
  return norms;
}

// A block's part of the uncertainty forces, and of the derivative with respect to strain of what is biased.
void FixUBMD::add_piece(std::size_t k, double *strain) {
  const auto &block = pair_->block(k);
  ubmd::Values gradient;
  {
    const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::bias);
    gradient = pair_->bias(k);
  }
  const ubmd::Timer::Scope scope(pair_->timer(), ubmd::Timer::graph);
  ubmd::add_gradient(block, gradient.data(), 1.0, work_.data() + 3, 6);
  if (settings_.stress > 0.0) ubmd::add_strain_derivative(block, gradient.data(), strain + 9);
}

// Stresses of the whole system are derivatives with respect to strain divided by the volume; in a box that is periodic
// in some directions only, their components in these directions, divided by the area or length.
void FixUBMD::sum_strain_derivatives(const double *local, Norms &norms) {
  double sums[18];
  MPI_Allreduce(local, sums, 18, MPI_DOUBLE, MPI_SUM, world);
  const int *periodic = domain->periodicity;
  double volume = 1.0;
  for (int k = 0; k < 3; ++k)
    if (periodic[k]) volume *= domain->prd[k];
  for (int k = 0; k < 9; ++k) {
    if (!(periodic[k / 3] && periodic[k % 3])) sums[k] = sums[9 + k] = 0.0;
    norms.stress += sums[k] * sums[k] / (volume * volume);
    norms.uncertainty_stress += sums[9 + k] * sums[9 + k] / (volume * volume);
    uncertainty_strain_[k] = sums[9 + k];
  }
}

// Scales from the windows, then the bias, which is known until the next evaluation.
void FixUBMD::update_bias(const Norms &norms) {
  clear_bias();
  const bigint step = update->ntimestep;
  if (settings_.force > 0.0) {
    force_window_.add(step, norms.forces, norms.uncertainty_forces);
    force_scale_ = force_window_.scale();
  }
  if (settings_.stress > 0.0) {
    stress_window_.add(step, norms.stress, norms.uncertainty_stress);
    stress_scale_ = stress_window_.scale();
  }
  double local = 0.0, sum = 0.0;
  for (int i = 0; i < atom->nlocal; ++i) {
    if (!(atom->mask[i] & groupbit)) continue;
    const double factor = strength_[atom->type[i] - 1] * force_scale_;
    for (int k = 0; k < 3; ++k) {
      array_atom[i][1 + k] = factor * work_[6 * i + 3 + k];
      local += array_atom[i][1 + k] * array_atom[i][1 + k];
    }
  }
  MPI_Allreduce(&local, &sum, 1, MPI_DOUBLE, MPI_SUM, world);
  ratio_ = norms.forces > 0.0 ? std::sqrt(sum / norms.forces) : 0.0;
  const double biased = settings_.atomic ? u_mean_ * static_cast<double>(n_atoms_) : u_;
  energy_ = 0.0 - settings_.force * force_scale_ * biased;  // not -0
  static const int order[6] = {0, 4, 8, 1, 2, 5};           // xx yy zz xy xz yz
  for (int k = 0; k < 6; ++k) bias_virial_[k] = settings_.stress * stress_scale_ * uncertainty_strain_[order[k]];
}

void FixUBMD::clear_bias() {
  for (int i = 0; i < atom->nlocal; ++i)
    for (int k = 1; k < n_columns; ++k) array_atom[i][k] = 0.0;
  for (double &component : bias_virial_) component = 0.0;
  energy_ = ratio_ = 0.0;
}

// The bias of this step. Its forces come as impulses, `every`-fold where they are evaluated and none in between: the
// integrator of r-RESPA (Tuckerman, Berne and Martyna 1992), reversible in time. Held until the next evaluation they
// would lag behind the atoms by some (every - 1)/2 steps; since they push along the displacement, that is a friction on
// the fastest vibrations (ethanol at 300 K, every 4 steps of 0.5 fs: 160 K). The virial moves a slow barostat: it is
// held (each rank's virial is a share: rank 0 gives all of it).
void FixUBMD::apply(bool evaluated) {
  if (evaluated) {
    double **f = atom->f;
    for (int i = 0; i < atom->nlocal; ++i)
      for (int k = 0; k < 3; ++k) f[i][k] += settings_.every * array_atom[i][1 + k];
  }
  if (vflag_global && comm->me == 0)
    for (int k = 0; k < 6; ++k) virial[k] += bias_virial_[k];
}

// ---- stop and save ----

// End the run at this step; the script goes on, as after `fix halt ... error continue`.
void FixUBMD::check_stop() {
  stopped_ = settings_.stop >= 0.0 && u_max_ > settings_.stop;
  if (!stopped_) return;
  if (comm->me == 0 && !forced_timeout_)
    utils::logmesg(lmp,
                   "fix {} ubmd: the largest atomic uncertainty {:.6g} {}/A exceeds {:.6g} at step {}, the run ends\n",
                   id, u_max_, pair_->unit().name, settings_.stop, update->ntimestep);
  timer->force_timeout();
  forced_timeout_ = true;
}

void FixUBMD::post_run() {
  if (forced_timeout_) timer->reset_timeout();
  forced_timeout_ = false;
  if (!settings_.save_file.empty() && !minimising()) end_ = {update->ntimestep, gather_atoms(), box()};
}

// Frames above the limit, at the first evaluation at or after each multiple of save_every; the stopping frame always.
// The setup of a run repeats the last step of the previous run, which isn't saved twice; if the script moved the atoms
// in between, it is a frame of its own.
void FixUBMD::check_save() {
  if (settings_.save_file.empty() || minimising()) return;
  const bigint step = update->ntimestep, end = end_.step;
  const Start start = in_setup_ ? compare_with_last_run() : Start::later;
  const bigint block = (step - first_) / settings_.save_every;
  const bool regular = (block != last_block_ || start == Start::changed) && u_max_ > settings_.save_above;
  last_block_ = block;
  if (!(regular || stopped_)) return;
  if (in_setup_ && start != Start::changed && last_saved_ == (start == Start::same ? end : step)) return;
  last_saved_ = step;
  ++frames_;
  save_frame();
}

// Ranks call it together. Setups wrap atoms into the box and convert them to its coordinates and back: rounding errors
// don't count as a change.
FixUBMD::Start FixUBMD::compare_with_last_run() {
  if (end_.step < 0) return Start::later;
  constexpr double tolerance = 1e-8;  // Å
  const auto near = [](double a, double b) { return std::abs(a - b) <= tolerance; };
  const auto alike = [&](const Row &a, const Row &b) { return std::equal(a.begin(), a.end() - 1, b.begin(), near); };
  const auto atoms = gather_atoms();
  const auto edges = box();
  int same = std::equal(edges.begin(), edges.end(), end_.box.begin(), near) &&
             std::equal(atoms.begin(), atoms.end(), end_.atoms.begin(), end_.atoms.end(), alike);
  MPI_Bcast(&same, 1, MPI_INT, 0, world);
  const bool later = update->ntimestep > end_.step;
  end_ = {};
  if (same) return Start::same;
  return later ? Start::later : Start::changed;
}

// Periodicity, then what of the box is periodic (edges and tilts), Å.
std::array<double, 9> FixUBMD::box() const {
  return {static_cast<double>(domain->xperiodic),
          static_cast<double>(domain->yperiodic),
          static_cast<double>(domain->zperiodic),
          domain->xperiodic ? domain->xprd : 0.0,
          domain->yperiodic ? domain->yprd : 0.0,
          domain->zperiodic ? domain->zprd : 0.0,
          domain->xy,
          domain->xz,
          domain->yz};
}

void FixUBMD::save_frame() {
  const auto atoms = gather_atoms();
  if (comm->me != 0) return;
  ubmd::Frame frame{update->ntimestep,
                    u_,
                    u_max_,
                    {domain->xperiodic != 0, domain->yperiodic != 0, domain->zperiodic != 0},
                    {domain->xprd, 0, 0, domain->xy, domain->yprd, 0, domain->xz, domain->yz, domain->zprd},
                    {},
                    universe->nworlds > 1 ? universe->iworld : -1};
  for (const auto &[tag, type, x, y, z, uncertainty] : atoms) {
    const std::string name = pair_->element(static_cast<int>(type));
    frame.atoms.push_back({static_cast<std::int64_t>(tag), name.empty() ? "X" : name, {x, y, z}, uncertainty});
  }
  const auto text = ubmd::format_frame(frame);
  if (std::fwrite(text.data(), 1, text.size(), file_) != text.size() || std::fflush(file_) != 0)
    error->one(FLERR, "fix ubmd cannot write {}: the disk may be full", settings_.save_file);
}

// All atoms, sorted by tag, on rank 0; without those that an exclusion makes absent.
std::vector<FixUBMD::Row> FixUBMD::gather_atoms() const {
  std::vector<Row> mine;
  std::vector<bool> takes_part(atom->nlocal, false);
  for (int i : pair_->participants()) takes_part[i] = true;
  for (int i = 0; i < atom->nlocal; ++i) {
    if (!takes_part[i] && pair_->has_element(atom->type[i])) continue;
    double x[3];
    domain->unmap(atom->x[i], atom->image[i], x);  // unwrapped, so that molecules stay whole
    mine.push_back(
        {static_cast<double>(atom->tag[i]), static_cast<double>(atom->type[i]), x[0], x[1], x[2], array_atom[i][0]});
  }
  const int n = static_cast<int>(mine.size() * std::tuple_size_v<Row>);
  std::vector<int> counts(comm->nprocs), offsets(comm->nprocs, 0);
  MPI_Gather(&n, 1, MPI_INT, counts.data(), 1, MPI_INT, 0, world);
  for (int r = 1; r < comm->nprocs; ++r) offsets[r] = offsets[r - 1] + counts[r - 1];
  std::vector<Row> all(comm->me == 0 ? (offsets.back() + counts.back()) / std::tuple_size_v<Row> : 0);
  MPI_Gatherv(mine.data(), n, MPI_DOUBLE, all.data(), counts.data(), offsets.data(), MPI_DOUBLE, 0, world);
  std::sort(all.begin(), all.end());
  return all;
}

// ---- outputs ----

double FixUBMD::compute_scalar() {
  return energy_;
}

double FixUBMD::compute_vector(int i) {
  const double values[n_outputs] = {u_,
                                    u_max_,
                                    u_mean_,
                                    force_scale_,
                                    stress_scale_,
                                    ratio_,
                                    stopped_ ? 1.0 : 0.0,
                                    static_cast<double>(frames_),
                                    sigma_,
                                    displacement_};
  return values[i];
}

double FixUBMD::memory_usage() {
  return static_cast<double>(atom->nmax) * n_columns * sizeof(double) + work_.capacity() * sizeof(double) +
         static_cast<double>(end_.atoms.capacity() * sizeof(Row));
}

// ---- per-atom data: moves with the atoms ----

void FixUBMD::grow_arrays(int nmax) {
  memory->grow(array_atom, nmax, n_columns, "ubmd:array_atom");
}

void FixUBMD::copy_arrays(int i, int j, int) {
  for (int k = 0; k < n_columns; ++k) array_atom[j][k] = array_atom[i][k];
}

void FixUBMD::set_arrays(int i) {
  for (int k = 0; k < n_columns; ++k) array_atom[i][k] = 0.0;
}

int FixUBMD::pack_exchange(int i, double *buffer) {
  for (int k = 0; k < n_columns; ++k) buffer[k] = array_atom[i][k];
  return n_columns;
}

int FixUBMD::unpack_exchange(int i, double *buffer) {
  for (int k = 0; k < n_columns; ++k) array_atom[i][k] = buffer[k];
  return n_columns;
}

int FixUBMD::pack_reverse_comm(int n, int first, double *buffer) {
  for (int m = 0; m < 6 * n; ++m) buffer[m] = work_[6 * first + m];
  return 6 * n;
}

void FixUBMD::unpack_reverse_comm(int n, int *list, double *buffer) {
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 6; ++k) work_[6 * list[i] + k] += buffer[6 * i + k];
}

// ---- restart files: the windows and the held bias, so that a run continues as if it had not been interrupted ----

void FixUBMD::write_restart(FILE *restart_file) {
  if (comm->me != 0) return;
  std::vector<double> state = {state_format + (has_first_ ? 1.0 : 0.0),
                               static_cast<double>(first_),
                               static_cast<double>(frames_),
                               static_cast<double>(last_saved_),
                               static_cast<double>(last_block_),
                               u_,
                               u_max_,
                               u_mean_,
                               energy_,
                               ratio_,
                               force_scale_,
                               stress_scale_,
                               sigma_,
                               displacement_};
  state.insert(state.end(), bias_virial_, bias_virial_ + 6);
  for (const auto *window : {&force_window_, &stress_window_}) {
    const auto entries = window->state();
    state.push_back(static_cast<double>(entries.size()));
    state.insert(state.end(), entries.begin(), entries.end());
  }
  const int size = static_cast<int>(state.size() * sizeof(double));
  std::fwrite(&size, sizeof(int), 1, restart_file);
  std::fwrite(state.data(), sizeof(double), state.size(), restart_file);
}

void FixUBMD::restart(char *buffer) {
  std::size_t n = 0;
  const auto next = [&] {
    double value;
    std::memcpy(&value, buffer + sizeof(double) * n++, sizeof(double));
    return value;
  };
  const double head = next();
  const bool old = head < state_format;
  has_first_ = (old ? head : head - state_format) != 0.0;
  for (bigint *value : {&first_, &frames_, &last_saved_, &last_block_}) *value = static_cast<bigint>(next());
  for (double *value : {&u_, &u_max_, &u_mean_, &energy_, &ratio_, &force_scale_, &stress_scale_}) *value = next();
  if (!old)
    for (double *value : {&sigma_, &displacement_}) *value = next();
  for (double &component : bias_virial_) component = next();
  for (auto *window : {&force_window_, &stress_window_}) {
    std::vector<double> entries(static_cast<std::size_t>(next()));
    for (double &entry : entries) entry = next();
    window->restore(entries);
  }
}

int FixUBMD::pack_restart(int i, double *buffer) {
  buffer[0] = n_columns + 1;
  for (int k = 0; k < n_columns; ++k) buffer[1 + k] = array_atom[i][k];
  return n_columns + 1;
}

void FixUBMD::unpack_restart(int nlocal, int nth) {
  const double *extra = atom->extra[nlocal];
  int m = 0;
  for (int i = 0; i < nth; ++i) m += static_cast<int>(extra[m]);
  for (int k = 0; k < n_columns; ++k) array_atom[nlocal][k] = extra[m + 1 + k];
}

int FixUBMD::size_restart(int) {
  return n_columns + 1;
}

int FixUBMD::maxsize_restart() {
  return n_columns + 1;
}

}  // namespace LAMMPS_NS
