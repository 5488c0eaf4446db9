// Forward of a stack of layers: one layer after the other by all threads, or a wavefront, where a single layer cannot
// keep the threads busy.
//
// Wavefront  Time is cut into chunks. A task is one chunk of one layer. Layer k computes chunk c while layer k - 1
//            computes chunk c + 1.
// Ownership  With n threads, a thread owns every n-th layer, so their weights stay in its caches. Layers that are left
//            over change threads from chunk to chunk.
//            If other programs take cores away, a thread takes every task that nobody has begun. If they hold the cores
//            from the start, one thread does all tasks. The result is the same.
// Sync       A task waits for the same chunk of the layer before and for the previous chunk of its own layer. All
//            threads visit tasks in one topological order.
// Limits     One direction, because the reverse one ends where the next layer would begin. No ragged batches.

// The rows of a chunk are one tile of an input product (AVX-512). Handing a chunk on costs ~0.2 us. Longer chunks let
// the last layer begin later: 12 rows are 1.02-1.05 and 24 rows 1.1 times slower than 6 (Zen 4, 2 layers of LSTM, H 64,
// B 1).
constexpr int64_t kWaveRows = 6;
// Chunks per layer, at least. With fewer, filling and draining the wavefront cost what the threads bring.
constexpr int64_t kWaveChunks = 4;
// Arithmetic per thread, at least. It is half of kFlopsPerThread, because few rows run at half the speed of many.
constexpr double kWaveFlops = 3e6;
// How much longer a unit split takes for its barriers, at least. (Zen 4, 2 threads, LSTM, GRU and RNN, H 64 to 256, B 1
// and 4: a wavefront takes 0.55 to 1.05 of the time of a unit split where the weights stay in L2, 1.2 where not.)
constexpr double kUnitSplitCost = 1.1;

// Threads of a wavefront through these layers. 1: one layer after the other is better.
template <class E, class C>
int wave_threads(const ForwardCall<E, C>* layers, int64_t count, int64_t wave_steps) {
  const ForwardCall<E, C>& last = layers[count - 1];
  const LayerShape& shape = last.shape;
  const Schedule& schedule = *last.schedule;
  if (count == 1 || last.threads == 1 || shape.directions > 1 || !schedule.padded()) return 1;
  if (schedule.steps < kWaveChunks * wave_steps) return 1;
  double flops = 0, most = 0;
  for (int64_t k = 0; k < count; ++k) {
    flops += flops_of(layers[k]);
    most = std::max(most, flops_of(layers[k]));
  }
  const int threads = int(std::min<double>(std::min<int64_t>(count, last.threads), flops / kWaveFlops));
  const bool in_cache = shape.gate_rows() * (shape.input_size + shape.output_size()) * sizeof(E) <= kAtStepBytes;
  if (threads <= 1 || !in_cache) return 1;
  const ThreadGrid grid = grid_of(last, last.threads);
  const double one_by_one = flops / grid.size() * (grid.unit_parts > 1 ? kUnitSplitCost : 1);
  const double chunks = double(schedule.steps / wave_steps), filling = (chunks + threads - 1) / chunks;
  return most * count / threads * filling < one_by_one ? threads : 1;
}

template <class E, Cell kCell>
class Wavefront {
 public:
  static constexpr int kMostLayers = 8;

  Wavefront(const ForwardCall<E, ComputeOf<E>>* calls, int count, int64_t wave_steps)
      : count_(count), chunks_(ceil_div(calls->schedule->steps, wave_steps)), events_(Contention::events()) {
    // The last layer waits for a chunk of every other, and for packed weights.
    const double chunk_ns = flops_of(calls[count - 1]) / kFlopsPerNanosecond / double(chunks_);
    long_wait_ = std::max(Contention::kLongWait, int64_t(Contention::kSteps * count * chunk_ns));
    for (int k = 0; k < count; ++k) layers_[k].forward.emplace(calls[k], 1, wave_steps);
  }

  // All tasks, by one thread.
  void work_alone() {
    for (int k = 0; k < count_; ++k) {
      layers_[k].forward->prepare_wave();
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) layers_[k].forward->run_chunk_of_wave(chunk);
    }
  }

  // The work of thread `me` of `threads`.
  void work(int me, int threads) {
    for (int k = me; k < count_; k += threads) {
      layers_[k].forward->prepare_wave();
      layers_[k].finished.store(0, std::memory_order_release);
    }
    for (int64_t slot = 0; slot < chunks_ + count_ - 1; ++slot) {
      const bool contended = Contention::events() != events_;
      for (int k = 0; k < count_; ++k) {
        const int64_t chunk = slot - k;
        if (chunk >= 0 && chunk < chunks_ && (contended || owner(k, chunk, threads) == me)) run(k, chunk);
      }
    }
  }

 private:
  struct Layer {
    std::optional<LayerForward<E, kCell>> forward;
    alignas(128) std::atomic<int64_t> begun{0};      // chunks
    alignas(128) std::atomic<int64_t> finished{-1};  // chunks; -1: the weights are not packed yet
  };

  // The thread that computes a chunk of layer k, if there is no contention.
  int owner(int k, int64_t chunk, int threads) const {
    return int((k < count_ - count_ % threads ? k : chunk) % threads);
  }

  void run(int k, int64_t chunk) {
    Layer& layer = layers_[k];
    if (layer.begun.load(std::memory_order_relaxed) > chunk) return;
    int64_t since = 0, next = chunk;
    await(layer.finished, chunk, &since);
    if (!layer.begun.compare_exchange_strong(next, chunk + 1, std::memory_order_relaxed)) return;
    if (k > 0) await(layers_[k - 1].finished, chunk + 1, &since);
    Contention::judge(since, long_wait_);
    layer.forward->run_chunk_of_wave(chunk);
    layer.finished.store(chunk + 1, std::memory_order_release);
  }

  const int count_;
  const int64_t chunks_, events_;
  int64_t long_wait_;
  Layer layers_[kMostLayers];
};

// Layers in groups of up to kMostLayers, each of them a wavefront.
template <class E, Cell kCell>
void run_waves(const ForwardCall<E, ComputeOf<E>>* layers, int64_t count, int most_threads, int64_t wave_steps) {
  using Wave = Wavefront<E, kCell>;
  const int64_t groups = ceil_div(count, Wave::kMostLayers);
  for (int64_t group = 0; group < groups; ++group) {
    const Range own = part_of(count, group, groups);
    const int size = int(own.last - own.first), threads = std::min(most_threads, size);
    Wave wave(layers + own.first, size, wave_steps);
    if (Contention::recent()) {
      wave.work_alone();
      continue;
    }
#pragma omp parallel num_threads(threads)
    wave.work(omp_get_thread_num(), omp_get_num_threads());
  }
}

template <class E, Cell kCell>
void forward_stack_of(const ForwardCall<E, ComputeOf<E>>* layers, int64_t count) {
  const int64_t wave_steps = ceil_div(kWaveRows, layers->schedule->batch);
  const int threads = wave_threads(layers, count, wave_steps);
  if (threads > 1) return run_waves<E, kCell>(layers, count, threads, wave_steps);
  for (int64_t k = 0; k < count; ++k)
    if (!LayerForward<E, kCell>(layers[k], layers[k].threads).run()) LayerForward<E, kCell>(layers[k], 1).run();
}

template <class E>
void forward_stack(const ForwardCall<E, ComputeOf<E>>* layers, int64_t count) {
  switch (layers->shape.cell) {
    case Cell::kRnn:
      return forward_stack_of<E, Cell::kRnn>(layers, count);
    case Cell::kGru:
      return forward_stack_of<E, Cell::kGru>(layers, count);
    case Cell::kLstm:
      return forward_stack_of<E, Cell::kLstm>(layers, count);
  }
}
