// Atomic uncertainties of an ensemble: they come from the members' forces, to which other ranks add their shares.
#pragma once

#include <cstddef>
#include <vector>

#include "graph.h"
#include "model.h"
#include "pointers.h"
#include "ubmd_timer.h"

namespace LAMMPS_NS {
class Pair;
}

namespace ubmd {

class MemberExchange : protected LAMMPS_NS::Pointers {
 public:
  // LAMMPS's communication asks `pair` to pack and unpack, which passes it on.
  MemberExchange(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, Model &model, Timer &timer);

  // Before an evaluation, for each block after it was evaluated, and after all: uncertainties by atom index.
  void start_members();
  void add_members(const Block &block);
  void finish_members(const std::vector<int> &centres, std::vector<double> &uncertainties);
  // Before the cotangents of all blocks. Ranks call it together.
  void send_derivatives();
  std::vector<double> member_cotangents(const Block &block) const;

  int pack_forward_comm(int n, int *list, double *buffer) const;
  void unpack_forward_comm(int n, int first, double *buffer);
  int pack_reverse_comm(int n, int first, double *buffer) const;
  void unpack_reverse_comm(int n, int *list, double *buffer);

  double bytes() const;

 private:
  LAMMPS_NS::Pair &pair_;
  Model &model_;
  Timer &timer_;
  std::size_t n_members_;
  std::vector<int> centres_;           // owned atoms that take part
  std::vector<double> member_forces_;  // [n_atoms, 3, M], eV/Å
  std::vector<double> exchanged_;      // [M, nall, 3] forces, or derivatives of u with respect to them
  std::size_t member_ = 0;             // the one that communication moves
};

}  // namespace ubmd
