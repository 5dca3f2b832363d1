// The atoms of a LAMMPS run on the sites of a crystal: every atom has a site for the whole run, and the model takes
// displacements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crystal.h"
#include "graph.h"
#include "model.h"
#include "pointers.h"
#include "ubmd_timer.h"

namespace ubmd {

class CrystalSites : protected LAMMPS_NS::Pointers {
 public:
  // `species` is the element index of each type, -1: none.
  CrystalSites(LAMMPS_NS::LAMMPS *lmp, Model &model, const std::vector<int> &species, Timer &timer);

  // An error if the run changes the box or leaves out pairs of the crystal's atoms.
  void check_crystal() const;
  double max_displacement() const { return crystal_.max_displacement(); }
  // Before an evaluation; `requested` by fix ubmd.
  void read_sites(bool requested);
  // Owned atoms that take part.
  const std::vector<int> &centres() const { return crystal_.centres(); }
  void build(Block &block, std::size_t begin, std::size_t end) const { crystal_.build(block, begin, end); }
  void tally_crystal(const Block &, const Values &gradient, double *virial) const;
  Values in_box(Values gradient) const;
  // The largest displacement of any atom from its site in the last evaluation that was requested, Å. Ranks call it
  // together.
  double largest_displacement() const;
  double bytes() const { return crystal_.bytes(); }

 private:
  void check_exclusions() const;
  Matrix box() const;
  const double *positions() const;
  std::vector<int> species_of(int n) const;
  std::vector<std::int64_t> tags_of(int n) const;
  void map_sites();
  std::int64_t count_sites() const;
  void locate_sites();
  void connect_sites();
  Crystal::Largest displace_sites();
  void check_displacement(const Crystal::Largest &) const;

  Model &model_;
  std::vector<int> species_;
  Timer &timer_;
  Crystal crystal_;
  std::array<LAMMPS_NS::bigint, 2> located_ = {-1, 0};        // the neighbour lists that the sites were located for
  double displacement_ = 0.0, requested_displacement_ = 0.0;  // largest of this rank's atoms, Å
};

}  // namespace ubmd
