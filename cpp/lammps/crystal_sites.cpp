#include "crystal_sites.h"

#include <mpi.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "atom.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "exclusions.h"
#include "fix.h"
#include "modify.h"
#include "neighbor.h"
#include "ubmd_error.h"
#include "update.h"

namespace ubmd {

CrystalSites::CrystalSites(LAMMPS_NS::LAMMPS *lmp, Model &model, const std::vector<int> &species, Timer &timer)
    : Pointers(lmp), model_(model), species_(species), timer_(timer), crystal_(*model.metadata().lattice) {}

// The cell is the model's, and pairs cannot be left out.
void CrystalSites::init() {
  if (domain->nonperiodic)
    error->all(FLERR,
               "pair_style ubmd: the force-constant model of a crystal needs a box that is periodic in all directions: "
               "use 'boundary p p p'");
  for (const auto *fix : modify->get_fix_list())
    if (fix->box_change &
        (LAMMPS_NS::Fix::BOX_CHANGE_ANY | LAMMPS_NS::Fix::BOX_CHANGE_SIZE | LAMMPS_NS::Fix::BOX_CHANGE_SHAPE))
      error->all(FLERR,
                 "pair_style ubmd: the force-constant model of a crystal is valid for a fixed cell only, but fix {} {} "
                 "changes the box: remove it, and use fix nvt instead of fix npt",
                 fix->id, fix->style);
  check_exclusions();
}

// A crystal needs no list but ghosts: all sites of the atoms that are owned when ghosts are chosen. Both atoms of a
// pair may be displaced; LAMMPS adds the skin to the range of the ghosts.
double CrystalSites::range() const {
  const double cutoff = model_.metadata().cutoff;
  return std::max(cutoff, cutoff + 2.0 * crystal_.max_displacement() - neighbor->skin);
}

// A crystal's energy is not a sum over the pairs of a neighbour list.
void CrystalSites::check_exclusions() const {
  int mine = 0, bits;
  for (int i = 0; i < atom->nlocal; ++i)
    if (species_[atom->type[i] - 1] >= 0) mine |= atom->mask[i];
  MPI_Allreduce(&mine, &bits, 1, MPI_INT, MPI_BOR, world);
  if (excludes_pairs(*neighbor, *group, species_, bits))
    error->all(FLERR,
               "pair_style ubmd: the force-constant model of a crystal cannot leave out pairs of its atoms: remove "
               "'neigh_modify exclude', or restrict it to atoms outside the crystal");
}

Matrix CrystalSites::box() const {
  return {{{domain->xprd, 0.0, 0.0}, {domain->xy, domain->yprd, 0.0}, {domain->xz, domain->yz, domain->zprd}}};
}

std::vector<int> CrystalSites::species_of(int n) const {
  std::vector<int> species(n);
  for (int i = 0; i < n; ++i) species[i] = species_[atom->type[i] - 1];
  return species;
}

std::vector<std::int64_t> CrystalSites::tags_of(int n) const {
  return {atom->tag, atom->tag + n};
}

// Gradient with respect to the displacements, in the frame of the box.
Values CrystalSites::in_box(Values gradient) const {
  if (!crystal_.fit().is_turned()) return gradient;
  auto turned = std::make_shared<std::vector<double>>(gradient.size());
  crystal_.turn_back(gradient.data(), gradient.size() / 3, turned->data());
  return {turned, turned->data(), turned->size()};
}

// Sites belong to tags as long as box, atoms and types stay. In a setup all may have changed: then the crystal is
// mapped again if the atoms don't agree with the sites that they have.
void CrystalSites::read(bool requested) {
  const bool in_setup = update->setupflag != 0;
  bool fresh = false;
  if (crystal_.is_mapped() && in_setup) {
    int known = crystal_.has_box(box()) && crystal_.knows(tags_of(atom->nlocal), species_of(atom->nlocal)), all;
    MPI_Allreduce(&known, &all, 1, MPI_INT, MPI_MIN, world);
    fresh = !all || count_sites() != crystal_.n_sites();
  }
  if (crystal_.is_mapped() && !in_setup && !crystal_.has_box(box()))
    error->all(
        FLERR,
        "the box changed at step {} but the force-constant model of a crystal is valid for a fixed cell only: change "
        "the box between runs, to another multiple of the cell",
        update->ntimestep);
  if (fresh || !crystal_.is_mapped()) {
    fresh = true;
    map_sites();
  }

  const std::array<LAMMPS_NS::bigint, 2> lists = {neighbor->lastcall, neighbor->ncalls};  // the same on all ranks
  bool anew = fresh || lists != located_ || (in_setup && neighbor->ago == 0);
  if (anew) locate_sites();
  located_ = lists;
  auto largest = displace_sites();
  if (in_setup && !fresh) {
    int far = largest.displacement > crystal_.max_displacement(), any;
    MPI_Allreduce(&far, &any, 1, MPI_INT, MPI_MAX, world);
    if (any) {
      anew = true;
      map_sites();
      locate_sites();
      largest = displace_sites();
    }
  }
  check_displacement(largest);  // before an atom that has left its site is missed
  if (anew) connect_sites();
  displacement_ = largest.displacement;
  if (requested) requested_displacement_ = displacement_;
}

// Global virial of a crystal, from the gradient in the model's frame. The energies of its centres change when the whole
// crystal moves (only their sum doesn't), so the virial isn't the sum over a centre's pairs that it is for other
// models: the model knows which place each of its terms belongs to.
void CrystalSites::subtract_strain_derivative(const Block &block, const Values &gradient, double *virial) const {
  const auto ideal = model_.strain_derivative();
  Matrix strain;
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 3; ++b) strain[a][b] = ideal[3 * a + b];
  for (std::size_t k = 0; k < gradient.size(); ++k)
    for (int a = 0; a < 3; ++a) strain[a][k % 3] += block.displacements[k - k % 3 + a] * gradient[k];
  strain = crystal_.turn_back(strain);
  const int rows[6] = {0, 1, 2, 0, 0, 1}, columns[6] = {0, 1, 2, 1, 2, 2};
  for (int k = 0; k < 6; ++k) virial[k] -= 0.5 * (strain[rows[k]][columns[k]] + strain[columns[k]][rows[k]]);
}

// All atoms on all ranks, so that each finds the same sites.
void CrystalSites::map_sites() {
  const auto species = species_of(atom->nlocal);
  std::vector<double> mine;
  for (int i = 0; i < atom->nlocal; ++i)
    if (species[i] >= 0)
      mine.insert(mine.end(), {static_cast<double>(atom->tag[i]), static_cast<double>(species[i]), atom->x[i][0],
                               atom->x[i][1], atom->x[i][2]});
  const int n = static_cast<int>(mine.size());
  std::vector<int> counts(comm->nprocs), offsets(comm->nprocs, 0);
  MPI_Allgather(&n, 1, MPI_INT, counts.data(), 1, MPI_INT, world);
  for (int r = 1; r < comm->nprocs; ++r) offsets[r] = offsets[r - 1] + counts[r - 1];
  std::vector<double> all(offsets.back() + counts.back());
  MPI_Allgatherv(mine.data(), n, MPI_DOUBLE, all.data(), counts.data(), offsets.data(), MPI_DOUBLE, world);
  std::vector<SystemAtom> atoms;
  for (std::size_t k = 0; k < all.size(); k += 5)
    atoms.push_back(
        {static_cast<std::int64_t>(all[k]), static_cast<int>(all[k + 1]), {all[k + 2], all[k + 3], all[k + 4]}});
  try {
    crystal_.map(box(), std::move(atoms));
  } catch (const Error &problem) {
    error->all(FLERR, "pair_style ubmd: {}", problem.what());
  }
}

// Atoms of all ranks that take part.
std::int64_t CrystalSites::count_sites() const {
  std::int64_t mine = 0, all;
  for (int species : species_of(atom->nlocal)) mine += species >= 0;
  MPI_Allreduce(&mine, &all, 1, MPI_INT64_T, MPI_SUM, world);
  return all;
}

void CrystalSites::locate_sites() {
  const auto count = count_sites();
  if (count != crystal_.n_sites())
    error->all(
        FLERR,
        "pair_style ubmd: {} of the crystal's {} atoms are left at step {}: atoms and types must not change during a "
        "run",
        count, crystal_.n_sites(), update->ntimestep);
  const int nall = atom->nlocal + atom->nghost;
  try {
    crystal_.locate(atom->nlocal, atoms_of(*atom).positions, tags_of(nall), species_of(nall));
  } catch (const Error &problem) {
    error->one(FLERR, "pair_style ubmd: {}", problem.what());
  }
}

void CrystalSites::connect_sites() {
  try {
    crystal_.connect(tags_of(atom->nlocal + atom->nghost));
  } catch (const Error &problem) {
    error->one(FLERR, "pair_style ubmd: {}", problem.what());
  }
}

// Displacements from the sites without their mean over the whole system. The model doesn't depend on the mean, but the
// energies of single atoms and the images of the sites would.
Crystal::Largest CrystalSites::displace_sites() {
  const auto mine = crystal_.displace(atoms_of(*atom).positions);
  Vector sum;
  {
    const Timer::Scope scope(timer_, Timer::communication);
    MPI_Allreduce(mine.data(), sum.data(), 3, MPI_DOUBLE, MPI_SUM, world);
  }
  for (double &component : sum) component /= static_cast<double>(crystal_.n_sites());
  return crystal_.centre(sum);
}

void CrystalSites::check_displacement(const Crystal::Largest &largest) const {
  if (largest.displacement <= crystal_.max_displacement()) return;
  error->one(
      FLERR,
      "pair_style ubmd: at step {} atom {} is {:.3f} A away from its site, more than the displacement "
      "limit of the force-constant model, {:.3f} A: use a lower temperature or a shorter time step, or train the "
      "model on larger displacements",
      update->ntimestep, atom->tag[largest.atom], largest.displacement, crystal_.max_displacement());
}

double CrystalSites::largest_displacement() const {
  double largest = 0.0;
  MPI_Allreduce(&requested_displacement_, &largest, 1, MPI_DOUBLE, MPI_MAX, world);
  return largest;
}

}  // namespace ubmd
