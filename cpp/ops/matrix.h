// Products of matrices, and what is made of their sums at once. Included by kernels.cpp only, inside the namespace of
// one instruction set.
//
// The right matrix is packed in panels of three vectors of columns (the last one: of as many as it needs). A tile of
// rows by one panel of the result stays in registers for the whole sum, and the sum always runs over k from 0 on: the
// numbers don't depend on how many rows there are, on how they are divided among threads, or, where there are fused
// multiply-adds, on the width of the vectors.

// Numbers of a panel that are fetched in advance: with few rows most of the time goes into reading the weights.
constexpr int kAhead = 512;
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4, kTileVectors = 3;

template <class F>
constexpr int kPanel = kTileVectors * kLanes<F>;

template <class F>
UBMD_INLINE int vectors_of_panel(std::int64_t columns, std::int64_t panel) {
  const std::int64_t left = columns - panel * kPanel<F>;
  return left >= kPanel<F> ? kTileVectors : int((left + kLanes<F> - 1) / kLanes<F>);
}

// Panels begin .. end - 1 of a matrix [depth, columns] with any strides.
template <class F>
void pack(const F *from, std::int64_t row, std::int64_t column, std::int64_t depth, std::int64_t columns,
          std::int64_t begin, std::int64_t end, F *panels) {
  constexpr int strip = 16;  // rows at a time: a transposed matrix is read line by line
  for (std::int64_t p = begin; p < end; ++p) {
    const int width = vectors_of_panel<F>(columns, p) * kLanes<F>;
    const std::int64_t first = p * kPanel<F>;
    const int filled = columns - first < width ? int(columns - first) : width;
    F *to = panels + first * depth;
    for (std::int64_t k = 0; k < depth; k += strip, to += strip * width) {
      const int rows = depth - k < strip ? int(depth - k) : strip;
      if (column == 1 && filled == width) {
        for (int r = 0; r < rows; ++r)
          for (int j = 0; j < width; j += kLanes<F>) {
            __builtin_prefetch(from + (k + r + strip) * row + first + j);
            store<F, kLanes<F>>(to + r * width + j, load<F, kLanes<F>>(from + (k + r) * row + first + j));
          }
        continue;
      }
      for (int j = 0; j < width; ++j) {
        if (j < filled) __builtin_prefetch(from + (k + 2 * strip) * row + (first + j) * column);
        for (int r = 0; r < rows; ++r)
          to[r * width + j] = j < filled ? from[(k + r) * row + (first + j) * column] : F(0);
      }
    }
  }
}

// Tiles of rows of a left matrix whose columns are contiguous.
template <class F>
void pack_tiles(const F *from, std::int64_t column, std::int64_t depth, std::int64_t rows, std::int64_t begin,
                std::int64_t end, F *tiles) {
  for (std::int64_t t = begin; t < end; ++t) {
    const F *first = from + t * kTileRows;
    F *to = tiles + t * kTileRows * depth;
    const int filled = rows - t * kTileRows < kTileRows ? int(rows - t * kTileRows) : kTileRows;
    for (std::int64_t k = 0; k < depth; ++k, first += column, to += kTileRows) {
      __builtin_prefetch(first + 16 * column);
      if (filled == kTileRows)
        for (int r = 0; r < kTileRows; ++r) to[r] = first[r];
      else
        for (int r = 0; r < filled; ++r) to[r] = first[r];
    }
  }
}

// Sums [rows, vectors] of a tile, to memory with kPanel numbers per row.
template <class F, int rows, int vectors>
UBMD_INLINE void tile_sums(std::int64_t depth, const F *const *left, std::int64_t step, const F *panel, F *to) {
  constexpr int W = kLanes<F>;
  Lanes<F> sum[rows][vectors];
  for (auto &line : sum)
    for (auto &value : line) value = Lanes<F>{};
  for (std::int64_t k = 0; k < depth; ++k, panel += vectors * W) {
    Lanes<F> right[vectors];
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(panel + kAhead + j * W);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = load<F, W>(panel + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const F factor = left[r][k * step];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[r][j] += factor * right[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store<F, W>(to + r * kPanel<F> + j * W, sum[r][j]);
}

// The same for fewer rows than a tile has, by the smallest tile that is large enough.
template <class F, int vectors>
void tile(int rows, std::int64_t depth, const F *const *left, std::int64_t step, const F *panel, F *to) {
  if (rows > 6 && kTileRows > 6) return tile_sums<F, kTileRows, vectors>(depth, left, step, panel, to);
  if (rows > 4) return tile_sums < F, kTileRows<6 ? kTileRows : 6, vectors>(depth, left, step, panel, to);
  if (rows > 2) return tile_sums<F, 4, vectors>(depth, left, step, panel, to);
  if (rows > 1) return tile_sums<F, 2, vectors>(depth, left, step, panel, to);
  return tile_sums<F, 1, vectors>(depth, left, step, panel, to);
}

template <class F>
UBMD_INLINE void copy(int n, const F *from, F *to) {
  for (int j = 0; j < n; ++j) to[j] = from[j];
}

// What becomes of the sums of one vector; out and factors (the last one: plus) point at its place.
template <Finish finish, class F>
UBMD_INLINE void finish_vector(const F *sums, const F *add, F *const (&out)[3], const F *const (&factors)[3]) {
  constexpr int W = kLanes<F>;
  Lanes<F> sum = load<F, W>(sums);
  if (add) sum += load<F, W>(add);
  if constexpr (finish == Finish::store) {
    store<F, W>(out[0], sum);
  } else if constexpr (finish == Finish::scale) {
    if (out[1]) store<F, W>(out[1], sum * load<F, W>(factors[1]));
    const Lanes<F> scaled = sum * load<F, W>(factors[0]);
    store<F, W>(out[0], factors[2] ? scaled + load<F, W>(factors[2]) : scaled);
  } else {
    F z[W];
    store<F, W>(z, sum);
    out[2] ? activate<true>(z, out[0], out[1], out[2]) : activate<false>(z, out[0], out[1], out[2]);
  }
}

// One row of a panel's sums; `at` is its place in the results.
template <Finish finish, class F>
UBMD_INLINE void finish_row(const MatrixProduct<F> &task, std::int64_t at, int columns, const F *add, const F *sums) {
  constexpr int W = kLanes<F>;
  int j = 0;
  for (; j + W <= columns; j += W) {
    F *const out[3] = {task.out[0] + at + j, task.out[1] ? task.out[1] + at + j : nullptr,
                       task.out[2] ? task.out[2] + at + j : nullptr};
    const F *const factors[3] = {task.factors[0] ? task.factors[0] + at + j : nullptr,
                                 task.factors[1] ? task.factors[1] + at + j : nullptr,
                                 task.plus ? task.plus + at + j : nullptr};
    finish_vector<finish>(sums + j, add ? add + j : nullptr, out, factors);
  }
  if (j == columns) return;
  const int n = columns - j;  // the same in a place with room for a whole vector
  F place[3][W] = {}, given[4][W] = {};
  F *const out[3] = {place[0], task.out[1] ? place[1] : nullptr, task.out[2] ? place[2] : nullptr};
  for (int k = 0; k < 2; ++k)
    if (task.factors[k]) copy(n, task.factors[k] + at + j, given[k]);
  if (task.plus) copy(n, task.plus + at + j, given[2]);
  if (add) copy(n, add + j, given[3]);
  const F *const factors[3] = {given[0], given[1], given[2]};
  finish_vector<finish>(sums + j, given[3], out, factors);
  for (int k = 0; k < 3; ++k)
    if (task.out[k]) copy(n, place[k], task.out[k] + at + j);
}

// Fetch what finish_row will read and write, while the sums are made.
template <class F>
UBMD_INLINE void fetch_row(const MatrixProduct<F> &task, std::int64_t at, int columns) {
  constexpr int line = 64 / int(sizeof(F));
  for (int j = 0; j < columns; j += line) {
    for (const F *out : task.out)
      if (out) __builtin_prefetch(out + at + j, 1);
    for (const F *factor : task.factors)
      if (factor) __builtin_prefetch(factor + at + j);
  }
}

// Rows row .. last - 1 of one panel of the result; `row` begins a tile.
template <class F>
void panel_product(const MatrixProduct<F> &task, std::int64_t row, std::int64_t last, std::int64_t p) {
  const std::int64_t first = p * kPanel<F>;
  const int columns = task.columns - first < kPanel<F> ? int(task.columns - first) : kPanel<F>;
  const int vectors = vectors_of_panel<F>(task.columns, p);
  const F *panel = task.panels + first * task.depth;
  for (; row < last; row += kTileRows) {
    const int rows = last - row < kTileRows ? int(last - row) : kTileRows;
    const F *left[kTileRows];
    for (int r = 0; r < kTileRows; ++r)
      left[r] = task.left + row / kTileRows * task.left_tile + (r < rows ? r : 0) * task.left_row;
    for (int r = 0; r < rows; ++r) fetch_row(task, (row + r) * task.columns + first, columns);
    F sums[kTileRows * kPanel<F>] __attribute__((aligned(64)));
    if (vectors == 3)
      tile<F, 3>(rows, task.depth, left, task.left_column, panel, sums);
    else if (vectors == 2)
      tile<F, 2>(rows, task.depth, left, task.left_column, panel, sums);
    else
      tile<F, 1>(rows, task.depth, left, task.left_column, panel, sums);
    for (int r = 0; r < rows; ++r) {
      const F *add = task.add ? task.add + (row + r) * task.add_row + first : nullptr;
      const std::int64_t at = (row + r) * task.columns + first;
      if (task.finish == Finish::store)
        finish_row<Finish::store>(task, at, columns, add, sums + r * kPanel<F>);
      else if (task.finish == Finish::scale)
        finish_row<Finish::scale>(task, at, columns, add, sums + r * kPanel<F>);
      else
        finish_row<Finish::activate>(task, at, columns, add, sums + r * kPanel<F>);
    }
  }
}

// Row `row` of y = x w + bias of the layer with one output, and with the energy's derivative `delta` by y: slopes (and
// curvatures, unless null) of the layer below are multiplied by delta w.
template <class F>
void last_layer(std::int64_t rows, std::int64_t width, const F *x, const F *weight, F bias, const F *delta, F *y,
                F *slopes, F *curvatures) {
  constexpr int W = kLanes<F>;
  for (std::int64_t i = 0; i < rows; ++i, x += width, slopes += width) {
    Lanes<F> partial{};
    std::int64_t k = 0;
    for (; k + W <= width; k += W) {
      const Lanes<F> w = load<F, W>(weight + k);
      partial += load<F, W>(x + k) * w;
      store<F, W>(slopes + k, load<F, W>(slopes + k) * (delta[i] * w));
    }
    F sum = bias;
    for (int q = 0; q < W; ++q) sum += partial[q];
    for (; k < width; ++k) {
      sum += x[k] * weight[k];
      slopes[k] *= delta[i] * weight[k];
    }
    y[i] = sum;
    if (!curvatures) continue;
    for (k = 0; k < width; ++k) curvatures[k] *= delta[i] * weight[k];
    curvatures += width;
  }
}

template <class F>
void multiply_elements(std::int64_t n, std::int64_t period, const F *a, const F *b, F *out) {
  for (std::int64_t k = 0; k < n; k += period)
    for (std::int64_t j = 0; j < period; ++j) out[k + j] = a[k + j] * b[j];
}
