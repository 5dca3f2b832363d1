// The atomic uncertainties of an evaluation, and the bias along their sum.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "graph.h"
#include "model.h"
#include "ubmd_timer.h"

namespace LAMMPS_NS {
class LAMMPS;
class Pair;
}  // namespace LAMMPS_NS

namespace ubmd {

// In the order in which the pair style needs it. Uncertainties are by atom index, and include the factors of the
// elements.
class AtomicUncertainties {
 public:
  virtual ~AtomicUncertainties() = default;

  // Before an evaluation.
  virtual void start() {}

  // Of the block that was evaluated last.
  virtual void add(const Block &block, double *uncertainties) = 0;

  // After all blocks; `centres` are the owned atoms that take part. Ranks call it together.
  virtual void finish(const std::vector<int> &centres, double *uncertainties) = 0;

  // Before bias(). Ranks call it together.
  virtual void start_bias() {}

  // d(sum_i u_i)/d(vector) [P, 3] of block number k.
  virtual Values bias(std::size_t k, const Block &block) = 0;

  // What the pair style's functions of these names do for LAMMPS's communication.
  virtual int pack_forward_comm(int, const int *, double *) const { return 0; }
  virtual void unpack_forward_comm(int, int, const double *) {}
  virtual int pack_reverse_comm(int, int, double *) const { return 0; }
  virtual void unpack_reverse_comm(int, const int *, const double *) {}

  virtual double bytes() const { return 0.0; }
};

// The factors of a block's own atoms (those that have an energy), 1 for a model that has none.
std::vector<double> atom_factors(const Metadata &metadata, const Block &block);

// The kind that the model needs; the model must outlive it. LAMMPS's communication calls `pair`, which passes it on.
std::unique_ptr<AtomicUncertainties> make_atomic_uncertainties(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair,
                                                               Model &model, Timer &timer);

}  // namespace ubmd
