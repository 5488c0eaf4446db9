// Sums of outer products over all rows: the weight gradients, grad_W = sum over rows of dgates[row]^T x[row].
//
// Shapes     Rows come in shares (of the stretches), and a share in blocks of up to kDepth rows. Both sides of a block
//            are packed. The left side is dgates, in tiles [tile][row][unit] of up to TileSize::kMaxRows units. It is
//            packed once for all weights that it multiplies. The right side is x (or h, ...), in a panel of up to
//            TileSize::kMaxVectors vectors of columns, which stays in L2 while all tiles multiply it. bfloat16: both
//            sides hold pairs of rows.
// Ownership  A thread has a range of units, of every plane.
// Limits     The sums of a block are formed in registers and then added to the result. So rounding grows with the
//            number of blocks, not of rows. bfloat16 results stay in float32 until the last block.

// The gradient of one weight. Its rows of gate g are the sums of plane planes[g] times right(row)[0 .. columns).
template <class E, class Right>
struct WeightGradient {
  E* out;  // [gates * hidden, columns]
  const int* planes;
  int gates;
  int64_t columns;
  Right right;
};

template <class E>
class OuterSum {
  using C = ComputeOf<E>;
  using S = Simd<C>;
  using V = typename S::V;
  static constexpr int kLanes = S::kLanes;
  // Rows packed at a time, so that their cache lines and pages serve all tiles. They are also summed in one chain for
  // the bias gradient. Then chunks are summed within a block, and blocks. Such sums round as little as torch's.
  static constexpr int64_t kChunk = 16;
  static constexpr int kTileRows = TileSize::rows(TileSize::kMaxVectors);

 public:
  // Rows of a block. Each block costs a pass over the result, so fewer rows were slower. For bfloat16, rows take half
  // of the cache and a pass costs twice as much: 1024 rows are 1.02-1.04 times faster than 512 at H 512, equal at H <=
  // 256 (Zen 4).
  static constexpr int64_t kDepth = kPair<E> == 2 ? 1024 : 256;

  // Where the left side's rows lie: `planes` planes of `hidden` units, `plane` elements apart.
  struct Left {
    const E* data;
    int planes;
    int64_t hidden, plane, row_stride;
  };

  // A thread's scratch memory: packed_size() and sums_size() elements.
  struct Scratch {
    E* packed;
    C* sums;
  };
  static int64_t packed_size(int planes, int64_t units) {
    return kDepth * TileSize::kMaxVectors * kLanes + planes * tiles_in(units) * kTileSize;
  }
  // elements: of all weights of one add(). rows: of all shares.
  static int64_t sums_size(int planes, int64_t units, int64_t elements, int64_t rows) {
    return planes * tiles_in(units) * 2 * TileSize::kMaxRows + (kPair<E> > 1 && rows > kDepth ? elements : 0);
  }

  // The rows that one add() adds. The first share begins the sums, the last one stores them.
  struct Share {
    int64_t rows;
    bool is_first, is_last;
  };

  // The scratch memory must be the same, and untouched, from the first share to the last.
  OuterSum(const Left& left, Range units, const Scratch& scratch)
      : left_(left),
        units_(units),
        slots_(left.planes * tiles_in(units.last - units.first) * TileSize::kMaxRows),
        panel_(scratch.packed),
        tiles_(scratch.packed + kDepth * TileSize::kMaxVectors * kLanes),
        sums_(scratch.sums),
        totals_(sums_ + slots_),
        partial_(totals_ + slots_) {}

  template <class... Right>
  void add(const Share& share, const WeightGradient<E, Right>&... gradients) const {
    for_row_tiles(share.rows, kDepth, [&](int64_t row, int64_t depth) {
      const RowBlock block{row, depth, share.is_first && row == 0, share.is_last && row + depth == share.rows};
      pack_left(block);
      C* partial = partial_;
      (add_block(gradients, block, partial), ...);
    });
  }

  // After the last share: out[gate * hidden + unit] = sum over rows of plane planes[gate].
  void totals(E* out, const int* planes, int gates) const {
    for (int gate = 0; gate < gates; ++gate) {
      const C* from = totals_ + planes[gate] * tiles_in(unit_count()) * TileSize::kMaxRows;
      for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
        E* const to = out + gate * left_.hidden + units_.first + first;
        for (int i = 0; i < count; ++i) narrow(from[i], to + i);
        from += TileSize::kMaxRows;
      });
    }
  }

 private:
  struct RowBlock {
    int64_t row, depth;  // of the share's rows
    bool is_first, is_last;
  };

  int64_t unit_count() const { return units_.last - units_.first; }

  static constexpr int64_t kTileSize = kDepth * kTileRows + TileSize::kMaxRows * kPair<E>;
  static int64_t tiles_in(int64_t units) { return ceil_div(units, kTileRows); }

  // Tiles [plane][tile][depth][units of the tile], and the sums of the columns, TileSize::kMaxRows per tile. Every copy
  // has TileSize::kMaxRows elements, whatever the width of the tile. The next row overwrites the surplus. The last
  // row's surplus goes into the tile's slack.
  void pack_left(const RowBlock& block) const {
    typedef C Wide __attribute__((vector_size(TileSize::kMaxRows * sizeof(C))));
    const int64_t stride = left_.row_stride;
    std::memset(sums_, 0, slots_ * sizeof(C));
    for (int64_t chunk = 0; chunk < block.depth; chunk += kChunk) {
      const int64_t end = std::min(chunk + kChunk, block.depth);
      C* slot = sums_;
      E* tile = tiles_;
      for (int plane = 0; plane < left_.planes; ++plane) {
        for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
          const E* from = left_.data + block.row * stride + plane * left_.plane + units_.first + first;
          Wide sum{}, value;
          for (int64_t k = chunk; k < end; k += kPair<E>) {
#if defined(__AVX512BF16__)
            if constexpr (kPair<E> == 2) {
              const __m128i even = _mm_loadu_si128((const __m128i*)(from + k * stride));
              const __m128i odd =
                  k + 1 < end ? _mm_loadu_si128((const __m128i*)(from + (k + 1) * stride)) : _mm_setzero_si128();
              const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
              _mm256_storeu_si256((__m256i*)(tile + k * count), pairs);
              const __m256i ones = _mm256_set1_epi16(0x3f80);
              sum = (Wide)_mm256_dpbf16_ps((__m256)sum, (__m256bh)pairs, (__m256bh)ones);
            } else
#endif
            {
              std::memcpy(&value, from + k * stride, sizeof value);
              std::memcpy(tile + k * count, &value, sizeof value);
              sum += value;
            }
          }
          std::memcpy(&value, slot, sizeof value);
          sum += value;
          std::memcpy(slot, &sum, sizeof sum);
          slot += TileSize::kMaxRows;
          tile += kTileSize;
        });
      }
    }
    for (int64_t i = 0; i < slots_; ++i) totals_[i] = block.is_first ? sums_[i] : totals_[i] + sums_[i];
  }

  // Between blocks, the sums of bfloat16 lie at `partial`, which is then moved past them. Other sums lie in the result.
  template <class Right>
  void add_block(const WeightGradient<E, Right>& gradient, const RowBlock& block, C*& partial) const {
    const PanelShape<E> shape{gradient.columns, block.depth};
    const bool is_first = block.is_first, is_last = block.is_last;
    V acc[TileSize::kAccumulators];
    for (int64_t panel = 0; panel < shape.blocks(); ++panel) {
      const PanelWidth width = shape.width(panel);
      const int64_t column = shape.first_vector(panel) * kLanes;
      const int64_t wanted = std::min<int64_t>(width * kLanes, gradient.columns - column);
      pack_right(gradient, block, column, wanted, width);
      for (int gate = 0; gate < gradient.gates; ++gate) {
        const E* tile = tiles_ + gradient.planes[gate] * tiles_in(unit_count()) * kTileSize;
        E* const out = gradient.out + (gate * left_.hidden + units_.first) * gradient.columns + column;
        C* sums;
        if constexpr (kPair<E> == 1)
          sums = out;
        else
          sums = partial + gate * unit_count() * gradient.columns + column;
        for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
          // The result is far larger than L2. Its lines arrive while the tile multiplies.
          for (int m = 0; m < count && !is_first; ++m)
            for (int64_t i = 0; i < wanted; i += kLanes)
              __builtin_prefetch(sums + (first + m) * gradient.columns + i, 1);
          multiply<E>(acc, width, count, Operand<E>{tile, kPair<E>, count}, shape.padded_depth(), panel_);
          tile += kTileSize;
          for (int m = 0; m < count; ++m) {
            const int64_t at = (first + m) * gradient.columns;
            if (!is_first) add_row(acc + m * width, sums + at, wanted);
            is_last ? store_row(out + at, acc + m * width, wanted) : store_row(sums + at, acc + m * width, wanted);
          }
        });
      }
    }
    partial += gradient.gates * unit_count() * gradient.columns;
  }

  template <class Right>
  void pack_right(const WeightGradient<E, Right>& gradient, const RowBlock& block, int64_t column, int64_t wanted,
                  int width) const {
    for (int64_t k = 0; k < block.depth; k += kPair<E>) {
      E* to = panel_ + k * width * kLanes;
      const E* const from = gradient.right(block.row + k) + column;
      if constexpr (kPair<E> == 2) {
        const E* const odd = k + 1 < block.depth ? gradient.right(block.row + k + 1) + column : nullptr;
        for (int64_t done = 0; done < wanted; done += kLanes, to += 2 * kLanes)
          interleave(to, from + done, odd ? odd + done : nullptr, int(std::min<int64_t>(kLanes, wanted - done)));
      } else {
        std::memcpy(to, from, wanted * sizeof(E));
        std::memset(to + wanted, 0, (width * kLanes - wanted) * sizeof(E));
      }
    }
  }

  static void add_row(V* sums, const C* from, int64_t wanted) {
    for (; wanted >= kLanes; wanted -= kLanes, from += kLanes) *sums++ += S::load(from);
    if (wanted > 0) *sums += S::load_first(from, int(wanted));
  }
  template <class T>
  static void store_row(T* to, const V* sums, int64_t wanted) {
    for (; wanted >= kLanes; wanted -= kLanes, to += kLanes) Io<T>::store(to, *sums++);
    if (wanted > 0) Io<T>::store_first(to, *sums, int(wanted));
  }

  const Left left_;
  Range units_;
  int64_t slots_;
  E *panel_, *tiles_;
  C *sums_, *totals_, *partial_;
};
