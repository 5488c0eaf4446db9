// The table of the micro-benchmarks: time, rate, and the share of a peak that this machine reached a moment ago.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdio>
#include <string>

namespace rnnfast::bench {

constexpr int kRepetitions = 5;

// How many units of work a run has, the name of the unit, and the best rate of this machine (0: no limit is known).
inline void set_work(benchmark::State& state, double amount, const char* unit, double peak = 0) {
  state.counters["work"] = amount;
  state.counters["peak"] = peak;
  state.SetLabel(unit);
}

// One line per benchmark, of its fastest repetition.
class Table : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override {
    std::printf("%-44s %10s %9s %-9s %8s\n", "part", "ns", "rate", "", "of peak");
    return true;
  }

  void ReportRuns(const std::vector<Run>& runs) override {
    const Run* best = nullptr;
    for (const Run& run : runs)
      if (run.run_type == Run::RT_Iteration && (!best || run.GetAdjustedCPUTime() < best->GetAdjustedCPUTime()))
        best = &run;
    if (!best) return;
    std::string name = best->run_name.function_name;
    if (!best->run_name.args.empty()) name += "/" + best->run_name.args;
    const double ns = best->GetAdjustedCPUTime();
    const double rate = best->counters.at("work").value / ns, peak = best->counters.at("peak").value;
    std::printf("%-44s %10.1f %9.2f %-9s", name.c_str(), ns, rate, best->report_label.c_str());
    if (peak > 0) std::printf(" %7.0f%%", 100 * rate / peak);
    std::printf("\n");
    std::fflush(stdout);
  }
};

}  // namespace rnnfast::bench
