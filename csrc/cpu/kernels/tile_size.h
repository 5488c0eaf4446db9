// The size of the register tiles, and all that follows from the number of vector registers.
//
// A product keeps a tile of sums in registers: some rows by some SIMD vectors of columns. It also needs registers for
// the vectors of weights and for one broadcast element. Larger tiles spill.
// docs/design/cpu.md says how to try another size.

template <int kRegisters>
struct TileSizeOf;

template <>
struct TileSizeOf<32> {                        // AVX-512, NEON
  static constexpr int kAccumulators = 24;     // sums in registers (measured on Zen 4)
  static constexpr int kMaxRows = 8;           // of a tile
  static constexpr int kMaxVectors = 4;        // of a tile and of a block of columns
  static constexpr int kDotUnits = 4;          // of a tile of dot products, whose weights are read in place
  static constexpr int64_t kInPlaceRows = 16;  // at most, of a call whose large weights are read in place

  static constexpr int rows(int vectors) { return std::min(kAccumulators / vectors, kMaxRows); }
  // Chains of sums over k. One chain of few sums cannot hide the latency of fma (4 cycles, 2 a cycle).
  static constexpr int chains(int rows, int vectors) { return rows * vectors <= 8 ? 2 : 1; }
};

template <>
struct TileSizeOf<16> {                     // SSE2, AVX2
  static constexpr int kAccumulators = 12;  // measured on Zen 4
  static constexpr int kMaxRows = 8;
  static constexpr int kMaxVectors = 4;
  static constexpr int kDotUnits = 4;
  static constexpr int64_t kInPlaceRows = 8;  // a tile of 4 rows by 4 units of dot products spills: 16 rows lose

  static constexpr int rows(int vectors) { return std::min(kAccumulators / vectors, kMaxRows); }
  // Two chains for one row only. Otherwise the number of threads would change the rounding of a weight's gradient,
  // because it decides where the tiles are cut.
  static constexpr int chains(int rows, int) { return rows == 1 ? 2 : 1; }
};

using TileSize = TileSizeOf<RNNFAST_VECTOR_REGISTERS>;
static_assert(TileSize::kMaxVectors == 4);  // the gates of an LSTM; multiply() has a case for each width
// pack_left() of OuterSum copies kMaxRows elements as one vector. StepProducts has cases for up to 8 rows.
static_assert(TileSize::kMaxRows == 4 || TileSize::kMaxRows == 8);
