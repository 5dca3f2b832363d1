// The atoms of a LAMMPS run on the sites of a crystal: every atom has a site for the whole run, and the model takes
// displacements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crystal.h"
#include "geometry.h"
#include "graph.h"
#include "model.h"
#include "pointers.h"
#include "ubmd_timer.h"

namespace ubmd {

class CrystalSites : public Geometry, protected LAMMPS_NS::Pointers {
 public:
  // `species` is the element index of each type, -1: none.
  CrystalSites(LAMMPS_NS::LAMMPS *lmp, Model &model, const std::vector<int> &species, Timer &timer);
  ~CrystalSites() noexcept override = default;

  void init() override;
  double range() const override;
  void read(bool requested) override;
  const std::vector<int> &centres() const override { return crystal_.centres(); }
  void build(Block &block, std::size_t begin, std::size_t end) const override { crystal_.build(block, begin, end); }
  void subtract_strain_derivative(const Block &block, const Values &gradient, double *virial) const override;
  Values in_box(Values gradient) const override;
  double largest_displacement() const override;
  double bytes() const override { return crystal_.bytes(); }

 private:
  void check_exclusions() const;
  Matrix box() const;
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
