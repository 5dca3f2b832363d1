#include "atomic_uncertainties.h"

#include "member_exchange.h"

namespace ubmd {
namespace {

// Each block gives the uncertainties of its own centres.
class OfBlocks : public AtomicUncertainties {
 public:
  explicit OfBlocks(Model &model) : model_(model) {}

  void add(const Block &block, double *uncertainties) override {
    const auto values = model_.atomic_uncertainties();
    const auto factors = atom_factors(model_.metadata(), block);
    for (std::size_t i = 0; i < values.size(); ++i) uncertainties[block.centres[i]] = factors[i] * values[i];
  }

  void finish(const std::vector<int> &, double *) override {}

  Values bias(std::size_t k, const Block &block) override {
    return model_.atomic_bias(k, atom_factors(model_.metadata(), block));
  }

 private:
  Model &model_;
};

}  // namespace

std::vector<double> atom_factors(const Metadata &metadata, const Block &block) {
  std::vector<double> factors(static_cast<std::size_t>(block.n_energies()), 1.0);
  if (metadata.atom_scale.empty()) return factors;
  for (std::size_t i = 0; i < factors.size(); ++i) factors[i] = metadata.atom_scale[block.species[i]];
  return factors;
}

std::unique_ptr<AtomicUncertainties> make_atomic_uncertainties(LAMMPS_NS::LAMMPS *lmp, LAMMPS_NS::Pair &pair,
                                                               Model &model, Timer &timer) {
  if (model.is_ensemble()) return std::make_unique<MemberExchange>(lmp, pair, model, timer);
  return std::make_unique<OfBlocks>(model);
}

}  // namespace ubmd
