// Several small systems in one process, each a LAMMPS instance of its own, whose atoms are evaluated together: a step
// of 8 molecules of 22 atoms then costs little more than a step of 176 atoms.
//
// LAMMPS calls the pair style from deep within `run`, so a replica has to pause there until the others have come as
// far. Each `run` therefore has a stack of its own, and one thread, that of serve(), changes from one to the other:
// a replica runs until its pair style asks for an evaluation. When every replica waits for one, their atoms are
// evaluated as one block, and they go on, one after the other. Rows of a block do not depend on each other, so a
// replica's numbers do not depend on its company.
//
// All else that a replica does (setting up LAMMPS, looking at its state, writing) is done in a thread for each, by
// Python. These threads take turns with each other and with that of serve(): only one thread runs at any time.
#pragma once

#include <ucontext.h>

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "loaders.h"
#include "model.h"

namespace ubmd {

// A function on a stack of its own, which can pause.
class Coroutine {
 public:
  explicit Coroutine(std::function<void()> work);
  ~Coroutine();
  Coroutine(const Coroutine &) = delete;
  Coroutine &operator=(const Coroutine &) = delete;

  void resume();  // run until it pauses or ends
  void pause();   // called from within
  bool has_ended() const { return ended_; }

 private:
  static void begin(unsigned low, unsigned high);

  std::function<void()> work_;
  void *stack_;
  ucontext_t own_{}, caller_{};
  bool ended_ = false;
};

class ReplicaGroup {
 public:
  explicit ReplicaGroup(std::size_t n_replicas);

  // ---- for the thread that began the group ----

  // Run what the replicas ask for until all have ended.
  void serve();

  // ---- for the replicas' threads ----

  // The calling thread is replica number k from here on; returns when it has its turn.
  void enter(std::size_t k);

  // Run `command`, which may ask for evaluations, in turn with those of the others. It must not throw.
  void run(std::size_t k, std::function<void()> command);

  // Replica number k, which has its turn or has never entered, has ended: the others no longer wait for it.
  void leave(std::size_t k);

  // Load a model file. In a thread of a group, the model takes part in its evaluations if it can: all replicas share
  // the one that was loaded first, and others, of ensembles for example, are evaluated alone.
  static std::unique_ptr<Model> load(const Loader &loader, const std::string &file,
                                     const std::optional<std::string> &record, const RunOptions &options);

  // ---- for the models of the replicas ----

  // What a replica asks for, and what it gets.
  struct Job {
    enum class Kind { none, evaluation, bias } kind = Kind::none;
    Request request;  // of an evaluation
    const Block *block = nullptr;
    std::vector<double> weights;  // of a bias: of the features [p] of all atoms, or of the atoms' uncertainties [n]

    Forces forces;
    Values uncertainties;      // [n], if the request has `atoms`
    std::vector<double> sum;   // of the features [p], if it has `structure`; then, too:
    std::vector<double> mean;  // [p], and the uncertainty and its derivative there
    double u = 0.0;
    std::vector<double> slope;      // du/d(mean) [p]
    std::vector<double> direction;  // of a bias along u: slope / n, for which the evaluation gives the gradient
    Values gradient;                // [P, 3]
    std::string error;              // what went wrong; empty: nothing
  };

  // Wait for what the job of replica k asks; throws Error if the evaluation failed.
  void wait(std::size_t k, Job &job);

  Model &model() { return *model_; }

  // Warm up, unless an evaluation is kept for a bias.
  void warm_up(const Request &request);

 private:
  enum class State { busy, running, ended };  // its thread is at work, its command is, neither

  struct Replica {
    State state = State::busy;
    std::condition_variable turn;
    std::function<void()> command;
    std::unique_ptr<Coroutine> coroutine;  // of the command, once it has begun
    Job *job = nullptr;                    // that it waits for
  };

  // The replicas of one evaluation, and where their atoms and pairs begin in the block.
  struct Batch {
    std::vector<std::size_t> replicas, first_atom, first_pair;
    Block block;

    std::size_t size() const { return replicas.size(); }
    std::size_t n_atoms(std::size_t r) const { return first_atom[r + 1] - first_atom[r]; }
    std::size_t n_pairs(std::size_t r) const { return first_pair[r + 1] - first_pair[r]; }
  };

  bool is_same_model(const std::string &file, const RunOptions &options) const;
  void pass_turn();
  void advance();
  bool resume_all();
  void do_jobs();
  void do_biases();
  void do_evaluations();
  std::size_t gather(Batch &batch, const std::vector<std::size_t> &waiting, std::size_t begin) const;
  void evaluate(std::size_t batch, const Request &request);
  void evaluate_structures(const Batch &batch);
  void evaluate_bias(std::size_t batch, const std::vector<double> &rows, Job::Kind kind);
  std::vector<std::size_t> waiting_for(Job::Kind kind) const;
  bool waits_for(std::size_t k, Job::Kind kind) const { return replicas_[k].job && replicas_[k].job->kind == kind; }

  static constexpr std::size_t server = static_cast<std::size_t>(-1);

  std::mutex mutex_;
  std::vector<Replica> replicas_;
  std::condition_variable server_turn_;
  std::size_t turn_ = 0;          // replica whose thread runs, or `server`
  std::size_t resumed_ = server;  // replica whose command runs now

  std::unique_ptr<Model> model_;  // shared by the replicas
  std::string model_file_;
  RunOptions options_;
  std::vector<Batch> batches_;  // of the last evaluations; n_batches_ in use
  std::size_t n_batches_ = 0;
};

}  // namespace ubmd
