// Sums of outer products over all rows: the weight gradients, grad_W = sum over rows of dgates[row]^T x[row].
//
// kDepth rows at a time, both sides are packed: dgates into tiles of kMaxRows or fewer units, [tile][row][unit], once
// for every weight that it belongs to; x (or h, ...) into a panel of up to kMaxVectors vectors of columns that stays in
// L2 while all tiles multiply it. A block's sums are formed in registers and then added to the result, so rounding
// grows with the number of blocks, not of rows. Who owns what: a thread owns a range of units, of every plane.

// One weight: its rows of gate g are the sums of plane planes[g] times right(row)[0 .. columns).
template <class T, class Right>
struct Product {
  T* out;  // [gates * hidden, columns]
  const int* planes;
  int gates;
  int64_t columns;
  Right right;
};

template <class T>
class OuterSum {
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int kLanes = S::kLanes;
  // One chain of additions (kChainDepth): each block of rows costs a pass over the result, so fewer rows were slower.
  static constexpr int64_t kDepth = 256;
  // Rows packed at a time: their cache lines and pages serve all tiles. Also the rows of a bias gradient summed in one
  // chain: 16 of them, then the 16 chunks of a block, then the blocks, for sums as careful as torch's.
  static constexpr int64_t kChunk = 16;
  static constexpr int kTileRows = tile_rows(kMaxVectors);

 public:
  static int64_t scratch_size(int planes, int64_t hidden) {
    return kDepth * kMaxVectors * kLanes + planes * tiles_in(hidden) * (kTileSize + 2 * kMaxRows);
  }

  // left [rows, planes * hidden]; scratch [scratch_size] of this thread
  OuterSum(const T* left, int planes, int64_t hidden, int64_t rows, Range units, T* scratch)
      : left_(left),
        planes_(planes),
        hidden_(hidden),
        rows_(rows),
        units_(units),
        panel_(scratch),
        tiles_(scratch + kDepth * kMaxVectors * kLanes),
        sums_(tiles_ + planes * tiles_in(units.last - units.first) * kTileSize),
        totals_(sums_ + planes * tiles_in(units.last - units.first) * kMaxRows) {}

  template <class... Right>
  void run(const Product<T, Right>&... products) const {
    for (int64_t row = 0; row < rows_; row += kDepth) {
      const int64_t depth = std::min(kDepth, rows_ - row);
      pack_left(row, depth);
      (add_block(products, row, depth), ...);
    }
  }

  // After run(): out[gate * hidden + unit] = sum over rows of plane planes[gate].
  void totals(T* out, const int* planes, int gates) const {
    for (int gate = 0; gate < gates; ++gate) {
      const T* from = totals_ + planes[gate] * tiles_in(unit_count()) * kMaxRows;
      for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
        std::memcpy(out + gate * hidden_ + units_.first + first, from, count * sizeof(T));
        from += kMaxRows;
      });
    }
  }

 private:
  int64_t unit_count() const { return units_.last - units_.first; }

  static constexpr int64_t kTileSize = kDepth * kTileRows + kMaxRows;
  static int64_t tiles_in(int64_t units) { return ceil_div(units, kTileRows); }

  // Tiles [plane][tile][depth][units of the tile], and the sums of the columns, kMaxRows per tile. Copies kMaxRows
  // elements whatever the tile's width: the surplus is overwritten by the next row, the last one's goes into the tile's
  // slack.
  void pack_left(int64_t row, int64_t depth) const {
    typedef T Wide __attribute__((vector_size(kMaxRows * sizeof(T))));
    const int64_t stride = planes_ * hidden_, slots = planes_ * tiles_in(unit_count()) * kMaxRows;
    std::memset(sums_, 0, slots * sizeof(T));
    for (int64_t chunk = 0; chunk < depth; chunk += kChunk) {
      const int64_t end = std::min(chunk + kChunk, depth);
      T *slot = sums_, *tile = tiles_;
      for (int plane = 0; plane < planes_; ++plane) {
        for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
          const T* from = left_ + row * stride + plane * hidden_ + units_.first + first;
          Wide sum{}, value;
          for (int64_t k = chunk; k < end; ++k) {
            std::memcpy(&value, from + k * stride, sizeof value);
            std::memcpy(tile + k * count, &value, sizeof value);
            sum += value;
          }
          std::memcpy(&value, slot, sizeof value);
          sum += value;
          std::memcpy(slot, &sum, sizeof sum);
          slot += kMaxRows;
          tile += kTileSize;
        });
      }
    }
    for (int64_t i = 0; i < slots; ++i) totals_[i] = row == 0 ? sums_[i] : totals_[i] + sums_[i];
  }

  template <class Right>
  void add_block(const Product<T, Right>& product, int64_t row, int64_t depth) const {
    const PanelShape<T> shape{product.columns, depth};
    V acc[kAccumulators];
    for (int64_t block = 0; block < shape.blocks(); ++block) {
      const int width = shape.width(block);
      const int64_t column = shape.first_vector(block) * kLanes;
      const int64_t wanted = std::min<int64_t>(width * kLanes, product.columns - column);
      for (int64_t k = 0; k < depth; ++k) {
        T* to = panel_ + k * width * kLanes;
        std::memcpy(to, product.right(row + k) + column, wanted * sizeof(T));
        std::memset(to + wanted, 0, (width * kLanes - wanted) * sizeof(T));
      }
      for (int gate = 0; gate < product.gates; ++gate) {
        const T* tile = tiles_ + product.planes[gate] * tiles_in(unit_count()) * kTileSize;
        T* const out = product.out + (gate * hidden_ + units_.first) * product.columns + column;
        for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
          multiply<T>(acc, width, count, Operand<T>{tile, 1, count}, depth, panel_);
          tile += kTileSize;
          for (int m = 0; m < count; ++m)
            add_row(out + (first + m) * product.columns, acc + m * width, wanted, row == 0);
        });
      }
    }
  }

  // Adds (or, first, stores) `wanted` elements.
  static void add_row(T* to, const V* sums, int64_t wanted, bool first_rows) {
    int64_t done = 0;
    for (; done + kLanes <= wanted; done += kLanes, ++sums)
      S::store(to + done, first_rows ? *sums : *sums + S::load(to + done));
    if (const int left = int(wanted - done); left > 0)
      S::store_first(to + done, first_rows ? *sums : *sums + S::load_first(to + done, left), left);
  }

  const T* left_;
  int planes_;
  int64_t hidden_, rows_;
  Range units_;
  T* panel_;
  T *tiles_, *sums_, *totals_;
};
