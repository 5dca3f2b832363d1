// Frames that fix ubmd saves, as extended XYZ.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ubmd {

struct FrameAtom {
  std::int64_t id;
  std::string name;
  double position[3];  // Å
  double uncertainty;  // eV/Å
};

struct Frame {
  std::int64_t step;
  double uncertainty;      // u, eV/atom
  double max_uncertainty;  // max u_i, eV/Å
  bool periodic[3];
  double cell[9];  // rows are the cell vectors, Å; written only if a direction is periodic
  std::vector<FrameAtom> atoms;
  int replica = -1;  // partition of a run with several; negative: one only
};

// Text of one frame, atoms sorted by id, numbers with 17 significant digits (they read back exactly).
std::string format_frame(Frame frame);

}  // namespace ubmd
