// What pair_style ubmd evaluates: the pairs of a neighbour list, or the sites of a crystal.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "graph.h"
#include "model.h"
#include "ubmd_timer.h"

namespace LAMMPS_NS {
class Atom;
class LAMMPS;
class Pair;
}  // namespace LAMMPS_NS

namespace ubmd {

// In the order in which the pair style needs it.
class Geometry {
 public:
  virtual ~Geometry() = default;

  // From init_style(): ask for the neighbour list, or an error if the model doesn't support the run.
  virtual void init() = 0;

  // From init_one(): range of the pair style, Å. LAMMPS adds the skin to it, for the ghosts.
  virtual double range() const = 0;

  // Before an evaluation; `requested` by fix ubmd. Ranks call it together.
  virtual void read(bool requested) = 0;

  // Owned atoms that take part, by their index.
  virtual const std::vector<int> &centres() const = 0;

  // The block of centres begin to end - 1.
  virtual void build(Block &block, std::size_t begin, std::size_t end) const = 0;

  // Subtract from `virial` (LAMMPS's order) the derivative with respect to strain of the block evaluated last, from its
  // gradient as the model gave it.
  virtual void subtract_strain_derivative(const Block &block, const Values &gradient, double *virial) const = 0;

  // Turn a gradient as the model gave it into the frame of the box.
  virtual Values in_box(Values gradient) const { return gradient; }

  // Of a crystal: the largest displacement of any atom from its site in the last evaluation that was requested, Å; else
  // 0. Ranks call it together.
  virtual double largest_displacement() const { return 0.0; }

  virtual double bytes() const = 0;
};

// The kind that the model needs; the model must outlive it. `species` is the element index of each type, -1: none.
std::unique_ptr<Geometry> make_geometry(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, Model &model,
                                        const std::vector<int> &species, Timer &timer);

// The atoms of this rank.
Atoms atoms_of(const LAMMPS_NS::Atom &atom);

}  // namespace ubmd
