// The one exception of the plugin's helpers: its message is a sentence for the user.
#pragma once

#include <stdexcept>

namespace ubmd {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace ubmd
