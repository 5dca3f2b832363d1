// Unit styles of LAMMPS that the plugin runs in. Model files are in eV and Å.
#pragma once

#include <string>

namespace ubmd {

struct EnergyUnit {
  double per_ev;     // one eV in this unit
  std::string name;  // for messages
};

// Energy unit of a unit style whose length unit is Å (metal: eV, real: kcal/mol); throws Error for any other style.
EnergyUnit energy_unit(const std::string &style);

}  // namespace ubmd
