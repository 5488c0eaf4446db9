// Sums of outer products over all rows: the weight gradients, grad_W = sum over rows of dgates[row]^T x[row]. Rows come
// in shares, whose sums are added.
//
// Up to kDepth rows at a time, both sides are packed: dgates into tiles of kMaxRows or fewer units, [tile][row][unit],
// once for every weight that it belongs to; x (or h, ...) into a panel of up to kMaxVectors vectors of columns that
// stays in L2 while all tiles multiply it. A block's sums are formed in registers and then added to the result, so
// rounding grows with the number of blocks, not of rows. Who owns what: a thread owns a range of units, of every plane.
// bfloat16: both sides hold pairs of rows, and the result is kept in float32 until the last block.

// One weight: its rows of gate g are the sums of plane planes[g] times right(row)[0 .. columns).
template <class E, class Right>
struct Product {
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
  // Rows packed at a time: their cache lines and pages serve all tiles. Also the rows of a bias gradient summed in one
  // chain: 16 of them, then the chunks of a block, then the blocks, for sums as careful as torch's.
  static constexpr int64_t kChunk = 16;
  static constexpr int kTileRows = tile_rows(kMaxVectors);

 public:
  // Each block of rows costs a pass over the result, so fewer rows were slower. bfloat16 halves what more rows take of
  // the cache and doubles what a pass costs: 1024 are 1.02-1.04 times faster than 512 at H 512, equal at H <= 256 (Zen
  // 4).
  static constexpr int64_t kDepth = kPair<E> == 2 ? 1024 : 256;

  // Where the left side's rows lie: `planes` planes of `hidden` units, `plane` elements apart.
  struct Left {
    const E* data;
    int planes;
    int64_t hidden, plane, row_stride;
  };

  // A thread's scratch memory: `packed` of packed_size, `sums` of sums_size.
  struct Scratch {
    E* packed;
    C* sums;
  };
  static int64_t packed_size(int planes, int64_t units) {
    return kDepth * kMaxVectors * kLanes + planes * tiles_in(units) * kTileSize;
  }
  // `elements`: of the weights that one add() sums; `rows`: in all shares.
  static int64_t sums_size(int planes, int64_t units, int64_t elements, int64_t rows) {
    return planes * tiles_in(units) * 2 * kMaxRows + (kPair<E> > 1 && rows > kDepth ? elements : 0);
  }

  // Rows that are added in one call; the first share begins the sums, the last one stores them.
  struct Share {
    int64_t rows;
    bool is_first, is_last;
  };

  // The scratch memory must be the same, and untouched, from the first share to the last.
  OuterSum(const Left& left, Range units, const Scratch& scratch)
      : left_(left),
        units_(units),
        slots_(left.planes * tiles_in(units.last - units.first) * kMaxRows),
        panel_(scratch.packed),
        tiles_(scratch.packed + kDepth * kMaxVectors * kLanes),
        sums_(scratch.sums),
        totals_(sums_ + slots_),
        partial_(totals_ + slots_) {}

  template <class... Right>
  void add(const Share& share, const Product<E, Right>&... products) const {
    for_row_tiles(share.rows, kDepth, [&](int64_t row, int64_t depth) {
      const Block block{row, depth, share.is_first && row == 0, share.is_last && row + depth == share.rows};
      pack_left(block);
      C* partial = partial_;
      (add_block(products, block, partial), ...);
    });
  }

  // After the last share: out[gate * hidden + unit] = sum over rows of plane planes[gate].
  void totals(E* out, const int* planes, int gates) const {
    for (int gate = 0; gate < gates; ++gate) {
      const C* from = totals_ + planes[gate] * tiles_in(unit_count()) * kMaxRows;
      for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
        E* const to = out + gate * left_.hidden + units_.first + first;
        for (int i = 0; i < count; ++i) narrow(from[i], to + i);
        from += kMaxRows;
      });
    }
  }

 private:
  struct Block {
    int64_t row, depth;  // of the share's rows
    bool is_first, is_last;
  };

  int64_t unit_count() const { return units_.last - units_.first; }

  static constexpr int64_t kTileSize = kDepth * kTileRows + kMaxRows * kPair<E>;
  static int64_t tiles_in(int64_t units) { return ceil_div(units, kTileRows); }

  // Tiles [plane][tile][depth][units of the tile], and the sums of the columns, kMaxRows per tile. Copies kMaxRows
  // elements whatever the tile's width: the surplus is overwritten by the next row, the last one's goes into the tile's
  // slack.
  void pack_left(const Block& block) const {
    typedef C Wide __attribute__((vector_size(kMaxRows * sizeof(C))));
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
          slot += kMaxRows;
          tile += kTileSize;
        });
      }
    }
    for (int64_t i = 0; i < slots_; ++i) totals_[i] = block.is_first ? sums_[i] : totals_[i] + sums_[i];
  }

  // `partial` holds this product's sums between blocks and is moved past them; unused where out itself can hold them.
  template <class Right>
  void add_block(const Product<E, Right>& product, const Block& block, C*& partial) const {
    const PanelShape<E> shape{product.columns, block.depth};
    const bool is_first = block.is_first, is_last = block.is_last;
    V acc[kAccumulators];
    for (int64_t panel = 0; panel < shape.blocks(); ++panel) {
      const PanelWidth width = shape.width(panel);
      const int64_t column = shape.first_vector(panel) * kLanes;
      const int64_t wanted = std::min<int64_t>(width * kLanes, product.columns - column);
      pack_right(product, block, column, wanted, width);
      for (int gate = 0; gate < product.gates; ++gate) {
        const E* tile = tiles_ + product.planes[gate] * tiles_in(unit_count()) * kTileSize;
        E* const out = product.out + (gate * left_.hidden + units_.first) * product.columns + column;
        C* sums;
        if constexpr (kPair<E> == 1)
          sums = out;
        else
          sums = partial + gate * unit_count() * product.columns + column;
        for_row_tiles(unit_count(), kTileRows, [&](int64_t first, int count) {
          // The result is far larger than L2: its lines arrive while the tile multiplies.
          for (int m = 0; m < count && !is_first; ++m)
            for (int64_t i = 0; i < wanted; i += kLanes)
              __builtin_prefetch(sums + (first + m) * product.columns + i, 1);
          multiply<E>(acc, width, count, Operand<E>{tile, kPair<E>, count}, shape.padded_depth(), panel_);
          tile += kTileSize;
          for (int m = 0; m < count; ++m) {
            const int64_t at = (first + m) * product.columns;
            if (!is_first) add_row(acc + m * width, sums + at, wanted);
            is_last ? store_row(out + at, acc + m * width, wanted) : store_row(sums + at, acc + m * width, wanted);
          }
        });
      }
    }
    partial += product.gates * unit_count() * product.columns;
  }

  template <class Right>
  void pack_right(const Product<E, Right>& product, const Block& block, int64_t column, int64_t wanted,
                  int width) const {
    for (int64_t k = 0; k < block.depth; k += kPair<E>) {
      E* to = panel_ + k * width * kLanes;
      const E* const from = product.right(block.row + k) + column;
      if constexpr (kPair<E> == 2) {
        const E* const odd = k + 1 < block.depth ? product.right(block.row + k + 1) + column : nullptr;
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
