// Packed weights: panels, one per block of columns, in the order in which a tile reads them.
//
// Shapes   A panel holds some SIMD vectors of columns for every k: [k][vector][lane].
//            plain panels   up to TileSize::kMaxVectors vectors of consecutive columns: RNN, projection, backward
//            gate panels    one vector of units with its gates side by side (GRU 3, LSTM 4), so a tile ends with all
//                           gates of its units in registers
//          bfloat16 panels hold pairs of k: [k / 2][vector][lane][2], the operand order of dpbf16ps.

// Vectors of a panel. `half`: the last vector has columns in its lower half only. The product then uses half a vector,
// which takes half the time where 64 byte vectors take two passes (Zen 4).
struct PanelWidth {
  int vectors;
  bool half;
  operator int() const { return vectors; }
};

// How `columns` columns are cut into blocks, one panel each. gates > 1: gate panels. With `dense`, the last few units
// of a gate panel stand gate after gate without gaps, if that saves a vector.
template <class E>
struct PanelShape {
  static constexpr int kLanes = Simd<ComputeOf<E>>::kLanes;
  int64_t columns;  // units, when gates > 1
  int64_t depth;    // k
  int gates = 1;
  bool dense = false;

  int64_t padded_depth() const { return whole_pairs<E>(depth); }
  int64_t column_vectors() const { return ceil_div(columns, kLanes); }
  int64_t blocks() const { return gates > 1 ? column_vectors() : ceil_div(column_vectors(), TileSize::kMaxVectors); }
  // First vector of columns of a block. Blocks are cut evenly (5 vectors: 3 + 2).
  int64_t first_vector(int64_t block) const { return block * column_vectors() / blocks(); }
  int64_t first_column(int64_t block) const { return first_vector(block) * kLanes; }
  int64_t columns_in(int64_t block) const { return std::min(first_column(block + 1), columns) - first_column(block); }
  // Elements from one gate of a block to the next.
  int gate_stride(int64_t block) const {
    const int units = int(columns_in(block));
    return dense && ceil_div(units * gates, kLanes) < gates ? units : kLanes;
  }
  PanelWidth width(int64_t block) const {
    const int64_t columns = gates == 1 ? columns_in(block) : gate_stride(block) * gates;
    const int64_t vectors = ceil_div(columns, kLanes);
    return {int(vectors), vectors * kLanes - columns >= kLanes / 2};
  }
  // Elements, per k, of the panels before a block. position(blocks()) counts all panels.
  int64_t position(int64_t block) const {
    if (gates == 1 || block == 0) return first_column(block);
    return first_column(block - 1) * gates + width(block - 1) * kLanes;
  }
  int64_t offset(int64_t block) const { return position(block) * padded_depth(); }
  int64_t size() const { return offset(blocks()); }
};

// Turns kLanes rows of kLanes elements into columns, in log2(kLanes) rounds. A round interleaves row i with row
// i + kLanes / 2.
template <class T>
RNNFAST_INLINE void transpose(typename Simd<T>::V (&rows)[Simd<T>::kLanes]) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  using B = typename S::B;
  B low{}, high{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * kLanes;
    high[lane] = lane / 2 + kLanes / 2 + (lane % 2) * kLanes;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    typename S::V next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Where the columns of one vector of a panel lie in the weight. null: zeros.
template <class E>
struct Columns {
  static constexpr int kLanes = Simd<ComputeOf<E>>::kLanes;
  const E* at[kLanes];
  bool full = true;  // none is null
};

// dst[k * stride + lane] = column[lane][k * k_stride] for all k.
template <class E>
void pack_vector(E* dst, int64_t stride, const Columns<E>& column, int64_t k_stride, int64_t depth) {
  using V = typename Simd<ComputeOf<E>>::V;
  constexpr int kLanes = Simd<ComputeOf<E>>::kLanes;
  constexpr int kStep = kPair<E>;
  int64_t k = 0;
  // A pair of bfloat16 has the size of a float, so pairs are transposed as floats are.
  for (; k_stride == 1 && k + kLanes * kStep <= depth; k += kLanes * kStep) {
    V rows[kLanes] = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!column.full && !column.at[lane]) continue;
      // Fetches the next vector's columns: the hardware's prefetcher loses so many streams at every page.
      if (column.full) __builtin_prefetch(column.at[lane] + kLanes * (column.at[1] - column.at[0]) + k);
      std::memcpy(&rows[lane], column.at[lane] + k, sizeof rows[lane]);
    }
    transpose<ComputeOf<E>>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) std::memcpy(dst + (k / kStep + i) * stride, &rows[i], sizeof rows[i]);
  }
  for (; k < depth; ++k) {
    E* out = dst + k / kStep * stride + k % kStep;
    for (int lane = 0; lane < kLanes; ++lane) out[lane * kStep] = column.at[lane] ? column.at[lane][k * k_stride] : E{};
  }
  if (depth % kStep)
    for (int lane = 0; lane < kLanes; ++lane) dst[depth / kStep * stride + lane * kStep + 1] = E{};
}

// The same for `count` columns that lie side by side.
template <class E>
void pack_adjacent(E* dst, int64_t stride, const E* src, int64_t k_stride, int64_t depth, int count) {
  using S = Simd<ComputeOf<E>>;
  if constexpr (kPair<E> == 2) {
    for (int64_t k = 0; k < depth; k += 2)
      interleave(dst + k / 2 * stride, src + k * k_stride, k + 1 < depth ? src + (k + 1) * k_stride : nullptr, count);
  } else if (count == S::kLanes) {
    for (int64_t k = 0; k < depth; ++k) S::store(dst + k * stride, S::load(src + k * k_stride));
  } else {
    for (int64_t k = 0; k < depth; ++k) S::store(dst + k * stride, S::load_first(src + k * k_stride, count));
  }
}

// Packs the blocks [first, last) of a weight [gates * columns, depth].
template <class E>
void pack_panels(E* dst, const PanelShape<E>& shape, const Weight& weight, int64_t first, int64_t last) {
  constexpr int kLanes = PanelShape<E>::kLanes;
  for (int64_t block = first; block < last; ++block) {
    const int width = shape.width(block);
    const int64_t units = shape.columns_in(block), gate_stride = shape.gates > 1 ? shape.gate_stride(block) : units;
    const int64_t stride = int64_t(width) * kLanes * kPair<E>;
    for (int v = 0; v < width; ++v) {
      Columns<E> column;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t gate = (v * kLanes + lane) / gate_stride, unit = (v * kLanes + lane) % gate_stride;
        const bool inside = gate < shape.gates && unit < units;
        const int64_t row = gate * shape.columns + shape.first_column(block) + unit;
        column.at[lane] = inside ? static_cast<const E*>(weight.data) + row * weight.row_stride : nullptr;
        column.full = column.full && inside;
      }
      E* out = dst + shape.offset(block) + int64_t(v) * kLanes * kPair<E>;
      pack_vector<E>(out, stride, column, weight.column_stride, shape.depth);
    }
  }
}

// Packs the blocks [first, last) of the transpose of a weight [gates * size, columns]. k counts the weight's rows: gate
// `leading` comes first, and each gate is padded to whole pairs.
template <class E>
void pack_transposed(E* dst, const PanelShape<E>& shape, const Weight& weight, int gates, int64_t size, int leading,
                     int64_t first, int64_t last) {
  constexpr int kLanes = PanelShape<E>::kLanes;
  for (int64_t block = first; block < last; ++block) {
    const int64_t stride = int64_t(shape.width(block)) * kLanes * kPair<E>;
    for (int v = 0; v < shape.width(block); ++v) {
      const int64_t first_column = shape.first_column(block) + v * kLanes;
      const int count = int(std::min<int64_t>(kLanes, shape.columns - first_column));
      E* out = dst + shape.offset(block) + int64_t(v) * kLanes * kPair<E>;
      for (int gate = 0; gate < gates; ++gate, out += ceil_div(size, kPair<E>) * stride) {
        const int64_t row = (gate + leading) % gates * size;
        const E* src =
            static_cast<const E*>(weight.data) + row * weight.row_stride + first_column * weight.column_stride;
        if (weight.column_stride == 1) {
          pack_adjacent<E>(out, stride, src, weight.row_stride, size, count);
          continue;
        }
        Columns<E> column{{}, count == kLanes};
        for (int lane = 0; lane < count; ++lane) column.at[lane] = src + lane * weight.column_stride;
        pack_vector<E>(out, stride, column, weight.row_stride, size);
      }
    }
  }
}
