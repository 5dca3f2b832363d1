#include "loaders.h"

#include <fstream>
#include <iterator>

#include "ubmd_error.h"

namespace ubmd {
namespace {

// In the order in which they are tried. The last one takes what no other reads, and reports what is wrong with it.
const Loader *const loaders[] = {&torchscript_loader};

// LAMMPS makes invalid text of letters that are not ASCII.
[[noreturn]] void cannot_read(std::string file) {
  bool ascii = true;
  for (char &letter : file)
    if (static_cast<unsigned char>(letter) > 127) ascii = false, letter = '?';
  if (ascii) throw Error("cannot read model file " + file + ": check the path in pair_coeff");
  throw Error("cannot read model file " + file +
              ": LAMMPS replaces non-ASCII characters in input lines; start it with '-var model FILE' and write "
              "${model} in pair_coeff, or rename the file");
}

}  // namespace

const Loader &loader_of(const std::string &file) {
  if (!std::ifstream(file).good()) cannot_read(file);
  for (const Loader *loader : loaders)
    if (loader->reads(file)) return *loader;
  return *loaders[std::size(loaders) - 1];
}

}  // namespace ubmd
