#include "metadata.h"

#include <algorithm>
#include <cmath>

#include "json.h"
#include "ubmd_error.h"

namespace ubmd {
namespace {

using Json = LAMMPS_NS::json;

std::string join(const std::vector<std::string> &words) {
  std::string text;
  for (const auto &word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

Lattice read_lattice(const Json &record, std::size_t n_elements, const std::string &file) {
  Lattice lattice;
  lattice.cell = record.at("cell").get<Matrix>();
  lattice.scaled = record.at("scaled").get<std::vector<std::array<double, 3>>>();
  lattice.species = record.at("species").get<std::vector<int>>();
  lattice.sites = record.at("sites").get<std::vector<std::vector<std::array<int, 4>>>>();
  lattice.max_displacement = record.at("max_displacement").get<double>();
  const auto n = lattice.scaled.size();
  bool valid = n > 0 && lattice.species.size() == n && lattice.sites.size() == n && lattice.max_displacement > 0.0;
  for (int species : lattice.species) valid = valid && species >= 0 && species < static_cast<int>(n_elements);
  for (const auto &sites : lattice.sites)
    for (const auto &site : sites) valid = valid && site[3] >= 0 && site[3] < static_cast<int>(n);
  if (!valid) throw Error("the lattice in the metadata of model file " + file + " is damaged: export the model again");
  return lattice;
}

// How the module is to be run: what only files of format 2 say.
void read_graph(const Json &record, Metadata &metadata, const std::string &file) {
  metadata.layers = record.value("layers", 1);
  const bool fixed = record.value("fixed_precision", false);
  if (fixed && record.at("precision") == "float32") metadata.precision = Precision::mixed;
  if (fixed && record.at("precision") == "float64") metadata.precision = Precision::double_;
  const bool valid = metadata.layers >= 1 && fixed == metadata.precision.has_value();
  if (!valid || (metadata.format < 2 && (fixed || metadata.layers > 1)))
    throw Error("layers or precision in the metadata of model file " + file + " is damaged: export the model again");
}

// Factors of the atomic uncertainties, which earlier plugins would leave out.
void read_atom_scale(const Json &record, Metadata &metadata, const std::string &file) {
  if (!record.contains("atom_scale")) return;
  metadata.atom_scale = record["atom_scale"].get<std::vector<double>>();
  bool valid = metadata.format >= 4 && !metadata.lattice && metadata.atom_scale.size() == metadata.elements.size();
  for (double factor : metadata.atom_scale) valid = valid && factor > 0.0 && std::isfinite(factor);
  if (!valid) throw Error("atom_scale in the metadata of model file " + file + " is damaged: export the model again");
}

Metadata read(const Json &record, const std::string &file) {
  Metadata metadata;
  metadata.format = record.at("format").get<int>();
  if (metadata.format > newest_format)
    throw Error("model file " + file + " has format " + std::to_string(metadata.format) +
                " but this ubmd reads formats up to " + std::to_string(newest_format) +
                ": update ubmd with 'pip install --upgrade ubmd'");
  read_graph(record, metadata, file);
  metadata.elements = record.at("elements").get<std::vector<std::string>>();
  metadata.cutoff = record.at("cutoff").get<double>();
  if (record.contains("uncertainty") && record["uncertainty"].is_object())
    metadata.projections = record["uncertainty"].value("projections", 0);
  if (record.contains("operators")) metadata.operators = record["operators"].get<std::vector<std::string>>();
  if (record.contains("lattice")) metadata.lattice = read_lattice(record["lattice"], metadata.elements.size(), file);
  read_atom_scale(record, metadata, file);
  if (metadata.elements.empty() || !(metadata.cutoff > 0.0))
    throw Error("model file " + file + " lacks its elements or its cutoff: export it again with 'ubmd train'");
  return metadata;
}

// Run `work` on JSON; if it is not a record, an Error.
template <typename Work>
auto with_json(const std::string &file, Work work) -> decltype(work()) {
  try {
    return work();
  } catch (const Json::exception &) {
    throw Error("the metadata of model file " + file + " are not a ubmd record: export it again with 'ubmd train'");
  }
}

}  // namespace

Metadata parse_metadata(const std::string &json, const std::string &file) {
  return with_json(file, [&] { return read(Json::parse(json), file); });
}

bool same_record(const std::string &record, const std::string &other, const std::string &file) {
  return with_json(file, [&] { return Json::parse(record) == Json::parse(other); });
}

std::vector<int> map_elements(const Metadata &metadata, const std::vector<std::string> &names,
                              const std::string &file) {
  std::vector<int> species;
  for (const auto &name : names) {
    const auto found = std::find(metadata.elements.begin(), metadata.elements.end(), name);
    if (name == "NULL") {
      species.push_back(-1);
    } else if (found == metadata.elements.end()) {
      throw Error("element " + name + " is not in model file " + file + ", which contains " + join(metadata.elements) +
                  ": correct the names in pair_coeff or train with this element");
    } else {
      species.push_back(static_cast<int>(found - metadata.elements.begin()));
    }
  }
  return species;
}

}  // namespace ubmd
