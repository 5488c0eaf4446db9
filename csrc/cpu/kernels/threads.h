// The threads of one call: how they share the work, and the barriers between time steps.
//
// Ownership  Each direction has its own threads, if there are enough. The threads of a direction form a grid: slices of
//            the batch times parts of the units. The threads of one slice are a team.
// Sync       Only the threads of a team wait for each other at a step.

// Arithmetic per thread, at least. With less, waking a sleeping thread (20-40 µs) costs more than its share of the work
// brings, at ~100 GFLOP/s of a core (prototype, Zen 4).
constexpr double kFlopsPerThread = 6e6;
// A core's rate, at least, from which the time of a step is estimated (Zen 4 reaches 50 to 110).
constexpr double kFlopsPerNanosecond = 50;
// Rows per thread, at least. A tile of fewer rows waits for weights (peak is reached from 3 rows on, Zen 4).
constexpr int64_t kRowsPerThread = 3;
// Larger recurrent weights come from L3 or memory at every step. Units are then split before the batch, so that each
// thread reads only its units' part of them. (Zen 4, 32 MiB of shared L3, 2 threads: LSTM H 1024 is 1.1-1.4 times
// faster so; with 4 MiB of weights 0.97-1.0 times.)
constexpr int64_t kFarWeights = 8 << 20;  // bytes

struct ThreadGrid {
  int directions = 1;  // 1: every thread works on all directions of the layer
  int slices = 1, unit_parts = 1;
  int64_t long_wait = Contention::kNever;  // ns; a longer wait at a step is a sign of contention
  int per_direction() const { return slices * unit_parts; }
  int size() const { return directions * per_direction(); }

  // The grid to use now: without a unit split while other programs hold the cores.
  ThreadGrid now() const {
    ThreadGrid grid = *this;
    if (unit_parts > 1 && Contention::recent()) grid.unit_parts = 1;
    return grid;
  }
};

// Where a thread stands in the grid.
struct GridPosition {
  int direction;  // of the grid
  int rank;       // among the threads of the direction
  int slice;      // of the batch
  int part;       // of the units
};
inline GridPosition position_of(const ThreadGrid& grid, int thread) {
  const int rank = thread % grid.per_direction();
  return {thread / grid.per_direction(), rank, rank / grid.unit_parts, rank % grid.unit_parts};
}

// unit_blocks: the blocks that a layer's units are cut into. weight_bytes: the recurrent weights. flops: the whole
// call.
inline ThreadGrid make_grid(int threads, int64_t directions, int64_t batch, int64_t unit_blocks, int64_t weight_bytes,
                            double flops, int64_t steps) {
  ThreadGrid grid;
  int available = static_cast<int>(std::clamp<double>(flops / kFlopsPerThread, 1, threads));
  if (directions == 2 && available >= 2) {
    grid.directions = 2;
    available /= 2;
  }
  const int64_t slices = weight_bytes > kFarWeights && unit_blocks >= available ? 1 : batch / kRowsPerThread;
  grid.slices = static_cast<int>(std::clamp<int64_t>(slices, 1, available));
  grid.unit_parts = static_cast<int>(std::clamp<int64_t>(available / grid.slices, 1, unit_blocks));
  const double step_ns = flops / kFlopsPerNanosecond / double(std::max<int64_t>(steps, 1)) / grid.size();
  grid.long_wait = std::max(Contention::kLongWait, int64_t(Contention::kSteps * step_ns));
  return grid;
}

// A barrier for a few threads.
class Barrier {
 public:
  struct alignas(128) Flag {  // two cache lines: the prefetcher fetches pairs
    std::atomic<int64_t> phase;
  };

  Barrier(Flag* flags, int size, int64_t long_wait = Contention::kNever)
      : flags_(flags), size_(size), long_wait_(long_wait) {}

  int size() const { return size_; }

  void wait(int me) const {
    if (size_ == 1) return;
    const int64_t phase = flags_[me].phase.load(std::memory_order_relaxed) + 1;
    flags_[me].phase.store(phase, std::memory_order_release);
    int64_t since = 0;
    for (int other = 0; other < size_; ++other) await(flags_[other].phase, phase, &since);
    Contention::judge(since, long_wait_);
  }

 private:
  Flag* flags_;
  int size_;
  int64_t long_wait_;
};

// Runs body(thread) on exactly `threads` threads. False if OpenMP gives fewer (a nested region): then nothing has run.
template <class Body>
bool run_threads(int threads, Body&& body) {
  if (threads == 1) {
    body(0);
    return true;
  }
  bool complete = true;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads)
      body(omp_get_thread_num());
    else if (omp_get_thread_num() == 0)
      complete = false;
  }
  return complete;
}

// Whether a team has given up its unit split. From a certain step on, its thread of part 0 does the work of all. All
// threads of the team learn that step in time.
class Retreat {
 public:
  struct alignas(128) Step {
    std::atomic<int64_t> from;
  };

  explicit Retreat(Step* step) : step_(step), events_(Contention::events()) {}

  // Every thread of the team asks before each step. Part 0 decides. The barrier at the end of a step makes its decision
  // known for the next one.
  bool alone(int64_t step, int part) const {
    const int64_t from = step_->from.load(std::memory_order_relaxed);
    if (part == 0 && from == Contention::kNever && Contention::events() != events_)
      step_->from.store(step + 1, std::memory_order_relaxed);
    return step >= from;
  }

 private:
  Step* step_;
  int64_t events_;
};

struct Range {
  int64_t first, last;
};
// Items of the part number `part`, where `count` items are cut into `parts`.
inline Range part_of(int64_t count, int64_t part, int64_t parts) {
  return {part * count / parts, (part + 1) * count / parts};
}

// The barriers of a grid: of all threads, of the threads of a direction, of a team.
struct Barriers {
  ThreadGrid grid;
  Barrier::Flag* flags;    // [3, grid.size()]
  Retreat::Step* retreat;  // [directions, slices]

  Barrier all() const { return {flags, grid.size()}; }
  Barrier direction(const GridPosition& at) const {
    return {flags + grid.size() + at.direction * grid.per_direction(), grid.per_direction()};
  }
  Barrier team(const GridPosition& at) const {
    Barrier::Flag* const own =
        flags + 2 * grid.size() + at.direction * grid.per_direction() + at.slice * grid.unit_parts;
    return {own, grid.unit_parts, grid.long_wait};
  }
  Retreat retreat_of(const GridPosition& at) const { return Retreat(retreat + at.direction * grid.slices + at.slice); }
};

inline Barriers make_barriers(const ThreadGrid& grid, Workspace& workspace) {
  Barrier::Flag* flags = workspace.take<Barrier::Flag>(3 * grid.size());
  if (flags) std::memset(static_cast<void*>(flags), 0, 3 * grid.size() * sizeof *flags);
  const int slices = grid.directions * grid.slices;
  Retreat::Step* retreat = workspace.take<Retreat::Step>(slices);
  for (int slice = 0; retreat && slice < slices; ++slice) retreat[slice].from = Contention::kNever;
  return {grid, flags, retreat};
}

// Rows of time t that belong to a slice, which has the sequences slice, slice + slices, ...
inline int64_t rows_at(const Schedule& schedule, int64_t t, int slice, int slices) {
  return schedule.count[t] <= slice ? 0 : (schedule.count[t] - slice + slices - 1) / slices;
}
