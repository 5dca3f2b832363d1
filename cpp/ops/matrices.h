// Products on plain arrays, with right matrices that are packed once as long as nobody changes them.
#pragma once

#include <ATen/ATen.h>

#include <memory>

#include "kernels.h"

namespace ubmd::ops {

// Rows, of atoms as a rule, that pass through products together, while a panel and what is made of them stay in the
// cache.
constexpr std::int64_t kRows = 128;

// A right matrix [depth, columns] in the layout of the kernels.
struct Packed {
  at::Tensor numbers;
  std::int64_t depth, columns;
};

// Any strides. What is asked for a second time is kept, until its tensor is changed in place or freed.
std::shared_ptr<const Packed> packed(const at::Tensor &right);

// left [rows, depth] (contiguous) right + add, finished as the kernels offer it, of type F; whoever calls sets what it
// needs of add, finish, out and factors.
template <class F>
MatrixProduct<F> product_of(std::int64_t rows, const F *left, const Packed &right) {
  MatrixProduct<F> task{};
  task.rows = rows;
  task.depth = right.depth;
  task.columns = right.columns;
  task.left = left;
  task.left_tile = kernels<F>().tile_rows * right.depth;
  task.left_row = right.depth;
  task.left_column = 1;
  task.panels = right.numbers.const_data_ptr<F>();
  return task;
}

// All of it in this thread, or by several threads.
template <class F>
void multiply(const MatrixProduct<F> &task);
template <class F>
void multiply_in_parallel(const MatrixProduct<F> &task);

}  // namespace ubmd::ops
