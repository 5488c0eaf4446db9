// Threads of one call: how the work is cut, and the barrier between time steps. Compiled once per instruction set.

// Below this much arithmetic a second thread costs more than it brings: ~100 µs of one core at ~100 GFLOP/s, against
// 20-40 µs to wake sleeping workers (prototype, Zen 4).
constexpr double kFlopsPerThread = 6e6;
// Fewer rows per thread leave the fused multiply-adds waiting for weights (a tile reaches peak from 3 rows on).
constexpr int64_t kRowsPerThread = 3;

// Each direction has its own threads when there are enough of them. They form a grid: `slices` of the batch, each cut
// into `units` parts of the hidden units; only threads of one slice ever wait for each other.
struct ThreadGrid {
  int directions = 1, slices = 1, units = 1;
  int team() const { return slices * units; }  // the threads that share a direction
  int size() const { return directions * team(); }
};

// A thread's place in the grid.
struct Place {
  int team, rank, slice, unit;
};
inline Place place_of(const ThreadGrid& grid, int thread) {
  const int rank = thread % grid.team();
  return {thread / grid.team(), rank, rank / grid.units, rank % grid.units};
}

inline ThreadGrid make_grid(int threads, int64_t directions, int64_t batch, int64_t unit_blocks, double flops) {
  ThreadGrid grid;
  int available = static_cast<int>(std::clamp<double>(flops / kFlopsPerThread, 1, threads));
  if (directions == 2 && available >= 2) {
    grid.directions = 2;
    available /= 2;
  }
  grid.slices = static_cast<int>(std::clamp<int64_t>(batch / kRowsPerThread, 1, available));
  grid.units = static_cast<int>(std::clamp<int64_t>(available / grid.slices, 1, unit_blocks));
  return grid;
}

// A barrier for a few threads. Spins, then yields: with more busy threads than cores the others must get to run.
class Barrier {
 public:
  struct alignas(128) Flag {  // two cache lines: the prefetcher fetches pairs
    std::atomic<int64_t> phase;
  };

  Barrier(Flag* flags, int size) : flags_(flags), size_(size) {}

  void wait(int me) const {
    if (size_ == 1) return;
    const int64_t phase = flags_[me].phase.load(std::memory_order_relaxed) + 1;
    flags_[me].phase.store(phase, std::memory_order_release);
    for (int other = 0; other < size_; ++other) {
      int spins = 0;
      while (flags_[other].phase.load(std::memory_order_acquire) < phase) {
        if (++spins > kSpins) sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 4000;  // ~10 µs: longer than a quiet step's imbalance, far shorter than a time slice
  Flag* flags_;
  int size_;
};

// Runs body(thread) on exactly `threads` threads; false, and nothing has run, if OpenMP gives fewer (a nested region).
template <class Body>
bool run_team(int threads, Body&& body) {
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

// The part of `count` items that belongs to `part` of `parts`.
struct Range {
  int64_t first, last;
};
inline Range part_of(int64_t count, int64_t part, int64_t parts) {
  return {part * count / parts, (part + 1) * count / parts};
}

// The barriers of a grid: among all threads, those of a direction, those of one of its slices.
struct Barriers {
  ThreadGrid grid;
  Barrier::Flag* flags;  // [3, grid.size()]

  Barrier all() const { return {flags, grid.size()}; }
  Barrier team(const Place& place) const { return {flags + grid.size() + place.team * grid.team(), grid.team()}; }
  Barrier slice(const Place& place) const {
    return {flags + 2 * grid.size() + place.team * grid.team() + place.slice * grid.units, grid.units};
  }
};

inline Barriers make_barriers(const ThreadGrid& grid, Workspace& workspace) {
  Barrier::Flag* flags = workspace.take<Barrier::Flag>(3 * grid.size());
  if (flags) std::memset(static_cast<void*>(flags), 0, 3 * grid.size() * sizeof *flags);
  return {grid, flags};
}

// Rows of time t that belong to a slice: sequences slice, slice + slices, ...
inline int64_t rows_at(const Schedule& schedule, int64_t t, int slice, int slices) {
  return schedule.count[t] <= slice ? 0 : (schedule.count[t] - slice + slices - 1) / slices;
}
