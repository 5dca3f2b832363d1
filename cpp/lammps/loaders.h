// The formats of model files. A new one is a Loader with a subclass of Model, entered in loaders.cpp.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "model.h"

namespace ubmd {

// How a model is to be run.
struct RunOptions {
  std::optional<Precision> precision;  // none: that of the model, or mixed
  std::string device;                  // cpu, cuda or cuda:n
  int threads = 1;                     // of this rank
  double energy_unit = 1.0;            // one eV in the units of the run
  std::size_t block_size = 0;          // largest block of the fast path
};

// One format of model files. All functions throw Error (one sentence).
struct Loader {
  // Whether a file is of this format, by its content.
  bool (*reads)(const std::string &file);

  // The record that a file has beside its code (JSON, see potentials/record.py), read without running the file; none
  // in files of earlier versions.
  std::optional<std::string> (*record)(const std::string &file);

  // Load, which runs the file's code, and check; `record` is the one above.
  std::unique_ptr<Model> (*load)(const std::string &file, const std::optional<std::string> &record,
                                 const RunOptions &options);
};

extern const Loader torchscript_loader;

// The loader of a file; Error if it cannot be read.
const Loader &loader_of(const std::string &file);

}  // namespace ubmd
