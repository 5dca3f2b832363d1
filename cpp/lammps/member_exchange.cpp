#include "member_exchange.h"

#include "atom.h"
#include "comm.h"
#include "pair.h"

namespace ubmd {

MemberExchange::MemberExchange(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair, Model &model, Timer &timer)
    : Pointers(lmp),
      pair_(pair),
      model_(model),
      timer_(timer),
      n_members_(static_cast<std::size_t>(model.metadata().projections)) {}

// [nall, 3] of the exchanged numbers.
double *MemberExchange::of_member(std::size_t m) {
  return exchanged_.data() + 3 * m * (atom->nlocal + atom->nghost);
}
const double *MemberExchange::of_member(std::size_t m) const {
  return exchanged_.data() + 3 * m * (atom->nlocal + atom->nghost);
}

void MemberExchange::start() {
  exchanged_.assign(3 * n_members_ * (atom->nlocal + atom->nghost), 0.0);
}

void MemberExchange::add(const Block &block, double *) {
  const auto factors = atom_factors(model_.metadata(), block);
  factors_.resize(atom->nlocal + atom->nghost, 1.0);
  for (std::size_t i = 0; i < factors.size(); ++i) factors_[block.centres[i]] = factors[i];
  const auto gradients = model_.member_gradients();
  for (std::size_t m = 0; m < n_members_; ++m)
    add_gradient(block, gradients.data() + 3 * m * block.n_pairs(), -1.0, of_member(m), 3);
}

void MemberExchange::finish(const std::vector<int> &centres, double *uncertainties) {
  centres_ = centres;
  member_forces_.resize(3 * centres_.size() * n_members_);
  for (member_ = 0; member_ < n_members_; ++member_) {
    {
      const Timer::Scope scope(timer_, Timer::communication);
      comm->reverse_comm(&pair_);
    }
    const double *forces = of_member(member_);
    for (std::size_t i = 0; i < centres_.size(); ++i)
      for (int k = 0; k < 3; ++k) member_forces_[(3 * i + k) * n_members_ + member_] = forces[3 * centres_[i] + k];
  }
  const Timer::Scope scope(timer_, Timer::uncertainty);
  const auto values = model_.force_uncertainties(member_forces_, nullptr);
  for (std::size_t i = 0; i < values.size(); ++i) uncertainties[centres_[i]] = factors_[centres_[i]] * values[i];
}

// The derivatives of u_i with respect to the members' forces go to the ghosts, whose pairs other ranks may own.
void MemberExchange::start_bias() {
  std::vector<double> derivative;
  {
    const Timer::Scope scope(timer_, Timer::bias);
    model_.force_uncertainties(member_forces_, &derivative);
  }
  const Timer::Scope scope(timer_, Timer::communication);
  start();
  for (member_ = 0; member_ < n_members_; ++member_) {
    double *target = of_member(member_);
    for (std::size_t i = 0; i < centres_.size(); ++i)
      for (int k = 0; k < 3; ++k)
        target[3 * centres_[i] + k] = factors_[centres_[i]] * derivative[(3 * i + k) * n_members_ + member_];
    comm->forward_comm(&pair_);
  }
}

Values MemberExchange::bias(std::size_t k, const Block &block) {
  return model_.member_bias(k, block, cotangents(block));
}

// Cotangents [M, P, 3] of the members' gradients: one is added to the force of the centre and taken from that of the
// neighbour.
std::vector<double> MemberExchange::cotangents(const Block &block) const {
  std::vector<double> cotangents;
  cotangents.reserve(3 * n_members_ * block.n_pairs());
  for (std::size_t m = 0; m < n_members_; ++m) {
    const double *of_atom = of_member(m);
    for (std::size_t k = 0; k < block.centres.size(); ++k)
      for (std::int64_t e = block.first[k]; e < block.first[k + 1]; ++e)
        for (int a = 0; a < 3; ++a)
          cotangents.push_back(of_atom[3 * block.centres[k] + a] - of_atom[3 * block.ends[e] + a]);
  }
  return cotangents;
}

int MemberExchange::pack_forward_comm(int n, const int *list, double *buffer) const {
  const double *values = of_member(member_);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 3; ++k) buffer[3 * i + k] = values[3 * list[i] + k];
  return 3 * n;
}

void MemberExchange::unpack_forward_comm(int n, int first, const double *buffer) {
  double *values = of_member(member_);
  for (int m = 0; m < 3 * n; ++m) values[3 * first + m] = buffer[m];
}

int MemberExchange::pack_reverse_comm(int n, int first, double *buffer) const {
  const double *values = of_member(member_);
  for (int m = 0; m < 3 * n; ++m) buffer[m] = values[3 * first + m];
  return 3 * n;
}

void MemberExchange::unpack_reverse_comm(int n, const int *list, const double *buffer) {
  double *values = of_member(member_);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 3; ++k) values[3 * list[i] + k] += buffer[3 * i + k];
}

double MemberExchange::bytes() const {
  return static_cast<double>((member_forces_.capacity() + exchanged_.capacity() + factors_.capacity()) *
                                 sizeof(double) +
                             centres_.capacity() * sizeof(int));
}

}  // namespace ubmd
