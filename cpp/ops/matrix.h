// Product of matrices, for processors where the library's own one doesn't use the whole vector registers. Included by
// kernels.cpp only, inside the namespace of one instruction set.
//
// The right matrix is packed in panels of three vectors (columns), which stay in the first level of cache while all
// rows of the left one pass; a tile of rows by three vectors of the result is kept in registers.

constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4, kTileVectors = 3, kDepth = 128;

template <class F>
constexpr int kPanel = kTileVectors * kLanes<F>;

// out[r][0 .. panel) (+)= sum_k left[r][k] panel[k], for the rows of a tile; `add` to what is there, or overwrite.
template <class F>
UBMD_INLINE void tile_product(int depth, const F *const (&left)[kTileRows], std::int64_t step, const F *panel,
                              Lanes<F> (&sum)[kTileRows][kTileVectors]) {
  using V = Lanes<F>;
  for (auto &row : sum)
    for (V &value : row) value = V{};
  for (int k = 0; k < depth; ++k, panel += kPanel<F>) {
    V right[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) right[j] = load<F, kLanes<F>>(panel + j * kLanes<F>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const F factor = left[r][k * step];
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) sum[r][j] += factor * right[j];
    }
  }
}

// Columns begin .. end - 1 of out [rows, columns] = left [rows, depth] right [depth, columns].
template <class F>
void matrix_product(const MatrixProduct<F> &task, std::int64_t begin, std::int64_t end, char *scratch) {
  using V = Lanes<F>;
  constexpr int width = kPanel<F>;
  F *panel = reinterpret_cast<F *>(scratch);
  for (std::int64_t column = begin; column < end; column += width) {
    const int columns = end - column < width ? int(end - column) : width;
    for (std::int64_t first = 0; first < task.depth; first += kDepth) {
      const int depth = task.depth - first < kDepth ? int(task.depth - first) : kDepth;
      for (int k = 0; k < depth; ++k) {
        const F *from = task.right + (first + k) * task.right_row + column * task.right_column;
        for (int j = 0; j < columns; ++j) panel[k * width + j] = from[j * task.right_column];
        for (int j = columns; j < width; ++j) panel[k * width + j] = F(0);
      }
      for (std::int64_t row = 0; row < task.rows; row += kTileRows) {
        const int rows = task.rows - row < kTileRows ? int(task.rows - row) : kTileRows;
        const F *left[kTileRows];
        for (int r = 0; r < kTileRows; ++r)
          left[r] = task.left + (row + (r < rows ? r : 0)) * task.left_row + first * task.left_column;
        V sum[kTileRows][kTileVectors];
        tile_product<F>(depth, left, task.left_column, panel, sum);
        for (int r = 0; r < rows; ++r) {
          F *to = task.out + (row + r) * task.columns + column;
          F values[width];
          for (int j = 0; j < kTileVectors; ++j) store<F, kLanes<F>>(values + j * kLanes<F>, sum[r][j]);
          for (int j = 0; j < columns; ++j) to[j] = first > 0 ? to[j] + values[j] : values[j];
        }
      }
    }
  }
}
