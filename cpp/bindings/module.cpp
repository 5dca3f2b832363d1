// Python module ubmd._cpp: the plugin's own helpers, so that tests exercise the compiled code itself.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "crystal.h"
#include "device.h"
#include "frames.h"
#include "graph.h"
#include "metadata.h"
#include "ubmd_error.h"
#include "units.h"
#include "versions.h"
#include "window.h"

namespace py = pybind11;

namespace {

using Positions = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Blocks of n_local owned atoms (and ghosts behind them) with a neighbour list given per centre; `size` centres each.
std::vector<ubmd::Block> build_blocks(const Positions &positions, const std::vector<int> &types, int n_local,
                                      const std::vector<std::vector<int>> &neighbours, const std::vector<int> &species,
                                      double cutoff, std::size_t size) {
  if (positions.ndim() != 2 || positions.shape(1) != 3 || static_cast<std::size_t>(positions.shape(0)) != types.size())
    throw ubmd::Error("positions must be [n, 3] with one type per atom");
  std::vector<int> centres, numbers(types.size(), 0);
  std::vector<const int *> first(types.size(), nullptr);
  for (std::size_t i = 0; i < neighbours.size(); ++i) {
    centres.push_back(static_cast<int>(i));
    numbers[i] = static_cast<int>(neighbours[i].size());
    first[i] = neighbours[i].data();
  }
  const std::vector<int> groups(types.size(), 1);
  const ubmd::Atoms atoms{n_local, static_cast<int>(types.size()), positions.data(), types.data(), groups.data()};
  const ubmd::Neighbours list{static_cast<int>(centres.size()), centres.data(), numbers.data(), first.data(),
                              0x1FFFFFFF};
  ubmd::Participants who;
  who.read(atoms, list, species, {});
  std::vector<ubmd::Block> blocks;
  for (std::size_t begin = 0; begin < who.centres.size(); begin += size) {
    blocks.emplace_back();
    blocks.back().build(atoms, list, who, begin, std::min(begin + size, who.centres.size()), cutoff);
  }
  return blocks;
}

// The pairs' part of an array with `width` numbers per pair.
template <typename Number>
py::array_t<Number> of_pairs(const ubmd::Block &block, const std::vector<Number> &values, py::ssize_t width) {
  return width > 1 ? py::array_t<Number>({py::ssize_t(block.n_pairs()), width}, values.data())
                   : py::array_t<Number>(py::ssize_t(block.n_pairs()), values.data());
}

// dSum/dx [n_all, 3] and dSum/dstrain [3, 3] of a gradient [P, 3] with respect to a block's vectors.
std::pair<py::array_t<double>, py::array_t<double>> scatter(const ubmd::Block &block, const Positions &gradient,
                                                            int n_all) {
  if (gradient.ndim() != 2 || gradient.shape(0) != block.n_pairs() || gradient.shape(1) != 3)
    throw ubmd::Error("the gradient must be [P, 3] with one row per pair");
  py::array_t<double> of_atoms({py::ssize_t(n_all), py::ssize_t(3)}), strain({py::ssize_t(3), py::ssize_t(3)});
  std::fill_n(of_atoms.mutable_data(), 3 * n_all, 0.0);
  std::fill_n(strain.mutable_data(), 9, 0.0);
  ubmd::add_gradient(block, gradient.data(), 1.0, of_atoms.mutable_data(), 3);
  ubmd::add_strain_derivative(block, gradient.data(), strain.mutable_data());
  return {of_atoms, strain};
}

std::vector<ubmd::SystemAtom> system_atoms(const std::vector<std::int64_t> &tags, const std::vector<int> &species,
                                           const Positions &positions) {
  if (positions.ndim() != 2 || positions.shape(1) != 3 || static_cast<std::size_t>(positions.shape(0)) != tags.size() ||
      species.size() != tags.size())
    throw ubmd::Error("positions must be [n, 3] with one tag and one species per atom");
  std::vector<ubmd::SystemAtom> atoms;
  for (std::size_t i = 0; i < tags.size(); ++i) {
    const double *x = positions.data() + 3 * i;
    atoms.push_back({tags[i], species[i], {x[0], x[1], x[2]}});
  }
  return atoms;
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  module.doc() = "Torch-free helpers of the LAMMPS plugin, for tests and `ubmd doctor`.";
  module.attr("torch_version") = UBMD_TORCH_VERSION;
  module.attr("lammps_version") = UBMD_LAMMPS_VERSION;
  module.attr("lammps_package") = UBMD_LAMMPS_PACKAGE;
  module.attr("newest_format") = ubmd::newest_format;
  py::register_exception<ubmd::Error>(module, "Error");

  py::class_<ubmd::Window>(module, "Window", "Moving window behind the scale of the bias.")
      .def(py::init<std::size_t>(), py::arg("length"))
      .def("add", &ubmd::Window::add, py::arg("step"), py::arg("physical"), py::arg("uncertainty"),
           "Enter squared norms; the same step again replaces its entry.")
      .def("scale", &ubmd::Window::scale, "sqrt(sum physical) / sqrt(sum uncertainty), 0 until full.")
      .def("state", &ubmd::Window::state)
      .def("restore", &ubmd::Window::restore, py::arg("state"))
      .def_property_readonly("full", &ubmd::Window::full);

  module.def("device_of_rank", &ubmd::device_of_rank, py::arg("device"), py::arg("local_rank"), py::arg("n_devices"));
  module.def("local_rank", &ubmd::local_rank, "Rank on this node, from the environment.");
  module.def(
      "energy_unit",
      [](const std::string &style) {
        const auto unit = ubmd::energy_unit(style);
        return std::make_pair(unit.per_ev, unit.name);
      },
      py::arg("style"), "(one eV in the energy unit of a LAMMPS unit style, name of that unit).");

  py::class_<ubmd::Metadata>(module, "Metadata", "Checked metadata record of a model file.")
      .def_readonly("format", &ubmd::Metadata::format)
      .def_readonly("elements", &ubmd::Metadata::elements)
      .def_readonly("cutoff", &ubmd::Metadata::cutoff)
      .def_readonly("projections", &ubmd::Metadata::projections)
      .def_readonly("operators", &ubmd::Metadata::operators);
  module.def("parse_metadata", &ubmd::parse_metadata, py::arg("json"), py::arg("file"));
  module.def("map_elements", &ubmd::map_elements, py::arg("metadata"), py::arg("names"), py::arg("file"));

  module.def(
      "refusal",
      [](int lammps, const std::string &torch, const std::string &mpi, const std::string &integer_sizes) {
        return ubmd::refusal({UBMD_LAMMPS_VERSION, UBMD_TORCH_VERSION, "MPICH", "8 4 4"},
                             {lammps, torch, mpi, integer_sizes});
      },
      py::arg("lammps"), py::arg("torch"), py::arg("mpi"), py::arg("integer_sizes"),
      "Why this plugin can't run with these versions; empty if it can.");

  py::class_<ubmd::Block>(module, "Block", "Consecutive centres with their pairs, as a model file takes them.")
      .def_readonly("centres", &ubmd::Block::centres)
      .def_readonly("species", &ubmd::Block::species)
      .def_readonly("first", &ubmd::Block::first)
      .def_property_readonly("neighbours",
                             [](const ubmd::Block &block) { return of_pairs(block, block.neighbours, 1); })
      .def_property_readonly("ends", [](const ubmd::Block &block) { return of_pairs(block, block.ends, 1); })
      .def_property_readonly("vectors", [](const ubmd::Block &block) { return of_pairs(block, block.vectors, 3); })
      .def("scatter", &scatter, py::arg("gradient"), py::arg("n_all"),
           "(dSum/dx [n_all, 3], dSum/dstrain [3, 3]) of a gradient [P, 3] with respect to the vectors.");
  module.def("build_blocks", &build_blocks, py::arg("positions"), py::arg("types"), py::arg("n_local"),
             py::arg("neighbours"), py::arg("species"), py::arg("cutoff"), py::arg("size"));

  py::class_<ubmd::Crystal>(module, "Crystal", "Sites of the atoms of a crystal.")
      .def(py::init([](const std::string &json) {
             return ubmd::Crystal(ubmd::parse_metadata(json, "of the test").lattice.value());
           }),
           py::arg("metadata"), "From the JSON record of a model file.")
      .def(
          "map",
          [](ubmd::Crystal &crystal, const ubmd::Matrix &box, const std::vector<std::int64_t> &tags,
             const std::vector<int> &species,
             const Positions &positions) { crystal.map(box, system_atoms(tags, species, positions)); },
          py::arg("box"), py::arg("tags"), py::arg("species"), py::arg("positions"))
      .def("has_box", &ubmd::Crystal::has_box, py::arg("box"))
      .def(
          "site_of",
          [](const ubmd::Crystal &crystal, std::int64_t tag) {
            const auto *site = crystal.site_of(tag);
            return site ? std::optional(*site) : std::nullopt;
          },
          py::arg("tag"))
      .def_property_readonly("drift", [](const ubmd::Crystal &crystal) { return crystal.drift(); })
      .def_property_readonly("multiple", [](const ubmd::Crystal &crystal) { return crystal.fit().multiple; })
      .def_property_readonly("rotation", [](const ubmd::Crystal &crystal) { return crystal.fit().rotation; })
      .def_property_readonly("cell", [](const ubmd::Crystal &crystal) { return crystal.fit().cell; });
  module.def(
      "nearest_translation",
      [](const ubmd::Matrix &basis, ubmd::Vector vector) {
        const auto cell = ubmd::Translations(basis).nearest(vector);
        return std::make_pair(cell, vector);
      },
      py::arg("basis"), py::arg("vector"), "(combination of the rows of basis nearest to a vector, what remains).");

  py::class_<ubmd::FrameAtom>(module, "FrameAtom")
      .def(py::init([](std::int64_t id, std::string name, std::array<double, 3> x, double u) {
             return ubmd::FrameAtom{id, std::move(name), {x[0], x[1], x[2]}, u};
           }),
           py::arg("id"), py::arg("name"), py::arg("position"), py::arg("uncertainty"));
  module.def(
      "format_frame",
      [](std::int64_t step, double u, double u_max, std::array<bool, 3> pbc, std::array<double, 9> cell,
         std::vector<ubmd::FrameAtom> atoms) {
        ubmd::Frame frame{step, u, u_max, {pbc[0], pbc[1], pbc[2]}, {}, std::move(atoms)};
        std::copy(cell.begin(), cell.end(), frame.cell);
        return ubmd::format_frame(std::move(frame));
      },
      py::arg("step"), py::arg("uncertainty"), py::arg("max_uncertainty"), py::arg("pbc"), py::arg("cell"),
      py::arg("atoms"), "One extended-XYZ frame as text, atoms sorted by id.");
}
