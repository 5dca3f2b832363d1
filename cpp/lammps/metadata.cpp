#include "metadata.h"

#include <algorithm>

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

Metadata read(const Json &record, const std::string &file) {
  Metadata metadata;
  metadata.format = record.at("format").get<int>();
  if (metadata.format > newest_format)
    throw Error("model file " + file + " has format " + std::to_string(metadata.format) +
                " but this ubmd reads formats up to " + std::to_string(newest_format) +
                ": update ubmd with 'pip install --upgrade ubmd'");
  metadata.elements = record.at("elements").get<std::vector<std::string>>();
  metadata.cutoff = record.at("cutoff").get<double>();
  if (record.contains("uncertainty") && record["uncertainty"].is_object())
    metadata.projections = record["uncertainty"].value("projections", 0);
  if (record.contains("operators")) metadata.operators = record["operators"].get<std::vector<std::string>>();
  if (metadata.elements.empty() || !(metadata.cutoff > 0.0))
    throw Error("model file " + file + " names no elements or no cutoff: export it again with 'ubmd train'");
  return metadata;
}

}  // namespace

Metadata parse_metadata(const std::string &json, const std::string &file) {
  try {
    return read(Json::parse(json), file);
  } catch (const Json::exception &) {
    throw Error("the metadata of model file " + file + " are not a ubmd record: export it again with 'ubmd train'");
  }
}

std::vector<int> map_elements(const Metadata &metadata, const std::vector<std::string> &names,
                              const std::string &file) {
  std::vector<int> species;
  for (const auto &name : names) {
    const auto found = std::find(metadata.elements.begin(), metadata.elements.end(), name);
    if (name == "NULL") {
      species.push_back(-1);
    } else if (found == metadata.elements.end()) {
      throw Error("element " + name + " is not in model file " + file + ", which knows " + join(metadata.elements) +
                  ": correct the names of pair_coeff or train with this element");
    } else {
      species.push_back(static_cast<int>(found - metadata.elements.begin()));
    }
  }
  return species;
}

}  // namespace ubmd
