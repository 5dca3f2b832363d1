#include "replica_group.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <system_error>

#include "ubmd_error.h"

namespace ubmd {
namespace {

// The place of the calling thread, if it is one of a group.
struct Place {
  ReplicaGroup *group = nullptr;
  std::size_t replica = 0;
};
thread_local Place place;

// The model of one replica: evaluations go to the group, with all that follows from them.
class ReplicaModel : public Model {
 public:
  ReplicaModel(ReplicaGroup &group, std::size_t replica) : group_(group), replica_(replica) {
    metadata_ = group.model().metadata();
  }

  // A replica's atoms stay in one block: its evaluations must not be more than those of the others.
  std::size_t largest_block() const override { return std::numeric_limits<std::size_t>::max(); }
  void warm_up(const Request &request) override { group_.warm_up(request); }
  void start(const Request &request) override { job_.request = request; }
  Forces evaluate(const Block &block) override;
  void add_features() override {}
  Values atomic_uncertainties() override { return job_.uncertainties; }
  Values member_gradients() override { return {}; }
  std::vector<double> feature_sum() override;
  double uncertainty(const std::vector<double> &mean, std::vector<double> *weight) override;
  Values force_uncertainties(const std::vector<double> &, std::vector<double> *) override { return {}; }
  void set_weight(const std::vector<double> &weight) override { weight_ = weight; }
  Values bias(std::size_t) override;
  Values atomic_bias(std::size_t, const std::vector<double> &weights) override { return ask_for_bias(weights); }
  Values member_bias(std::size_t, const Block &, const std::vector<double> &) override { return {}; }
  void release() override {}

 private:
  Values ask_for_bias(const std::vector<double> &weights);

  ReplicaGroup &group_;
  std::size_t replica_;
  ReplicaGroup::Job job_;
  std::vector<double> weight_;
};

Forces ReplicaModel::evaluate(const Block &block) {
  job_.kind = ReplicaGroup::Job::Kind::evaluation;
  job_.block = &block;
  group_.wait(replica_, job_);
  return std::move(job_.forces);
}

std::vector<double> ReplicaModel::feature_sum() {
  return job_.sum.empty() ? std::vector<double>(metadata_.projections, 0.0) : job_.sum;
}

// A replica has one process, so its mean is that of its own atoms, as a rule; the uncertainty there is known.
double ReplicaModel::uncertainty(const std::vector<double> &mean, std::vector<double> *weight) {
  if (mean != job_.mean) return group_.model().uncertainty(mean, weight);
  if (weight) *weight = job_.slope;
  return job_.u;
}

Values ReplicaModel::bias(std::size_t) {
  return weight_ == job_.direction ? std::move(job_.gradient) : ask_for_bias(weight_);
}

Values ReplicaModel::ask_for_bias(const std::vector<double> &weights) {
  job_.kind = ReplicaGroup::Job::Kind::bias;
  job_.weights = weights;
  group_.wait(replica_, job_);
  return std::move(job_.gradient);
}

}  // namespace

// ---- stacks ----

namespace {
constexpr std::size_t stack_size = std::size_t{8} << 20;  // bytes, as that of a thread; used pages count only
}

// The lowest page is never mapped: an overflow ends the process instead of overwriting something.
Coroutine::Coroutine(std::function<void()> work) : work_(std::move(work)) {
  stack_ =
      mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
  if (stack_ == MAP_FAILED) throw Error("there is no memory for the stack of a replica: run fewer at once");
  mprotect(stack_, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = stack_size;
  own_.uc_link = nullptr;
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&own_, reinterpret_cast<void (*)()>(begin), 2, static_cast<unsigned>(self),
              static_cast<unsigned>(std::uint64_t{self} >> 32));
}

Coroutine::~Coroutine() {
  munmap(stack_, stack_size);
}

// makecontext passes integers only.
void Coroutine::begin(unsigned low, unsigned high) {
  auto *self = reinterpret_cast<Coroutine *>(static_cast<std::uintptr_t>(std::uint64_t{high} << 32 | low));
  self->work_();
  self->ended_ = true;
  self->pause();
}

void Coroutine::resume() {
  swapcontext(&caller_, &own_);
}

void Coroutine::pause() {
  swapcontext(&own_, &caller_);
}

// ---- turns ----

ReplicaGroup::ReplicaGroup(std::size_t n_replicas) : replicas_(n_replicas) {}

void ReplicaGroup::enter(std::size_t k) {
  place = {this, k};
  std::unique_lock lock(mutex_);
  replicas_[k].turn.wait(lock, [&] { return turn_ == k; });
}

void ReplicaGroup::run(std::size_t k, std::function<void()> command) {
  std::unique_lock lock(mutex_);
  replicas_[k].command = std::move(command);
  replicas_[k].state = State::running;
  pass_turn();
  replicas_[k].turn.wait(lock, [&] { return turn_ == k; });
}

void ReplicaGroup::leave(std::size_t k) {
  const std::lock_guard lock(mutex_);
  replicas_[k].state = State::ended;
  place = {};
  if (turn_ == k) pass_turn();
}

// To the next thread that is at work, those that have not entered yet included; if there is none, to serve().
void ReplicaGroup::pass_turn() {
  const auto next = std::find_if(replicas_.begin(), replicas_.end(),
                                 [](const Replica &replica) { return replica.state == State::busy; });
  turn_ = next == replicas_.end() ? server : static_cast<std::size_t>(next - replicas_.begin());
  (turn_ == server ? server_turn_ : next->turn).notify_one();
}

void ReplicaGroup::serve() {
  const auto has_ended = [](const Replica &replica) { return replica.state == State::ended; };
  std::unique_lock lock(mutex_);
  for (;;) {
    server_turn_.wait(lock, [&] { return turn_ == server; });
    if (std::all_of(replicas_.begin(), replicas_.end(), has_ended)) return;
    advance();
    pass_turn();
  }
}

// ---- commands ----

// Until at least one of them is done.
void ReplicaGroup::advance() {
  while (!resume_all()) do_jobs();
}

// Every command runs until it waits or is done; returns whether one is.
bool ReplicaGroup::resume_all() {
  bool any_done = false;
  for (std::size_t k = 0; k < replicas_.size(); ++k) {
    auto &replica = replicas_[k];
    if (replica.state != State::running || replica.job) continue;
    if (!replica.coroutine) replica.coroutine = std::make_unique<Coroutine>(std::move(replica.command));
    resumed_ = k;
    replica.coroutine->resume();
    resumed_ = server;
    if (!replica.coroutine->has_ended()) continue;
    replica.coroutine.reset();
    replica.state = State::busy;
    any_done = true;
  }
  return any_done;
}

void ReplicaGroup::wait(std::size_t k, Job &job) {
  job.error.clear();
  replicas_[k].job = &job;
  if (resumed_ == k)
    replicas_[k].coroutine->pause();
  else
    do_jobs();  // a command of its thread alone
  job.kind = Job::Kind::none;
  if (!job.error.empty()) throw Error(job.error);
}

// ---- evaluations ----

// Biases first: they belong to the last evaluation, which the next one takes the place of.
void ReplicaGroup::do_jobs() {
  const auto try_to = [&](Job::Kind kind, auto work) {
    const auto waiting = waiting_for(kind);
    if (waiting.empty()) return;
    try {
      (this->*work)();
    } catch (const std::exception &problem) {
      for (auto k : waiting) replicas_[k].job->error = problem.what();
    }
  };
  try_to(Job::Kind::bias, &ReplicaGroup::do_biases);
  try_to(Job::Kind::evaluation, &ReplicaGroup::do_evaluations);
  for (auto &replica : replicas_) replica.job = nullptr;
}

std::vector<std::size_t> ReplicaGroup::waiting_for(Job::Kind kind) const {
  std::vector<std::size_t> found;
  for (std::size_t k = 0; k < replicas_.size(); ++k)
    if (waits_for(k, kind)) found.push_back(k);
  return found;
}

void ReplicaGroup::do_evaluations() {
  const auto waiting = waiting_for(Job::Kind::evaluation);
  Request request;
  for (auto k : waiting) {
    const auto &asked = replicas_[k].job->request;
    request.structure |= asked.structure;
    request.atoms |= asked.atoms || asked.structure;  // features of each atom, as sums differ between replicas
    if (request.bias != Bias::atomic && asked.bias != Bias::none) request.bias = asked.bias;  // atomic keeps more
    request.n_atoms += asked.n_atoms;
  }
  model_->start(request);
  n_batches_ = 0;
  for (std::size_t begin = 0; begin < waiting.size(); ++n_batches_) {
    if (batches_.size() == n_batches_) batches_.emplace_back();
    begin = gather(batches_[n_batches_], waiting, begin);
    evaluate(n_batches_, request);
  }
}

// Join the blocks of replicas from number `begin` of those that wait until the block is full; returns the first one
// that is left.
std::size_t ReplicaGroup::gather(Batch &batch, const std::vector<std::size_t> &waiting, std::size_t begin) const {
  batch.replicas.clear();
  batch.first_atom.assign(1, 0);
  batch.first_pair.assign(1, 0);
  auto &all = batch.block;
  all.species.clear();
  all.first.assign(1, 0);
  all.neighbours.clear();
  all.vectors.clear();
  std::size_t end = begin;
  for (; end < waiting.size(); ++end) {
    const auto &one = *replicas_[waiting[end]].job->block;
    const auto n = static_cast<std::size_t>(one.n_centres()), pairs = static_cast<std::size_t>(one.n_pairs());
    if (end > begin && batch.first_atom.back() + n > model_->largest_block()) break;
    const auto before = all.first.back();
    all.species.insert(all.species.end(), one.species.begin(), one.species.begin() + static_cast<std::ptrdiff_t>(n));
    for (std::size_t i = 1; i <= n; ++i) all.first.push_back(before + one.first[i]);
    all.neighbours.insert(all.neighbours.end(), one.neighbours.begin(),
                          one.neighbours.begin() + static_cast<std::ptrdiff_t>(pairs));
    all.vectors.insert(all.vectors.end(), one.vectors.begin(),
                       one.vectors.begin() + static_cast<std::ptrdiff_t>(3 * pairs));
    batch.replicas.push_back(waiting[end]);
    batch.first_atom.push_back(batch.first_atom.back() + n);
    batch.first_pair.push_back(batch.first_pair.back() + pairs);
  }
  all.centres.resize(all.species.size());  // their number counts; nothing is added to atoms here
  return end;
}

void ReplicaGroup::evaluate(std::size_t number, const Request &request) {
  const auto &batch = batches_[number];
  const auto forces = model_->evaluate(batch.block);
  Values uncertainties;
  if (request.structure) model_->add_features();
  if (request.atoms) uncertainties = model_->atomic_uncertainties();
  for (std::size_t r = 0; r < batch.size(); ++r) {
    auto &job = *replicas_[batch.replicas[r]].job;
    job.forces = {forces.energies.part(batch.first_atom[r], batch.n_atoms(r)),
                  forces.gradient.part(3 * batch.first_pair[r], 3 * batch.n_pairs(r))};
    if (job.request.atoms) job.uncertainties = uncertainties.part(batch.first_atom[r], batch.n_atoms(r));
  }
  if (!request.structure) return;
  evaluate_structures(batch);
  const auto p = static_cast<std::size_t>(model_->metadata().projections);
  std::vector<double> rows(p * batch.first_atom.back(), 0.0);
  bool any = false;  // bias along u: one along atomic uncertainties comes when the fix asks for it
  for (std::size_t r = 0; r < batch.size(); ++r) {
    auto &job = *replicas_[batch.replicas[r]].job;
    job.direction.clear();
    if (!(job.request.structure && job.request.bias == Bias::structure)) continue;
    any = true;
    job.direction = job.slope;
    for (double &component : job.direction) component /= static_cast<double>(batch.n_atoms(r));
    for (auto i = batch.first_atom[r]; i < batch.first_atom[r + 1]; ++i)
      std::copy(job.direction.begin(), job.direction.end(), rows.begin() + static_cast<std::ptrdiff_t>(p * i));
  }
  if (any) evaluate_bias(number, rows, Job::Kind::evaluation);
}

// The mean features of the replicas, their uncertainties, and the derivatives of these.
void ReplicaGroup::evaluate_structures(const Batch &batch) {
  const auto p = static_cast<std::size_t>(model_->metadata().projections);
  const auto features = model_->features();
  std::vector<double> means, slopes;
  for (std::size_t r = 0; r < batch.size(); ++r) {
    auto &job = *replicas_[batch.replicas[r]].job;
    job.sum.assign(p, 0.0);
    for (auto i = batch.first_atom[r]; i < batch.first_atom[r + 1]; ++i)
      for (std::size_t k = 0; k < p; ++k) job.sum[k] += features[p * i + k];
    job.mean = job.sum;
    for (double &component : job.mean) component /= static_cast<double>(batch.n_atoms(r));
    means.insert(means.end(), job.mean.begin(), job.mean.end());
  }
  const auto u = model_->uncertainties(means, slopes);
  for (std::size_t r = 0; r < batch.size(); ++r) {
    auto &job = *replicas_[batch.replicas[r]].job;
    const auto begin = slopes.begin() + static_cast<std::ptrdiff_t>(p * r);
    job.u = u[r];
    job.slope.assign(begin, begin + static_cast<std::ptrdiff_t>(p));
  }
}

// Biases that an evaluation did not give: along atomic uncertainties, or with another weight than that of u. Replicas
// that wait for something else have weights 0.
void ReplicaGroup::do_biases() {
  const auto p = static_cast<std::size_t>(model_->metadata().projections);
  for (std::size_t number = 0; number < n_batches_; ++number) {
    const auto &batch = batches_[number];
    const auto n = batch.first_atom.back();
    std::vector<double> rows(p * n, 0.0), weights(n, 0.0);
    bool any = false, of_atoms = false;
    for (std::size_t r = 0; r < batch.size(); ++r) {
      if (!waits_for(batch.replicas[r], Job::Kind::bias)) continue;
      const auto &job = *replicas_[batch.replicas[r]].job;
      const bool atomic = job.request.bias == Bias::atomic;
      any = true;
      of_atoms |= atomic;
      if (atomic) std::copy(job.weights.begin(), job.weights.end(), &weights[batch.first_atom[r]]);
      for (auto i = batch.first_atom[r]; !atomic && i < batch.first_atom[r + 1]; ++i)
        std::copy(job.weights.begin(), job.weights.end(), &rows[p * i]);
    }
    if (of_atoms) {
      const auto derivative = model_->feature_weights(number, weights);
      for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += derivative[i];
    }
    if (any) evaluate_bias(number, rows, Job::Kind::bias);
  }
}

// The gradient of sum_i w_i·phi_i over the atoms of all replicas for w [n, p], for those that wait for this kind.
void ReplicaGroup::evaluate_bias(std::size_t number, const std::vector<double> &rows, Job::Kind kind) {
  const auto &batch = batches_[number];
  const auto gradient = model_->feature_bias(number, rows);
  for (std::size_t r = 0; r < batch.size(); ++r)
    if (waits_for(batch.replicas[r], kind))
      replicas_[batch.replicas[r]].job->gradient = gradient.part(3 * batch.first_pair[r], 3 * batch.n_pairs(r));
}

// ---- the model ----

std::unique_ptr<Model> ReplicaGroup::load(const Loader &loader, const std::string &file,
                                          const std::optional<std::string> &record, const RunOptions &options) {
  auto *group = place.group;
  if (!group) return loader.load(file, record, options);
  if (!group->model_) {
    auto model = loader.load(file, record, options);
    if (!model->has_atom_features()) return model;
    group->model_ = std::move(model);
    group->model_file_ = file;
    group->options_ = options;
  }
  if (!group->is_same_model(file, options)) return loader.load(file, record, options);
  return std::make_unique<ReplicaModel>(*group, place.replica);
}

bool ReplicaGroup::is_same_model(const std::string &file, const RunOptions &options) const {
  std::error_code none;
  return std::filesystem::equivalent(file, model_file_, none) && options.precision == options_.precision &&
         options.device == options_.device && options.threads == options_.threads &&
         options.energy_unit == options_.energy_unit;
}

void ReplicaGroup::warm_up(const Request &request) {
  if (waiting_for(Job::Kind::bias).empty()) model_->warm_up(request);
}

}  // namespace ubmd
