#include "units.h"

#include "ubmd_error.h"

namespace ubmd {

EnergyUnit energy_unit(const std::string &style) {
  if (style == "metal") return {1.0, "eV"};
  if (style == "real") return {23.060549, "kcal/mol"};  // LAMMPS's own factor (utils::get_conversion_factor)
  throw Error("the units must be metal or real, not " + style + ": put 'units metal' at the top of the input");
}

}  // namespace ubmd
