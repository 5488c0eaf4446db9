// Micro-benchmarks of the kernels' parts. Operands stay in the caches of one core, so these are upper limits.
#include "bench.h"

#include "parts.h"

namespace rnnfast::RNNFAST_ISA {

using bench::set_work;

template <class E>
struct Peak {
  using V = typename Simd<ComputeOf<E>>::V;

  // GFLOP/s of this core at this moment: multiplies and adds in registers alone.
  static double gflops() {
    constexpr int kChains = TileSize::kAccumulators, kRepeats = 20'000, kSamples = 40;
    volatile float factor = 0.5f;
    V sums[kChains], a = Simd<ComputeOf<E>>::set(factor), b = a;
    for (V& sum : sums) sum = a;
    double best = 0;
    for (int sample = 0; sample < kSamples; ++sample) {
      const double begin = seconds();
      for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 32
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = dot_add<E>(sums[chain], a, b);
#if defined(__aarch64__)
        asm volatile("" : "+w"(a), "+w"(b));
#else
        asm volatile("" : "+x"(a), "+x"(b));
#endif
      }
      const double flops = 2. * kRepeats * kChains * Simd<ComputeOf<E>>::kLanes * kPair<E>;
      best = std::max(best, flops / (seconds() - begin));
    }
    for (V& sum : sums) benchmark::DoNotOptimize(sum);
    return best / 1e9;
  }

  static double seconds() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
  }
};

constexpr int64_t kDepth = 256;

// Tiles of every width. The tallest ones should be near the peak.
void tile_sizes(benchmark::internal::Benchmark* one) {
  one->ArgNames({"vectors", "rows"});
  for (int vectors = 1; vectors <= TileSize::kMaxVectors; ++vectors)
    for (int rows : {1, 2, 3, 4, 6, 8})
      if (rows <= TileSize::rows(vectors)) one->Args({vectors, rows});
}

template <class E>
void tile_packed(benchmark::State& state) {
  const int vectors = int(state.range(0)), rows = int(state.range(1));
  const PanelShape<E> shape{vectors * PanelShape<E>::kLanes, kDepth};
  const auto a = normal_numbers<E>(rows * kDepth, 1), weight = normal_numbers<E>(shape.columns * kDepth, 2);
  Aligned<E> panel(shape.size());
  pack_panels(panel.data(), shape, weight_of(weight, kDepth), 0, 1);
  typename Simd<ComputeOf<E>>::V out[TileSize::kAccumulators];
  for (auto _ : state) {
    multiply<E>(out, shape.width(0), rows, {a.data(), kDepth}, kDepth, panel.data());
    benchmark::ClobberMemory();
  }
  set_work(state, 2. * rows * double(shape.columns) * kDepth, "GFLOP/s", Peak<E>::gflops());
}

template <class E>
void tile_direct(benchmark::State& state) {
  const int rows = int(state.range(0));
  const PanelShape<E> shape{PanelShape<E>::kLanes, kDepth};
  const auto a = normal_numbers<E>(rows * kDepth, 1), weight = normal_numbers<E>(shape.columns * kDepth, 2);
  std::vector<typename Simd<ComputeOf<E>>::V> out(rows);
  for (auto _ : state) {
    multiply_direct<E>(out.data(), shape, 0, rows, {a.data(), kDepth}, weight_of(weight, kDepth));
    benchmark::ClobberMemory();
  }
  set_work(state, 2. * rows * double(shape.columns) * kDepth, "GFLOP/s", Peak<E>::gflops());
}

// An LSTM's recurrent weight of H units into gate panels.
template <class E>
void pack_weight(benchmark::State& state) {
  const int64_t hidden = state.range(0);
  const PanelShape<E> shape{hidden, hidden, 4, true};
  const auto weight = normal_numbers<E>(4 * hidden * hidden, 1);
  Aligned<E> panel(shape.size());
  for (auto _ : state) {
    pack_panels(panel.data(), shape, weight_of(weight, hidden), 0, shape.blocks());
    benchmark::ClobberMemory();
  }
  set_work(state, double(weight.size()), "G/s");
}

template <class E>
void pack_weight_transposed(benchmark::State& state) {
  const int64_t hidden = state.range(0);
  const PanelShape<E> shape{hidden, 4 * hidden};
  const auto weight = normal_numbers<E>(4 * hidden * hidden, 1);
  Aligned<E> panel(shape.size());
  for (auto _ : state) {
    pack_transposed(panel.data(), shape, weight_of(weight, hidden), 4, hidden, 0, 0, shape.blocks());
    benchmark::ClobberMemory();
  }
  set_work(state, double(weight.size()), "G/s");
}

// The gradient of an LSTM's recurrent weight from 512 rows.
template <class E>
void outer_sum(benchmark::State& state) {
  constexpr int64_t kRows = 512, kPlanes = 4;
  const int64_t hidden = state.range(0);
  const auto left = normal_numbers<E>(kRows * kPlanes * hidden + TileSize::kMaxRows, 1);
  const auto right = normal_numbers<E>(kRows * hidden, 2);
  std::vector<E> out(kPlanes * hidden * hidden);
  static constexpr int kInOrder[] = {0, 1, 2, 3};
  Aligned<E> packed(OuterSum<E>::packed_size(kPlanes, hidden));
  Aligned<ComputeOf<E>> sums(OuterSum<E>::sums_size(kPlanes, hidden, int64_t(out.size()), kRows));
  const OuterSum<E> sum({left.data(), kPlanes, hidden, hidden, kPlanes * hidden}, {0, hidden},
                        {packed.data(), sums.data()});
  const auto h = [&](int64_t row) { return right.data() + row * hidden; };
  for (auto _ : state) {
    sum.add({kRows, true, true}, WeightGradient{out.data(), kInOrder, int(kPlanes), hidden, h});
    benchmark::ClobberMemory();
  }
  set_work(state, 2. * kRows * double(out.size()), "GFLOP/s", Peak<E>::gflops());
}

void hidden_sizes(benchmark::internal::Benchmark* one) { one->ArgNames({"H"})->Arg(64)->Arg(256); }

#define RNNFAST_ACTIVATION(name, call)                   \
  template <class E>                                     \
  void name(benchmark::State& state) {                   \
    using S = Simd<ComputeOf<E>>;                        \
    auto x = normal_numbers<ComputeOf<E>>(1024, 1);      \
    std::vector<ComputeOf<E>> y(x.size());               \
    for (auto _ : state) {                               \
      for (size_t i = 0; i < x.size(); i += S::kLanes) { \
        const auto v = S::load(&x[i]);                   \
        S::store(&y[i], call);                           \
      }                                                  \
      benchmark::ClobberMemory();                        \
    }                                                    \
    set_work(state, double(x.size()), "G/s");            \
  }
RNNFAST_ACTIVATION(sigmoid, S::sigmoid(v))
RNNFAST_ACTIVATION(tanh, S::tanh(v))
RNNFAST_ACTIVATION(sigmoid_tanh, S::sigmoid_tanh(v, v))

// The unit epilogue of an LSTM: `rows` rows of one vector of units.
template <class E>
void lstm_epilogue(benchmark::State& state) {
  using C = ComputeOf<E>;
  constexpr int kLanes = Simd<C>::kLanes;
  const int rows = int(state.range(0));
  const auto gates = normal_numbers<C>(rows * 4 * kLanes, 1), ahead = normal_numbers<C>(rows * 4 * kLanes, 2);
  std::vector<C> c(rows * kLanes);
  std::vector<E> h(rows * kLanes), output(rows * kLanes);
  CellRows<E, Cell::kLstm> at;
  at.rows = rows;
  at.units = kLanes;
  at.relu = false;
  at.hidden = kLanes;
  at.gates = gates.data();
  at.ahead = ahead.data();
  at.gates_stride = at.ahead_stride = 4 * kLanes;
  at.gate_stride = kLanes;
  at.h_prev = h.data();
  at.next = h.data();
  at.output = output.data();
  at.c = c.data();
  at.h_stride = at.next_stride = at.output_stride = at.c_stride = kLanes;
  at.saved_stride = 0;
  for (auto _ : state) {
    run_rows<true, false>(at);
    benchmark::ClobberMemory();
  }
  set_work(state, double(rows) * kLanes, "G/s");
}

#if defined(RNNFAST_BF16_ONLY)
void widen_vectors(benchmark::State& state) {
  const auto from = normal_numbers<BFloat16>(4096, 1);
  std::vector<float> to(from.size());
  for (auto _ : state) {
    for (size_t i = 0; i < from.size(); i += Simd<float>::kLanes)
      Simd<float>::store(&to[i], Io<BFloat16>::load(&from[i]));
    benchmark::ClobberMemory();
  }
  set_work(state, double(from.size()), "G/s");
}

void narrow_vectors(benchmark::State& state) {
  const auto from = normal_numbers<float>(4096, 1);
  std::vector<BFloat16> to(from.size());
  for (auto _ : state) {
    for (size_t i = 0; i < from.size(); i += Simd<float>::kLanes)
      Io<BFloat16>::store(&to[i], Simd<float>::load(&from[i]));
    benchmark::ClobberMemory();
  }
  set_work(state, double(from.size()), "G/s");
}
BENCHMARK(widen_vectors);
BENCHMARK(narrow_vectors);
#endif

#if defined(RNNFAST_BF16_ONLY)
#define RNNFAST_BENCHMARK(name, ...) BENCHMARK_TEMPLATE(name, BFloat16) __VA_ARGS__
#else
#define RNNFAST_BENCHMARK(name, ...)           \
  BENCHMARK_TEMPLATE(name, float) __VA_ARGS__; \
  BENCHMARK_TEMPLATE(name, double) __VA_ARGS__
#endif
RNNFAST_BENCHMARK(tile_packed, ->Apply(tile_sizes));
RNNFAST_BENCHMARK(tile_direct, ->ArgName("rows")->DenseRange(1, 6));
RNNFAST_BENCHMARK(outer_sum, ->Apply(hidden_sizes));
RNNFAST_BENCHMARK(pack_weight, ->Apply(hidden_sizes));
RNNFAST_BENCHMARK(pack_weight_transposed, ->Apply(hidden_sizes));
RNNFAST_BENCHMARK(sigmoid);
RNNFAST_BENCHMARK(tanh);
RNNFAST_BENCHMARK(sigmoid_tanh);
RNNFAST_BENCHMARK(lstm_epilogue, ->ArgName("rows")->Arg(1)->Arg(6)->Arg(24));

}  // namespace rnnfast::RNNFAST_ISA

int main(int count, char** arguments) {
  benchmark::Initialize(&count, arguments);
  rnnfast::bench::Table table;
  std::printf("%s: %d registers of %d bytes, %d accumulators\n", RNNFAST_NAME, RNNFAST_VECTOR_REGISTERS,
              RNNFAST_VECTOR_BYTES, rnnfast::RNNFAST_ISA::TileSize::kAccumulators);
  benchmark::RunSpecifiedBenchmarks(&table);
}
