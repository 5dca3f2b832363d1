#include "geometry.h"

#include "atom.h"
#include "crystal_sites.h"
#include "exclusions.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "pair.h"
#include "pointers.h"

namespace ubmd {
namespace {

class NeighbourPairs : public Geometry, protected LAMMPS_NS::Pointers {
 public:
  NeighbourPairs(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, double cutoff, const std::vector<int> &species)
      : Pointers(lmp), pair_(pair), cutoff_(cutoff), species_(species) {}
  ~NeighbourPairs() noexcept override = default;

  void init() override { neighbor->add_request(&pair_, LAMMPS_NS::NeighConst::REQ_FULL); }

  double range() const override { return cutoff_; }

  void read(bool) override {
    Absent absent;
    if (neighbor->exclude) absent = read_absent(*neighbor, *group, species_);
    who_.read(atoms_of(*atom), neighbours(), species_, absent);
  }

  const std::vector<int> &centres() const override { return who_.centres; }

  void build(Block &block, std::size_t begin, std::size_t end) const override {
    block.build(atoms_of(*atom), neighbours(), who_, begin, end, cutoff_);
  }

  void subtract_strain_derivative(const Block &block, const Values &gradient, double *virial) const override {
    double d[9] = {};
    add_strain_derivative(block, gradient.data(), d);
    const double lammps_order[6] = {d[0], d[4], d[8], d[1], d[2], d[5]};
    for (int k = 0; k < 6; ++k) virial[k] -= lammps_order[k];
  }

  double bytes() const override {
    return static_cast<double>((who_.centres.capacity() + who_.elements.capacity()) * sizeof(int));
  }

 private:
  Neighbours neighbours() const {
    const auto *list = pair_.list;
    return {list->inum, list->ilist, list->numneigh, list->firstneigh, NEIGHMASK};
  }

  LAMMPS_NS::Pair &pair_;
  double cutoff_;  // Å
  std::vector<int> species_;
  Participants who_;
};

}  // namespace

std::unique_ptr<Geometry> make_geometry(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, Model &model,
                                        const std::vector<int> &species, Timer &timer) {
  if (model.is_crystal()) return std::make_unique<CrystalSites>(lmp, model, species, timer);
  return std::make_unique<NeighbourPairs>(lmp, pair, model.metadata().cutoff, species);
}

Atoms atoms_of(const LAMMPS_NS::Atom &atom) {
  const int n_all = atom.nlocal + atom.nghost;
  return {atom.nlocal, n_all, n_all ? atom.x[0] : nullptr, atom.type, atom.mask};
}

}  // namespace ubmd
