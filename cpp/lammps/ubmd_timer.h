// Where the time of pair_style ubmd goes (keyword `timing yes`).
#pragma once

#include <array>
#include <chrono>
#include <string>

namespace ubmd {

class Timer {
 public:
  enum Part { graph, network, uncertainty, bias, communication, n_parts };

  // Adds the time until its destruction to a part.
  class Scope {
   public:
    Scope(Timer &timer, Part part) : timer_(timer), part_(part), start_(Clock::now()) {}
    ~Scope() { timer_.seconds_[part_] += std::chrono::duration<double>(Clock::now() - start_).count(); }
    Scope(const Scope &) = delete;
    Scope &operator=(const Scope &) = delete;

   private:
    using Clock = std::chrono::steady_clock;
    Timer &timer_;
    Part part_;
    Clock::time_point start_;
  };

  const std::array<double, n_parts> &seconds() const { return seconds_; }

  // One line per part with its seconds and share.
  static std::string report(const std::array<double, n_parts> &seconds);

 private:
  std::array<double, n_parts> seconds_{};
};

}  // namespace ubmd
