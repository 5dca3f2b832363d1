// The JSON record of a model file, and what the plugin checks in it.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace ubmd {

// The newest format of model files that this plugin reads.
inline constexpr int newest_format = 4;

enum class Precision { mixed, single_, double_ };

using Matrix = std::array<std::array<double, 3>, 3>;  // vectors in rows

// The ideal crystal of a force-constant model. A site is (cell offset along the three vectors, sublattice).
struct Lattice {
  Matrix cell{};                                       // primitive vectors, Å
  std::vector<std::array<double, 3>> scaled;           // [S] fractional position of each sublattice
  std::vector<int> species;                            // [S] species index of each sublattice
  std::vector<std::vector<std::array<int, 4>>> sites;  // [S] sites that the energy of a centre in cell 0 depends on
  double max_displacement = 0.0;                       // Å: the displacement limit
};

struct Metadata {
  int format = 0;
  std::vector<std::string> elements;   // species index -> element name
  double cutoff = 0.0;                 // Å
  int projections = 0;                 // length p of the features; 0: the file has no uncertainty
  int layers = 1;                      // steps of message passing: energies depend on pairs layers - 1 pairs away
  std::optional<Precision> precision;  // the only one that the model runs in
  std::vector<std::string> operators;  // operator libraries the model needs
  std::vector<double> atom_scale;      // factor of u_i by species index; empty: 1 for all
  std::optional<Lattice> lattice;      // of a force-constant model
};

// Read the record; throws Error naming `file` when it is not a ubmd record or of a newer format.
Metadata parse_metadata(const std::string &json, const std::string &file);

// Whether two records say the same; throws Error naming `file` when one of them is not JSON.
bool same_record(const std::string &record, const std::string &other, const std::string &file);

// Species index of every LAMMPS type (-1 for NULL); throws Error for names that are not in the model.
std::vector<int> map_elements(const Metadata &metadata, const std::vector<std::string> &names, const std::string &file);

}  // namespace ubmd
