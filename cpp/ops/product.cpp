// Products of matrices: most of the work of a network.
//
// Packed weights make our own product the fastest one for the atoms of an MD step. Measured on one core of an Intel
// Xeon (float32, weights 512 x 512, GFLOP/s) against the library in torch, oneMKL, which packs them in every call: 180
// and 152 for 512 rows, 160 and 90 to 137 for 22. Where the right matrix is new in every call (in training, and for
// uncertainties by structure) and rows are many, oneMKL is faster by some 10 % if it uses the whole vector registers.
// On processors that are not Intel's it uses half of them. (A choice by a measurement would not be the same in each
// process, so that a resumed training could end with other bits.)
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "matrices.h"
#include "operators.h"

namespace ubmd::ops {

using at::Tensor;

namespace {

std::shared_ptr<const Packed> pack_now(const Tensor &right) {
  const std::int64_t depth = right.size(0), columns = right.size(1);
  auto result = std::make_shared<Packed>();
  result->depth = depth;
  result->columns = columns;
  AT_DISPATCH_FLOATING_TYPES(right.scalar_type(), "ubmd::product", [&] {
    const Kernels<scalar_t> &table = kernels<scalar_t>();
    const std::int64_t n_panels = (columns + table.panel - 1) / table.panel;
    result->numbers = at::empty({depth * n_panels * table.panel}, right.options());
    scalar_t *to = result->numbers.mutable_data_ptr<scalar_t>();
    const scalar_t *from = right.const_data_ptr<scalar_t>();
    at::parallel_for(0, n_panels, std::max<std::int64_t>(1, 65536 / (table.panel * depth + 1)),
                     [&](std::int64_t begin, std::int64_t end) {
                       table.pack(from, right.stride(0), right.stride(1), depth, columns, begin, end, to);
                     });
  });
  return result;
}

// A left matrix whose columns are contiguous (the transpose of activations), in tiles of rows.
template <class F>
Tensor tiles_of(const Tensor &left) {
  const Kernels<F> &table = kernels<F>();
  const std::int64_t rows = left.size(0), depth = left.size(1),
                     n_tiles = (rows + table.tile_rows - 1) / table.tile_rows;
  Tensor tiles = at::empty({n_tiles * table.tile_rows * depth}, left.options());
  F *to = tiles.mutable_data_ptr<F>();
  const F *from = left.const_data_ptr<F>();
  at::parallel_for(0, n_tiles, 16, [&](std::int64_t begin, std::int64_t end) {
    table.pack_tiles(from, left.stride(1), depth, rows, begin, end, to);
  });
  return tiles;
}

// Memory in pages of 2 MB where Linux gives them on request. The weights of a model are more than the second level of
// cache holds; with few atoms most of a product's time goes into reading them, which takes some 10 % longer from
// ordinary pages of 4 kB.
class LargePages {
 public:
  // A copy of a contiguous tensor; the tensor itself if there is no memory.
  Tensor copy(const Tensor &from) {
    constexpr std::size_t page = std::size_t{1} << 21, least = 8 * page, line = 64;
    const std::size_t size = (from.nbytes() + line - 1) / line * line;
    if (!memory_ || used_ + size > size_) {
      const std::size_t wanted = std::max(least, (size + page - 1) / page * page);
      void *memory = std::aligned_alloc(page, wanted);
      if (!memory) return from;
#ifdef MADV_HUGEPAGE
      madvise(memory, wanted, MADV_HUGEPAGE);  // advice: whatever it returns, the memory can be used
#endif
      memory_.reset(static_cast<char *>(memory), std::free);
      size_ = wanted;
      used_ = 0;
    }
    char *to = memory_.get() + used_;
    used_ += size;
    std::memcpy(to, from.const_data_ptr(), from.nbytes());
    return at::from_blob(to, from.sizes(), [owner = memory_](void *) {}, from.options());
  }

 private:
  std::shared_ptr<char> memory_;  // shared with the copies in it
  std::size_t size_ = 0, used_ = 0;
};

// Weights of a model, which a run multiplies by in every step. An entry is valid while its storage lives and its
// version (the count of changes in place) is the same; the storage's weak pointer also keeps its address from being
// used again.
class PackedMatrices {
 public:
  std::shared_ptr<const Packed> find(const Tensor &right) {
    if (right.is_inference()) return pack_now(right);  // its changes aren't counted
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry &e) { return e.is_of(right); });
    if (found == entries_.end()) {
      remember(right);
      return pack_now(right);
    }
    if (!found->packed) found->packed = pack_now(right);
    if (++found->uses == many) found->packed = in_large_pages(*found->packed);
    entries_.splice(entries_.begin(), entries_, found);
    return entries_.front().packed;
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    std::int64_t version;
    const void *data;
    std::vector<std::int64_t> sizes, strides;
    at::ScalarType type;
    std::shared_ptr<const Packed> packed;  // null: seen once
    int uses = 0;

    bool is_of(const Tensor &right) const {
      return storage._unsafe_get_target() == right.storage().unsafeGetStorageImpl() && data == right.const_data_ptr() &&
             version == right._version() && type == right.scalar_type() && right.sizes() == sizes &&
             right.strides() == strides;
    }
  };

  static constexpr int many = 16;  // more than training uses weights before it changes them

  std::shared_ptr<const Packed> in_large_pages(Packed matrix) {
    matrix.numbers = pages_.copy(matrix.numbers);
    return std::make_shared<Packed>(std::move(matrix));
  }

  void remember(const Tensor &right) {
    constexpr std::size_t most = 64;
    entries_.remove_if([](const Entry &e) { return e.storage.expired(); });
    if (entries_.size() == most) entries_.pop_back();
    entries_.push_front({c10::weak_intrusive_ptr<c10::StorageImpl>(right.storage().getWeakStorageImpl()),
                         right._version(), right.const_data_ptr(), right.sizes().vec(), right.strides().vec(),
                         right.scalar_type(), nullptr});
  }

  std::mutex mutex_;
  std::list<Entry> entries_;  // the one used last comes first
  LargePages pages_;
};

}  // namespace

std::shared_ptr<const Packed> packed(const Tensor &right) {
  static PackedMatrices matrices;
  return matrices.find(right);
}

template <class F>
void multiply(const MatrixProduct<F> &task) {
  const Kernels<F> &table = kernels<F>();
  for (std::int64_t first = 0; first < task.columns; first += table.panel)
    table.panel_product(task, 0, task.rows, first / table.panel);
}

template <class F>
void multiply_in_parallel(const MatrixProduct<F> &task) {
  const Kernels<F> &table = kernels<F>();
  const std::int64_t n_panels = (task.columns + table.panel - 1) / table.panel,
                     n_blocks = (task.rows + kRows - 1) / kRows;
  at::parallel_for(0, n_blocks * n_panels, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t row = k / n_panels * kRows;
      table.panel_product(task, row, std::min(row + kRows, task.rows), k % n_panels);
    }
  });
}

template void multiply<float>(const MatrixProduct<float> &);
template void multiply<double>(const MatrixProduct<double> &);
template void multiply_in_parallel<float>(const MatrixProduct<float> &);
template void multiply_in_parallel<double>(const MatrixProduct<double> &);

namespace {

// Whether torch's library is the one to take for this product, see above; and for a single row, where packing would
// cost more than it saves. In float64 ours is always faster, and LAMMPS exports a dgemm of its own, which under the
// program lmp takes the place of the library's and is some ten times slower.
bool left_to_library(const Tensor &left, const Tensor &right) {
  constexpr std::int64_t many = 256;
  const std::int64_t rows = left.size(0);
  if (rows == 1) return true;
  return left.scalar_type() == at::kFloat && library_is_wide() && rows >= many &&
         std::min(left.size(1), right.size(1)) >= 32;
}

}  // namespace

// left [M, K] @ right [K, N], plus `add` [N] or [M, N] if given. Any strides.
Tensor product(const Tensor &left, const Tensor &right, const std::optional<Tensor> &add) {
  TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0),
              "ubmd operators: product needs matrices [M, K] and [K, N], not ", left.sizes(), " and ", right.sizes());
  const auto type = left.scalar_type();
  if ((type != at::kFloat && type != at::kDouble) || right.scalar_type() != type ||
      (add && add->scalar_type() != type) || left_to_library(left, right))
    return add ? at::addmm(*add, left, right) : at::mm(left, right);
  const std::int64_t rows = left.size(0), columns = right.size(1);
  TORCH_CHECK(!add || add->sizes() == at::IntArrayRef{columns} || add->sizes() == at::IntArrayRef({rows, columns}),
              "ubmd operators: product of ", left.sizes(), " and ", right.sizes(), " can't add ",
              add ? add->sizes() : at::IntArrayRef());
  const Tensor more = add ? add->contiguous() : Tensor();
  Tensor out = at::empty({rows, columns}, left.options());
  const auto matrix = packed(right);
  AT_DISPATCH_FLOATING_TYPES(type, "ubmd::product", [&] {
    const Tensor tiles = rows > 1 && left.stride(0) == 1 ? tiles_of<scalar_t>(left) : Tensor();
    const Tensor lines = tiles.defined() ? Tensor() : left.contiguous();
    auto task = product_of(rows, (tiles.defined() ? tiles : lines).const_data_ptr<scalar_t>(), *matrix);
    if (tiles.defined()) task.left_row = 1, task.left_column = kernels<scalar_t>().tile_rows;
    if (add) task.add = more.const_data_ptr<scalar_t>();
    task.add_row = more.defined() && more.dim() == 2 ? columns : 0;
    task.out[0] = out.mutable_data_ptr<scalar_t>();
    multiply_in_parallel(task);
  });
  return out;
}

}  // namespace ubmd::ops
