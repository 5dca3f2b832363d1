#include "crystal.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "ubmd_error.h"

namespace ubmd {
namespace {

std::string text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.3g", value);
  return buffer;
}

}  // namespace

void SiteTable::reset(std::size_t n) {
  std::size_t size = 16;
  while (size < 2 * n) size *= 2;
  keys_.resize(size);
  values_.assign(size, -1);
}

// Position of a site, whether or not an atom is there.
std::size_t SiteTable::slot(const Site &site) const {
  std::uint64_t hash = 0;
  for (int number : site) hash = (hash ^ static_cast<std::uint32_t>(number)) * 0x9E3779B97F4A7C15ULL;
  std::size_t k = (hash ^ (hash >> 29)) & (values_.size() - 1);
  while (values_[k] >= 0 && keys_[k] != site) k = (k + 1) & (values_.size() - 1);
  return k;
}

bool SiteTable::insert(const Site &site, int index) {
  const auto k = slot(site);
  if (values_[k] >= 0) return false;
  keys_[k] = site;
  values_[k] = index;
  return true;
}

int SiteTable::find(const Site &site) const {
  return values_[slot(site)];
}

// ---- atoms to sites ----

namespace {

constexpr std::size_t sample_size = 256;  // atoms that choose between the possible orientations and origins
constexpr int trials = 4;                 // atoms tried on every sublattice of their species

// One placement of the ideal crystal, and how well some atoms agree with it.
struct Trial {
  const Fit *fit;
  Vector shift;
  double deviation;  // root mean square displacement from the mean, Å
};

struct Assignment {
  std::vector<Site> sites;
  std::vector<Vector> rest;  // displacements
  Vector mean{};
};

// The nearest site of its species for every atom, for the crystal shifted rigidly by `shift`.
Assignment assign(const Lattice &lattice, const Fit &fit, const std::vector<SystemAtom> &atoms, const Vector &shift) {
  const Translations translations(fit.cell);
  std::vector<Vector> sublattices;
  for (const auto &scaled : lattice.scaled) sublattices.push_back(times(scaled, fit.cell) + shift);
  Assignment result;
  for (const auto &atom : atoms) {
    Site site{};
    Vector rest{};
    double shortest = std::numeric_limits<double>::infinity();
    for (std::size_t s = 0; s < sublattices.size(); ++s) {
      if (lattice.species[s] != atom.species) continue;
      Vector vector = atom.position - sublattices[s];
      const auto cell = translations.nearest(vector);
      if (dot(vector, vector) >= shortest) continue;
      shortest = dot(vector, vector);
      rest = vector;
      site = {cell[0], cell[1], cell[2], static_cast<int>(s)};
    }
    result.sites.push_back(site);
    result.rest.push_back(rest);
    result.mean = result.mean + (1.0 / static_cast<double>(atoms.size())) * rest;
  }
  return result;
}

// Move the crystal by the mean displacement until that is small: an estimate of the origin from one atom has the error
// of that atom's displacement.
Assignment refine(const Lattice &lattice, const Fit &fit, const std::vector<SystemAtom> &atoms, Vector &shift) {
  auto result = assign(lattice, fit, atoms, shift);
  for (int step = 0; step < 10 && norm(result.mean) > 1e-3; ++step) {
    shift = shift + result.mean;
    result = assign(lattice, fit, atoms, shift);
  }
  return result;
}

double deviation(const Assignment &assignment) {
  double sum = 0.0;
  for (const auto &rest : assignment.rest) {
    const auto u = rest - assignment.mean;
    sum += dot(u, u);
  }
  return std::sqrt(sum / static_cast<double>(assignment.rest.size()));
}

// The species with the fewest sublattices, among those that the crystal has.
int rarest_species(const Lattice &lattice) {
  int rarest = lattice.species[0];
  const auto count = [&](int species) { return std::count(lattice.species.begin(), lattice.species.end(), species); };
  for (int species : lattice.species)
    if (count(species) < count(rarest)) rarest = species;
  return rarest;
}

// Origins to try: that of the model, then each of a few atoms on each sublattice of its species.
std::vector<Vector> origins(const Lattice &lattice, const Fit &fit, const std::vector<SystemAtom> &atoms) {
  std::vector<Vector> shifts = {{}};
  const int rarest = rarest_species(lattice);
  int tried = 0;
  for (const auto &atom : atoms) {
    if (atom.species != rarest) continue;
    if (tried++ == trials) break;
    for (std::size_t s = 0; s < lattice.scaled.size(); ++s) {
      if (lattice.species[s] != rarest) continue;
      Vector shift = atom.position - times(lattice.scaled[s], fit.cell);
      Translations(fit.cell).nearest(shift);
      shifts.push_back(shift);
    }
  }
  return shifts;
}

// A few atoms spread over the whole list.
std::vector<SystemAtom> sample(const std::vector<SystemAtom> &atoms) {
  std::vector<SystemAtom> few;
  const std::size_t n = std::min(atoms.size(), sample_size);
  for (std::size_t k = 0; k < n; ++k) few.push_back(atoms[k * atoms.size() / n]);
  return few;
}

// The possible placements of the crystal, the best first. Equally good ones (they differ by a symmetry of the crystal)
// stay in order: that of the model comes first.
std::vector<Trial> rank(const Lattice &lattice, const std::vector<Fit> &fits, const std::vector<SystemAtom> &atoms) {
  constexpr double equal = 0.02;  // Å: smaller differences of a few atoms are not significant
  const auto few = sample(atoms);
  std::vector<Trial> ranked;
  for (const auto &fit : fits) {
    Trial best{&fit, {}, std::numeric_limits<double>::infinity()};
    for (auto shift : origins(lattice, fit, atoms)) {
      const double value = deviation(refine(lattice, fit, few, shift));
      if (value < best.deviation - equal) best = {&fit, shift, value};
    }
    ranked.push_back(best);
    // without rotation, and within thermal vibrations: no need to look further
    if (!fit.is_turned() && best.deviation < 0.25 * lattice.max_displacement) return ranked;
  }
  std::stable_sort(ranked.begin(), ranked.end(), [&](const Trial &a, const Trial &b) {
    return std::floor(a.deviation / equal) < std::floor(b.deviation / equal);
  });
  return ranked;
}

// Two atoms on one site of the periodic box; {-1, -1} if there are none.
std::array<int, 2> find_double(const std::vector<Site> &sites, const Fit &fit) {
  std::array<std::array<std::int64_t, 3>, 3>
      adjugate;  // of the multiple: cells that are images differ by multiples of det
  const auto &m = fit.multiple;
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k) {
      const int a = (k + 1) % 3, b = (k + 2) % 3, c = (i + 1) % 3, d = (i + 2) % 3;
      adjugate[i][k] = static_cast<std::int64_t>(m[a][c]) * m[b][d] - static_cast<std::int64_t>(m[a][d]) * m[b][c];
    }
  SiteTable table;
  table.reset(sites.size());
  for (std::size_t n = 0; n < sites.size(); ++n) {
    Site key = sites[n];
    for (int k = 0; k < 3; ++k) {
      std::int64_t value = 0;
      for (int i = 0; i < 3; ++i) value += sites[n][i] * adjugate[i][k];
      key[k] = static_cast<int>(((value % fit.n_cells) + fit.n_cells) % fit.n_cells);
    }
    if (!table.insert(key, static_cast<int>(n))) return {table.find(key), static_cast<int>(n)};
  }
  return {-1, -1};
}

void check_numbers(const Lattice &lattice, const Fit &fit, const std::vector<SystemAtom> &atoms) {
  std::vector<std::int64_t> missing(1 + *std::max_element(lattice.species.begin(), lattice.species.end()), 0);
  for (int species : lattice.species) missing[species] += fit.n_cells;
  bool same = true;
  for (const auto &atom : atoms) {
    same = same && atom.species < static_cast<int>(missing.size());
    if (same) --missing[atom.species];
  }
  for (auto count : missing) same = same && count == 0;
  if (same) return;
  const auto n_sites = fit.n_cells * static_cast<std::int64_t>(lattice.species.size());
  if (static_cast<std::int64_t>(atoms.size()) != n_sites)
    throw Error("the box has " + std::to_string(atoms.size()) + " atoms of the crystal but the crystal has " +
                std::to_string(n_sites) + " sites in it: start from a crystal without vacancies and interstitials");
  throw Error(
      "the numbers of atoms of each element differ from those of the crystal's sites: check the names in pair_coeff");
}

}  // namespace

void Crystal::map(const Matrix &box, std::vector<SystemAtom> atoms) {
  tags_.clear();
  std::sort(atoms.begin(), atoms.end(), [](const auto &a, const auto &b) { return a.tag < b.tag; });
  const auto fits = find_fits(lattice_, box);
  if (fits.empty())
    throw Error(
        "the box is not an integer multiple of the primitive cell that the model was trained for: build it by "
        "repeating that cell without strain or thermal expansion");
  check_numbers(lattice_, fits.front(), atoms);
  std::string reason;
  for (auto &trial : rank(lattice_, fits, atoms)) {
    const auto found = refine(lattice_, *trial.fit, atoms, trial.shift);
    const auto pair = find_double(found.sites, *trial.fit);
    std::size_t far = 0;
    double largest = 0.0;
    for (std::size_t k = 0; k < atoms.size(); ++k) {
      const double u = norm(found.rest[k] - found.mean);
      if (u > largest) far = k;
      largest = std::max(largest, u);
    }
    if (pair[0] < 0 && largest <= lattice_.max_displacement) {
      fit_ = *trial.fit;
      turned_ = fit_.is_turned();
      box_ = box;
      periods_ = Translations(box);
      drift_ = trial.shift + found.mean;
      sites_ = found.sites;
      for (const auto &atom : atoms) tags_.push_back(atom.tag);
      return;
    }
    if (!reason.empty()) continue;  // of the best
    reason = pair[0] >= 0
                 ? "atoms " + std::to_string(atoms[pair[0]].tag) + " and " + std::to_string(atoms[pair[1]].tag) +
                       " are nearest to the same site"
                 : "atom " + std::to_string(atoms[far].tag) + " is " + text(largest) +
                       " A away from its site, more than the model's " + text(lattice_.max_displacement) + " A";
  }
  throw Error("the atoms don't lie on the sites of the crystal (" + reason +
              "): start from the ideal crystal or from small displacements of it");
}

bool Crystal::has_box(const Matrix &box) const {
  const double size = norm(box_[0]) + norm(box_[1]) + norm(box_[2]);
  return is_mapped() && largest_difference(box, box_) <= 1e-9 * size;
}

std::size_t Crystal::index_of(std::int64_t tag) const {
  const auto found = std::lower_bound(tags_.begin(), tags_.end(), tag);
  return found != tags_.end() && *found == tag ? static_cast<std::size_t>(found - tags_.begin()) : tags_.size();
}

const Site *Crystal::site_of(std::int64_t tag) const {
  const auto k = index_of(tag);
  return k < tags_.size() ? &sites_[k] : nullptr;
}

bool Crystal::knows(const std::vector<std::int64_t> &tags, const std::vector<int> &species) const {
  for (std::size_t i = 0; i < tags.size(); ++i) {
    const auto *site = site_of(tags[i]);
    if ((site ? lattice_.species[(*site)[3]] : -1) != species[i]) return false;
  }
  return true;
}

// Ideal position; the drift isn't in it.
Vector Crystal::ideal(const Site &site) const {
  const auto &scaled = lattice_.scaled[site[3]];
  return times(Vector{scaled[0] + site[0], scaled[1] + site[1], scaled[2] + site[2]}, fit_.cell);
}

void Crystal::locate(int n_local, const double *positions, const std::vector<std::int64_t> &tags,
                     const std::vector<int> &species) {
  const std::size_t n_all = tags.size();
  n_local_ = n_local;
  takes_part_.assign(n_all, 0);
  homes_.assign(3 * n_all, 0.0);
  displacements_.assign(3 * n_all, 0.0);
  images_.assign(n_all, {});
  for (std::size_t i = 0; i < n_all; ++i) {
    if (species[i] < 0) continue;
    const auto *site = site_of(tags[i]);
    if (!site || lattice_.species[(*site)[3]] != species[i])
      throw Error("atom " + std::to_string(tags[i]) +
                  " has no site of its element in the crystal: atoms and types must not change during a run");
    Vector rest = Vector{positions[3 * i], positions[3 * i + 1], positions[3 * i + 2]} - ideal(*site) - drift_;
    const auto shift = periods_.nearest(rest);
    images_[i] = *site;
    for (int k = 0; k < 3; ++k)
      for (int row = 0; row < 3; ++row) images_[i][k] += shift[row] * fit_.multiple[row][k];
    const auto home = ideal(images_[i]);  // of the image itself: the same bits whichever image was mapped
    for (int k = 0; k < 3; ++k) homes_[3 * i + k] = home[k];
    takes_part_[i] = 1;
  }

  // ordered by sublattice: blocks are then runs of one sublattice, for which the model has one table
  const auto n_sublattices = lattice_.sites.size();
  std::vector<std::size_t> starts(n_sublattices + 1, 0);
  for (int i = 0; i < n_local; ++i)
    if (takes_part_[i]) ++starts[images_[i][3] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  centres_.resize(starts.back());
  sublattices_.resize(starts.back());
  for (int i = 0; i < n_local; ++i)
    if (takes_part_[i]) {
      const auto k = starts[images_[i][3]]++;
      centres_[k] = i;
      sublattices_[k] = images_[i][3];
    }
}

void Crystal::connect(const std::vector<std::int64_t> &tags) {
  SiteTable table;
  table.reset(tags.size());
  for (std::size_t i = 0; i < tags.size(); ++i)
    if (takes_part_[i]) table.insert(images_[i], static_cast<int>(i));
  first_.assign(1, 0);
  ends_.clear();
  for (std::size_t k = 0; k < centres_.size(); ++k) {
    const auto &centre = images_[centres_[k]];
    for (const auto &site : lattice_.sites[sublattices_[k]]) {
      const int end = table.find({centre[0] + site[0], centre[1] + site[1], centre[2] + site[2], site[3]});
      if (end < 0)
        throw Error("an atom on a site near atom " + std::to_string(tags[centres_[k]]) +
                    " is unknown to this processor: use a larger 'comm_modify cutoff'");
      ends_.push_back(end);
    }
    first_.push_back(static_cast<std::int64_t>(ends_.size()));
  }
}

Vector Crystal::displace(const double *positions) {
  Vector sum{};
  for (std::size_t i = 0; i < takes_part_.size(); ++i) {
    if (!takes_part_[i]) continue;
    for (std::size_t k = 3 * i; k < 3 * i + 3; ++k) displacements_[k] = positions[k] - homes_[k];
    if (static_cast<int>(i) < n_local_)
      for (int k = 0; k < 3; ++k) sum[k] += displacements_[3 * i + k];
  }
  return sum;
}

Crystal::Largest Crystal::centre(const Vector &mean) {
  drift_ = mean;
  Largest largest;
  const auto turn = transpose(fit_.rotation);
  for (std::size_t i = 0; i < takes_part_.size(); ++i) {
    if (!takes_part_[i]) continue;
    double *at = displacements_.data() + 3 * i;
    Vector u = Vector{at[0], at[1], at[2]} - mean;
    if (static_cast<int>(i) < n_local_ && !(dot(u, u) <= largest.displacement))
      largest = {static_cast<int>(i), dot(u, u)};  // its square for now
    if (turned_) u = times(u, turn);
    for (int k = 0; k < 3; ++k) at[k] = u[k];
  }
  largest.displacement = std::sqrt(largest.displacement);
  return largest;
}

void Crystal::build(Block &block, std::size_t begin, std::size_t end) const {
  block.of_sites = true;
  block.centres.assign(centres_.begin() + begin, centres_.begin() + end);
  block.species.assign(sublattices_.begin() + begin, sublattices_.begin() + end);
  block.first.resize(end - begin + 1);
  for (std::size_t k = begin; k <= end; ++k) block.first[k - begin] = first_[k] - first_[begin];
  const auto start = static_cast<std::size_t>(first_[begin]), n = static_cast<std::size_t>(first_[end]) - start;
  // never shrinks: steady steps neither allocate nor clear memory
  if (block.ends.size() < n) {
    block.ends.resize(n);
    block.neighbours.resize(n);
    block.displacements.resize(3 * n);
  }
  for (std::size_t e = 0; e < n; ++e) {
    const int atom = ends_[start + e];
    const double *u = displacements_.data() + 3 * static_cast<std::size_t>(atom);
    block.ends[e] = atom;
    for (int k = 0; k < 3; ++k) block.displacements[3 * e + k] = u[k];
  }
}

void Crystal::turn_back(const double *vectors, std::size_t n, double *turned) const {
  for (std::size_t i = 0; i < n; ++i) {
    const auto v = times(Vector{vectors[3 * i], vectors[3 * i + 1], vectors[3 * i + 2]}, fit_.rotation);
    for (int k = 0; k < 3; ++k) turned[3 * i + k] = v[k];
  }
}

Matrix Crystal::turn_back(const Matrix &tensor) const {
  return product(product(transpose(fit_.rotation), tensor), fit_.rotation);
}

double Crystal::bytes() const {
  return static_cast<double>(tags_.capacity() * sizeof(std::int64_t) +
                             (sites_.capacity() + images_.capacity()) * sizeof(Site) +
                             (homes_.capacity() + displacements_.capacity()) * sizeof(double) +
                             (ends_.capacity() + centres_.capacity() + sublattices_.capacity()) * sizeof(int) +
                             (first_.capacity()) * sizeof(std::int64_t));
}

}  // namespace ubmd
