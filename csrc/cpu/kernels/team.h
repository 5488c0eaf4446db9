// Threads of one call: how the work is cut, and the barrier between time steps. Compiled once per instruction set.

// Below this much arithmetic a second thread costs more than it brings: ~100 µs of one core at ~100 GFLOP/s, against
// 20-40 µs to wake sleeping workers (prototype, Zen 4).
constexpr double kFlopsPerThread = 6e6;
// Of a core, at least (Zen 4 reaches 50 to 110): for how long a step may take.
constexpr double kFlopsPerNanosecond = 50;
// Fewer rows per thread leave the fused multiply-adds waiting for weights (a tile reaches peak from 3 rows on).
constexpr int64_t kRowsPerThread = 3;
// Recurrent weights beyond this come from far at every step: then each thread reads its units' part of them for all
// rows (Zen 4, 32 MiB of shared L3, 2 threads: LSTM H 1024 1.1-1.4 times faster so, with 4 MiB 0.97-1.0).
constexpr int64_t kFarWeights = 8 << 20;  // bytes

// What to do when other programs hold the cores. A thread that must wait at every step for one that has lost its core
// advances one step per time slice (milliseconds, where a step takes microseconds). After several waits that long,
// close together, the team leaves its unit split at the next step, and calls of the near future do not begin one.
class Contention {
 public:
  // ns: less than a time slice, and many times the imbalance of a short step; of a long one kSteps times its own time.
  static constexpr int64_t kLongWait = 1'000'000;
  static constexpr double kSteps = 4;
  static constexpr int64_t kNever = INT64_MAX;

  static bool recent() { return now() < until_.load(std::memory_order_relaxed); }
  static int64_t events() { return events_.load(std::memory_order_relaxed); }
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
  }
  // A wait since then (0: none) that is longer than `long_wait` is taken for contention.
  static void judge(int64_t since, int64_t long_wait) {
    if (since && now() - since > long_wait) note();
  }

 private:
  static void note() {
    const int64_t time = now(), until = until_.load(std::memory_order_relaxed);
    if (time < until) return;
    const bool apart = time - last_.exchange(time, std::memory_order_relaxed) > kApart;
    if (apart) waits_.store(0, std::memory_order_relaxed);
    if (waits_.fetch_add(1, std::memory_order_relaxed) + 1 < kEnough) return;
    waits_.store(0, std::memory_order_relaxed);
    // Soon after the last one: so the cores stay busy, and each new trial costs a few time slices.
    const int64_t period = time - until < period_ ? std::min(2 * period_, kLongest) : kShortest;
    period_.store(period, std::memory_order_relaxed);
    until_.store(time + period, std::memory_order_relaxed);
    events_.fetch_add(1, std::memory_order_relaxed);
  }

  static constexpr int64_t kShortest = 100'000'000, kLongest = 10'000'000'000;  // ns
  // A system takes a core away now and then, too; busy programs do it at every slice of a few milliseconds.
  static constexpr int64_t kApart = 50'000'000, kEnough = 4;
  static inline std::atomic<int64_t> until_{0}, period_{kShortest}, events_{0}, last_{0}, waits_{0};
};

// Each direction has its own threads when there are enough of them. They form a grid: `slices` of the batch, each cut
// into `units` parts of the hidden units; only threads of one slice ever wait for each other.
struct ThreadGrid {
  int directions = 1, slices = 1, units = 1;
  int64_t long_wait = Contention::kNever;      // ns that no thread should have to wait for another at a step
  int team() const { return slices * units; }  // the threads that share a direction
  int size() const { return directions * team(); }

  // The grid to take now: one without a unit split while other programs hold the cores.
  ThreadGrid now() const {
    ThreadGrid grid = *this;
    if (units > 1 && Contention::recent()) grid.units = 1;
    return grid;
  }
};

// A thread's place in the grid.
struct Place {
  int team, rank, slice, unit;
};
inline Place place_of(const ThreadGrid& grid, int thread) {
  const int rank = thread % grid.team();
  return {thread / grid.team(), rank, rank / grid.units, rank % grid.units};
}

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
  grid.units = static_cast<int>(std::clamp<int64_t>(available / grid.slices, 1, unit_blocks));
  const double step_ns = flops / kFlopsPerNanosecond / double(std::max<int64_t>(steps, 1)) / grid.size();
  grid.long_wait = std::max(Contention::kLongWait, int64_t(Contention::kSteps * step_ns));
  return grid;
}

// Returns when `counter` has come to `value`. Spins, then yields: with more busy threads than cores the others must get
// to run. since: the time of the first yield is put there, unless there is one.
inline void await(const std::atomic<int64_t>& counter, int64_t value, int64_t* since) {
  constexpr int kSpins = 4000;  // ~10 µs: longer than a quiet step's imbalance, far shorter than a time slice
  for (int spins = 0; counter.load(std::memory_order_acquire) < value;) {
    if (++spins <= kSpins) continue;
    if (!*since) *since = Contention::now();
    sched_yield();
  }
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

// Whether a slice has given up its unit split: unit 0 then does all of it, from a step on that all units know in time.
class Retreat {
 public:
  struct alignas(128) Step {
    std::atomic<int64_t> from;
  };

  explicit Retreat(Step* step) : step_(step), events_(Contention::events()) {}

  // Asked by every unit before `step`; the barrier at the end of each step makes unit 0's decision known for the next.
  bool alone(int64_t step, int unit) const {
    const int64_t from = step_->from.load(std::memory_order_relaxed);
    if (unit == 0 && from == Contention::kNever && Contention::events() != events_)
      step_->from.store(step + 1, std::memory_order_relaxed);
    return step >= from;
  }

 private:
  Step* step_;
  int64_t events_;
};

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
  Barrier::Flag* flags;    // [3, grid.size()]
  Retreat::Step* retreat;  // [directions, slices]

  Barrier all() const { return {flags, grid.size()}; }
  Barrier team(const Place& place) const { return {flags + grid.size() + place.team * grid.team(), grid.team()}; }
  Barrier slice(const Place& place) const {
    return {flags + 2 * grid.size() + place.team * grid.team() + place.slice * grid.units, grid.units, grid.long_wait};
  }
  Retreat retreat_of(const Place& place) const { return Retreat(retreat + place.team * grid.slices + place.slice); }
};

inline Barriers make_barriers(const ThreadGrid& grid, Workspace& workspace) {
  Barrier::Flag* flags = workspace.take<Barrier::Flag>(3 * grid.size());
  if (flags) std::memset(static_cast<void*>(flags), 0, 3 * grid.size() * sizeof *flags);
  const int slices = grid.directions * grid.slices;
  Retreat::Step* retreat = workspace.take<Retreat::Step>(slices);
  for (int slice = 0; retreat && slice < slices; ++slice) retreat[slice].from = Contention::kNever;
  return {grid, flags, retreat};
}

// Rows of time t that belong to a slice: sequences slice, slice + slices, ...
inline int64_t rows_at(const Schedule& schedule, int64_t t, int slice, int slices) {
  return schedule.count[t] <= slice ? 0 : (schedule.count[t] - slice + slices - 1) / slices;
}
