#include "ubmd_timer.h"

#include <cstdio>

namespace ubmd {

std::string Timer::report(const std::array<double, n_parts> &seconds) {
  static const char *const names[n_parts] = {"graph", "network", "uncertainty", "bias", "communication"};
  double total = 0.0;
  for (double part : seconds) total += part;
  std::string text = "ubmd timing (largest over ranks):\n";
  for (int k = 0; k < n_parts; ++k) {
    char line[80];
    std::snprintf(line, sizeof(line), "  %-13s %10.3f s  %5.1f %%\n", names[k], seconds[k],
                  total > 0.0 ? 100.0 * seconds[k] / total : 0.0);
    text += line;
  }
  return text;
}

}  // namespace ubmd
