// Atomic uncertainties of an ensemble: they come from the members' forces, to which other ranks add their shares.
#pragma once

#include <cstddef>
#include <vector>

#include "atomic_uncertainties.h"
#include "graph.h"
#include "model.h"
#include "pointers.h"
#include "ubmd_timer.h"

namespace ubmd {

class MemberExchange : public AtomicUncertainties, protected LAMMPS_NS::Pointers {
 public:
  MemberExchange(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, Model &model, Timer &timer);
  ~MemberExchange() noexcept override = default;

  void start() override;
  void add(const Block &block, double *) override;
  void finish(const std::vector<int> &centres, double *uncertainties) override;
  void start_bias() override;
  Values bias(std::size_t k, const Block &block) override;

  int pack_forward_comm(int n, const int *list, double *buffer) const override;
  void unpack_forward_comm(int n, int first, const double *buffer) override;
  int pack_reverse_comm(int n, int first, double *buffer) const override;
  void unpack_reverse_comm(int n, const int *list, const double *buffer) override;

  double bytes() const override;

 private:
  std::vector<double> cotangents(const Block &block) const;
  double *of_member(std::size_t m);
  const double *of_member(std::size_t m) const;

  LAMMPS_NS::Pair &pair_;
  Model &model_;
  Timer &timer_;
  std::size_t n_members_;
  std::vector<int> centres_;           // owned atoms that take part
  std::vector<double> factors_;        // [nall] of their uncertainties, by atom index
  std::vector<double> member_forces_;  // [n_atoms, 3, M], eV/Å
  std::vector<double> exchanged_;      // [M, nall, 3] forces, or derivatives of u with respect to them
  std::size_t member_ = 0;             // the one that communication moves
};

}  // namespace ubmd
