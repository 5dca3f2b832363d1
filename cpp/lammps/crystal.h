// The sites of a crystal: how the ideal crystal lies in the box, which atom belongs to which site, displacements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "graph.h"
#include "lattice_fit.h"
#include "metadata.h"

namespace ubmd {

using Site = std::array<int, 4>;  // cell, sublattice

// Index of each of a set of sites.
class SiteTable {
 public:
  void reset(std::size_t n);
  // False if the site is there already.
  bool insert(const Site &site, int index);
  int find(const Site &site) const;  // -1: not there

 private:
  std::size_t slot(const Site &site) const;

  std::vector<Site> keys_;
  std::vector<int> values_;  // -1: free
};

// The atoms of the whole system that take part, in any order.
struct SystemAtom {
  std::int64_t tag;
  int species;
  Vector position;
};

// All members take and give positions in the box's frame; displacements for the model are in the model's.
class Crystal {
 public:
  explicit Crystal(const Lattice &lattice) : lattice_(lattice) {}

  double max_displacement() const { return lattice_.max_displacement; }

  // ---- the whole system: the same on all ranks ----

  // Find how the crystal lies in a box and give each atom its site; throws Error.
  void map(const Matrix &box, std::vector<SystemAtom> atoms);
  bool is_mapped() const { return !tags_.empty(); }
  // Whether the box is the one that was mapped.
  bool has_box(const Matrix &box) const;
  std::int64_t n_sites() const { return static_cast<std::int64_t>(tags_.size()); }
  const Fit &fit() const { return fit_; }
  // Mean displacement of all atoms: the crystal may drift.
  const Vector &drift() const { return drift_; }
  // Site of an atom at mapping; nullptr if the tag wasn't mapped.
  const Site *site_of(std::int64_t tag) const;

  // ---- the atoms of this rank ----

  // Whether all atoms have a site of their species (species -1: takes no part).
  bool knows(const std::vector<std::int64_t> &tags, const std::vector<int> &species) const;
  // After owned atoms and ghosts were set up again: find the image of each atom's site, and the atoms on the sites of
  // each owned centre; throws Error.
  void locate(int n_local, const double *positions, const std::vector<std::int64_t> &tags,
              const std::vector<int> &species);
  // Then find the atoms on the sites of each owned centre; throws Error.
  void connect(const std::vector<std::int64_t> &tags);
  // Owned atoms that take part, ordered by sublattice.
  const std::vector<int> &centres() const { return centres_; }
  // Displacements from the ideal sites, and their sum over the owned atoms.
  Vector displace(const double *positions);
  // Subtract the mean over the whole system, which becomes the drift. Gives the owned atom that is displaced most.
  struct Largest {
    int atom = -1;
    double displacement = 0.0;  // Å
  };
  Largest centre(const Vector &mean);
  // Displacements [n_all, 3] after centre(), in the model's frame.
  const std::vector<double> &displacements() const { return displacements_; }
  // The block of centres begin to end - 1 (of centres()), without vectors and elements of neighbours.
  void build(Block &block, std::size_t begin, std::size_t end) const;
  // Turn vectors [n, 3] from the model's frame into the box's.
  void turn_back(const double *vectors, std::size_t n, double *turned) const;

  // The same for a tensor: rows of positions, columns of gradients.
  Matrix turn_back(const Matrix &tensor) const;

  double bytes() const;

 private:
  Vector ideal(const Site &site) const;
  std::size_t index_of(std::int64_t tag) const;

  Lattice lattice_;
  Matrix box_{};
  Translations periods_;  // of the box
  Fit fit_;
  bool turned_ = false;
  Vector drift_{};
  std::vector<std::int64_t> tags_;  // sorted
  std::vector<Site> sites_;         // of each tag

  int n_local_ = 0;
  std::vector<char> takes_part_;       // [n_all]
  std::vector<Site> images_;           // [n_all]
  std::vector<double> homes_;          // [n_all, 3] ideal positions, the image next to the atom
  std::vector<double> displacements_;  // [n_all, 3]
  std::vector<int> centres_;
  std::vector<int> sublattices_;     // of each centre
  std::vector<std::int64_t> first_;  // of each centre, into the next ones
  std::vector<int> ends_;            // atom on each site of a centre
};

}  // namespace ubmd
