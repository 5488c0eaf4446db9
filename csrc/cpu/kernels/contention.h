// Waiting for another thread, and noticing that other programs hold the cores.
//
// A thread that waits at every step for one without a core advances one step per time slice. A step then takes
// milliseconds instead of microseconds. After several such waits, close together, a team leaves its unit split at the
// next step (threads.h, Retreat). The next calls do not split units at all, for a while.

class Contention {
 public:
  // A long wait, in ns: shorter than a time slice, and many times the imbalance of a short step.
  static constexpr int64_t kLongWait = 1'000'000;
  static constexpr double kSteps = 4;  // where steps are long, a long wait is so many of them
  static constexpr int64_t kNever = INT64_MAX;

  // Whether contention was noticed a short time ago.
  static bool recent() { return now() < until_.load(std::memory_order_relaxed); }
  // How often it was noticed, since the process began.
  static int64_t events() { return events_.load(std::memory_order_relaxed); }
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
  }
  // Notes a long wait. since: when it began; 0: there was none.
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
    // A new event soon after the last one: the cores stay busy. Each new trial costs a few time slices.
    const int64_t period = time - until < period_ ? std::min(2 * period_, kLongest) : kShortest;
    period_.store(period, std::memory_order_relaxed);
    until_.store(time + period, std::memory_order_relaxed);
    events_.fetch_add(1, std::memory_order_relaxed);
  }

  static constexpr int64_t kShortest = 100'000'000, kLongest = 10'000'000'000;  // ns
  // kEnough long waits are contention, if each is within kApart of the one before. A quiet system takes a core away now
  // and then. Busy programs do it at every time slice, every few milliseconds.
  static constexpr int64_t kApart = 50'000'000, kEnough = 4;
  static inline std::atomic<int64_t> until_{0}, period_{kShortest}, events_{0}, last_{0}, waits_{0};
};

// Returns when `counter` has reached `value`. Spins, then yields: with more busy threads than cores, the others must
// get to run. The time of the first yield goes to *since, unless a time is there already.
inline void await(const std::atomic<int64_t>& counter, int64_t value, int64_t* since) {
  constexpr int kSpins = 4000;  // ~10 µs: above the imbalance of a quiet step, far below a time slice
  for (int spins = 0; counter.load(std::memory_order_acquire) < value;) {
    if (++spins <= kSpins) continue;
    if (!*since) *since = Contention::now();
    sched_yield();
  }
}
