// Energies of clusters of atoms in a crystal: what the vectorised kernels offer (see cluster_kernels.h), and the
// operators as functions on tensors (clusters.cpp). Everything is float64.
//
// The energy of a centre is a sum over its clusters of multilinear forms of monomials x^a y^b z^c of the displacements
// of its relative sites. Monomials of one degree m, D(m) = (m + 1)(m + 2)/2 of them, are in the order xx xy xz yy yz zz
// and alike; degree 0 is left out.
#pragma once

#include <cstdint>

namespace ubmd::ops {

constexpr int kMaxBodies = 6, kMaxDegree = 6;

__attribute__((always_inline)) constexpr int count_monomials(int degree) {
  return (degree + 1) * (degree + 2) / 2;
}
// Number of monomials of the degrees 1 .. degree.
__attribute__((always_inline)) constexpr int count_all_monomials(int degree) {
  return (degree + 1) * (degree + 2) * (degree + 3) / 6 - 1;
}

// Clusters that differ in their last body alone: coefficients [n_clusters, rows, columns], where rows are those of the
// product of the other bodies' monomials.
struct ClusterGroup {
  int n_others;                // bodies but the last
  int others[kMaxBodies - 1];  // where their monomials begin
  int dims[kMaxBodies - 1];    // numbers of their monomials
  int rows, columns;
  int n_clusters;
  const int *last;           // [n_clusters] where the monomials of the last body begin
  std::int64_t coefficient;  // where the first cluster's coefficients begin
};

// A cluster that contains the centre; bodies are in the order of the orbit's prototype.
struct ClusterMember {
  int centre;              // the body that is the centre
  int places[kMaxBodies];  // where the monomials of the bodies begin
  int operation;           // from the prototype to the cluster
};

// Members of one orbit, with the tensors that symmetry allows: raw [dimension, n_raw].
struct ClusterOrbit {
  int n_bodies;
  int degrees[kMaxBodies];
  const ClusterMember *members;
  int n_members;
  int dimension, n_raw;
  const double *raw;
  std::int64_t raw_place;  // where its raw coefficients begin
};

// What belongs to the centres of one sublattice. Site k has monomials of the degrees 1 .. degree[k] from place[k] on.
struct ClusterProgram {
  int n_sites;
  const int *degree, *place;
  int n_monomials;
  int n_groups;
  const ClusterGroup *groups;
  int n_orbits;
  const ClusterOrbit *orbits;
  int largest_rows;       // of all groups
  int largest_dimension;  // of all orbits
  std::int64_t n_raw;     // raw coefficients of all orbits
};

// Matrices that turn tensors of each degree, without their zeros: the row i of operation g has the elements
// first[start[degree] + g * D + i] and on.
struct ClusterTurns {
  const std::int64_t *start, *first, *column;
  const double *value;
};

struct Centres {
  std::int64_t n;
  const std::int64_t *indices;  // [n] of centres on one sublattice
  const std::int64_t *first;    // edges of each of all centres
  const double *displacement;   // [P, 3]
};

struct ClusterKernels {
  int lanes;         // centres that are handled at once
  int vector_bytes;  // of one number for all of them
  // Vectors of scratch (64-byte aligned) for `contract` and `site_moments`.
  std::int64_t (*scratch)(const ClusterProgram &);
  // Energies (indexed by centre) and gradients (by edge, all edges of the centres) for the coefficients.
  void (*contract)(const ClusterProgram &, const Centres &, const double *coefficients, double *energy,
                   double *gradient, char *scratch);
  // Monomials of centres (at most one lane each) for `moments`.
  void (*monomials)(const ClusterProgram &, const Centres &, char *out);
  // Adds to out [C] the products of monomials of n_tiles sets of centres, summed over the centres, for some groups.
  void (*moments)(const ClusterProgram &, int begin, int end, int n_tiles, const char *monomials, double *out,
                  char *scratch);
  std::int64_t (*moments_scratch)(const ClusterProgram &, int n_tiles);
  // Derivatives [n, 3, raw] of the energy by each centre's displacement and the raw coefficients.
  void (*site_moments)(const ClusterProgram &, const ClusterTurns &, const Centres &, double *out, char *scratch);
  // y [rows] = M x, and y [columns] += x M, for M [rows, columns]; of triangular ones the left lower part is zero.
  void (*multiply)(std::int64_t rows, std::int64_t columns, const double *matrix, const double *x, double *y,
                   bool triangular);
  void (*multiply_transposed)(std::int64_t rows, std::int64_t columns, const double *matrix, const double *x, double *y,
                              bool triangular);
};

const ClusterKernels &cluster_kernels();

}  // namespace ubmd::ops
