#include "window.h"

#include <cmath>

namespace ubmd {

void Window::add(std::int64_t step, double physical, double uncertainty) {
  if (!entries_.empty() && entries_.back().step == step) entries_.pop_back();
  entries_.push_back({step, physical, uncertainty});
  if (entries_.size() > length_) entries_.pop_front();
}

double Window::scale() const {
  if (!full()) return 0.0;
  double physical = 0.0;
  double uncertainty = 0.0;
  for (const auto &entry : entries_) {
    physical += entry.physical;
    uncertainty += entry.uncertainty;
  }
  if (uncertainty == 0.0) return 0.0;
  return std::sqrt(physical) / (std::sqrt(uncertainty) + epsilon);
}

std::vector<double> Window::state() const {
  std::vector<double> state;
  for (const auto &entry : entries_) {
    state.push_back(static_cast<double>(entry.step));
    state.push_back(entry.physical);
    state.push_back(entry.uncertainty);
  }
  return state;
}

void Window::restore(const std::vector<double> &state) {
  entries_.clear();
  for (std::size_t k = 0; k + 2 < state.size(); k += 3)
    add(static_cast<std::int64_t>(state[k]), state[k + 1], state[k + 2]);
}

}  // namespace ubmd
