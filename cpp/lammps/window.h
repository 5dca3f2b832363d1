// The moving window behind the scale of the bias.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace ubmd {

// Norms of the last N_w evaluations; scale = sqrt(sum |F|^2) / (sqrt(sum |F_u|^2) + epsilon), equal weights.
// The same class serves stresses, with Frobenius norms of the physical and the uncertainty stress.
class Window {
 public:
  // Only guards against overflow: far below any uncertainty force of interest (eV/Å per eV/atom of u).
  static constexpr double epsilon = 1e-15;

  explicit Window(std::size_t length) : length_(length) {}

  // Enter the squared norms of an evaluation. An evaluation of the step that was entered last replaces that entry:
  // LAMMPS evaluates the last step of a run again in the setup of the next.
  void add(std::int64_t step, double physical, double uncertainty);

  bool full() const { return entries_.size() >= length_; }

  // Zero until the window is full, and where the uncertainty forces vanish.
  double scale() const;

  // State as numbers, for restart files: [step, physical, uncertainty] of each entry.
  std::vector<double> state() const;
  void restore(const std::vector<double> &state);

 private:
  struct Entry {
    std::int64_t step;
    double physical;
    double uncertainty;
  };

  std::size_t length_;
  std::deque<Entry> entries_;
};

}  // namespace ubmd
