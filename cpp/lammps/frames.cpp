#include "frames.h"

#include <algorithm>
#include <cstdio>

namespace ubmd {
namespace {

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}

std::string header(const Frame &frame) {
  std::string text;
  if (frame.periodic[0] || frame.periodic[1] || frame.periodic[2]) {
    text += "Lattice=\"";
    for (int k = 0; k < 9; ++k) text += (k ? " " : "") + number(frame.cell[k]);
    text += "\" ";
  }
  text += "Properties=species:S:1:pos:R:3:id:I:1:atomic_uncertainty:R:1";
  text += " step=" + std::to_string(frame.step);
  text += " uncertainty=" + number(frame.uncertainty) + " max_uncertainty=" + number(frame.max_uncertainty);
  if (frame.replica >= 0) text += " replica=" + std::to_string(frame.replica);
  text += " pbc=\"";
  for (int k = 0; k < 3; ++k) text += std::string(k ? " " : "") + (frame.periodic[k] ? "T" : "F");
  return text + "\"";
}

}  // namespace

std::string format_frame(Frame frame) {
  std::sort(frame.atoms.begin(), frame.atoms.end(), [](const FrameAtom &a, const FrameAtom &b) { return a.id < b.id; });
  std::string text = std::to_string(frame.atoms.size()) + "\n" + header(frame) + "\n";
  for (const auto &atom : frame.atoms) {
    text += atom.name;
    for (double x : atom.position) text += " " + number(x);
    text += " " + std::to_string(atom.id) + " " + number(atom.uncertainty) + "\n";
  }
  return text;
}

}  // namespace ubmd
