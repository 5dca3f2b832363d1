#include "geometry.h"

#include "atom.h"
#include "comm.h"
#include "crystal_sites.h"
#include "error.h"
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

 protected:
  Neighbours neighbours() const {
    const auto *list = pair_.list;
    return {list->inum, list->ilist, list->numneigh, list->firstneigh, NEIGHMASK};
  }

  LAMMPS_NS::Pair &pair_;
  double cutoff_;  // Å
  std::vector<int> species_;
  Participants who_;
};

// The graph of a network with message passing. On one rank every ghost is an image of an owned atom. On several ranks
// the pairs of ghosts are needed, and ghosts out to the last layer.
class MessagePairs : public NeighbourPairs {
 public:
  MessagePairs(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, const Metadata &metadata, const std::vector<int> &species)
      : NeighbourPairs(lmp, pair, metadata.cutoff, species), layers_(metadata.layers) {}
  ~MessagePairs() noexcept override { restore_ghosts(); }

  void init() override {
    if (comm->nprocs == 1) return NeighbourPairs::init();
    neighbor->add_request(&pair_, LAMMPS_NS::NeighConst::REQ_FULL | LAMMPS_NS::NeighConst::REQ_GHOST);
    widen_ghosts();
  }

  void read(bool requested) override {
    if (comm->nprocs > 1 && comm->cutghostuser < ghost_range())
      error->all(
          FLERR,
          "pair_style ubmd: ghosts reach {:.6g} A but the model's messages {:.6g} A: remove 'comm_modify cutoff', "
          "or 'pre no' of the run after it",
          comm->cutghostuser, ghost_range());
    NeighbourPairs::read(requested);
  }

  void build(Block &block, std::size_t, std::size_t) const override {
    block.build_messages(atoms_of(*atom), neighbours(), who_, atom->tag, cutoff_, layers_);
  }

 private:
  double ghost_range() const { return layers_ * cutoff_ + neighbor->skin; }

  // As `comm_modify cutoff` does, so that the user need not know the range.
  void widen_ghosts() {
    if (comm->mode != LAMMPS_NS::Comm::SINGLE)
      error->all(FLERR,
                 "pair_style ubmd: a model with message passing needs ghosts out to the same distance for all types: "
                 "remove 'comm_modify mode multi'");
    if (comm->cutghostuser >= ghost_range()) return;
    if (comm->cutghostuser != widened_) before_ = comm->cutghostuser;
    comm->cutghostuser = widened_ = ghost_range();
  }

  void restore_ghosts() noexcept {
    if (widened_ > 0.0 && comm->cutghostuser == widened_) comm->cutghostuser = before_;
  }

  int layers_;
  double before_ = 0.0, widened_ = 0.0;  // range of the ghosts that was set by the user, and here, Å
};

}  // namespace

std::unique_ptr<Geometry> make_geometry(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, Model &model,
                                        const std::vector<int> &species, Timer &timer) {
  if (model.is_crystal()) return std::make_unique<CrystalSites>(lmp, model, species, timer);
  if (model.metadata().layers > 1) return std::make_unique<MessagePairs>(lmp, pair, model.metadata(), species);
  return std::make_unique<NeighbourPairs>(lmp, pair, model.metadata().cutoff, species);
}

Atoms atoms_of(const LAMMPS_NS::Atom &atom) {
  const int n_all = atom.nlocal + atom.nghost;
  return {atom.nlocal, n_all, n_all ? atom.x[0] : nullptr, atom.type, atom.mask};
}

}  // namespace ubmd
