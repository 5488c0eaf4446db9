// planted FORM BUG SEEDS SCHEDULE: runs planted.cuh's loops and prints "runs wrong errors" and the first error's text.
//
// FORM: "block", "cluster2", "group4", ... with the number of blocks. It is a program, so ASan and TSan builds of it
// can run.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "planted.cuh"

namespace {

using namespace rnnfast::cuda;
using namespace rnnfast::cuda::test;

constexpr int kSteps = 12, kTiles = 2;

struct NamedBug {
  const char* name;
  void (*block)(const float*, float*, int);
  void (*cluster)(const float*, float*, int, int);
  void (*group)(const float*, float*, float*, uint32_t*, int);
};

constexpr NamedBug kBugs[] = {
    {"none", block_loop<Bug::kNone>, cluster_loop<Bug::kNone>, group_loop<Bug::kNone>},
    {"no_barrier", block_loop<Bug::kNoBarrier>, nullptr, nullptr},
    {"no_barrier_once", block_loop<Bug::kNoBarrierOnce>, nullptr, nullptr},
    {"single_buffer", block_loop<Bug::kSingleBuffer>, cluster_loop<Bug::kSingleBuffer>, group_loop<Bug::kSingleBuffer>},
    {"no_copy_wait", block_loop<Bug::kNoCopyWait>, nullptr, nullptr},
    {"late_copy_wait", block_loop<Bug::kLateCopyWait>, nullptr, nullptr},
    {"ring_copy_outside", block_loop<Bug::kRingCopyOutside>, nullptr, nullptr},
    {"ring_read_outside", block_loop<Bug::kRingReadOutside>, nullptr, nullptr},
    {"ring_write_outside", block_loop<Bug::kRingWriteOutside>, nullptr, nullptr},
    {"shared_output", block_loop<Bug::kSharedOutput>, nullptr, nullptr},
    {"misaligned", block_loop<Bug::kMisaligned>, nullptr, nullptr},
    {"no_mbarrier_wait", nullptr, cluster_loop<Bug::kNoMbarrierWait>, nullptr},
    {"no_cluster_barrier", nullptr, cluster_loop<Bug::kNoClusterBarrier>, nullptr},
    {"no_rearm", nullptr, cluster_loop<Bug::kNoRearm>, nullptr},
    {"no_warp_sync", nullptr, cluster_loop<Bug::kNoWarpSync>, nullptr},
    {"no_group_sync", nullptr, nullptr, group_loop<Bug::kNoGroupSync>},
    {"early_group_sync", nullptr, nullptr, group_loop<Bug::kEarlyGroupSync>},
};

// The loop in plain words, one tile of kSteps rows after the other, with the kernel's order of operations.
std::vector<float> reference(const std::vector<float>& x, int H) {
  std::vector<float> output(x.size()), h(H);
  for (size_t row = 0; row < x.size() / H; ++row) {
    if (row % kSteps == 0) h.assign(H, 0);
    float* now = &output[row * H];
    for (int unit = 0; unit < H; ++unit) now[unit] = mix(x[row * H + unit], h[(unit + 1) % H], h[(unit + 65) % H]);
    h.assign(now, now + H);
  }
  return output;
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) return 2;
  const std::string form = words[1];
  const int ranks = form == "block" ? 1 : form.back() - '0';
  const int H = form == "block" ? kBlockUnits : ranks * kRankUnits;
  std::vector<float> x((form == "block" ? kTiles : 1) * kSteps * H);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u % 1000) / 500 - 1;
  const std::vector<float> expected = reference(x, H);
  int runs = 0, wrong = 0, errors = 0;
  std::string first;
  for (const NamedBug& bug : kBugs) {
    if (bug.name != std::string(words[2])) continue;
    for (int seed = 1; seed <= std::atoi(words[3]); ++seed, ++runs) {
      rnnfast::emulator::Options options;
      options.seed = seed;
      options.schedule = rnnfast::emulator::schedule_named(words[4]);
      rnnfast::emulator::configure(options);
      std::vector<float> output(x.size()), h(2 * H);
      uint32_t counter = 0;
      try {
        if (form == "block") {
          launch(bug.block, dim3(kTiles), dim3(H), 1, false, kBlockShared, nullptr, x.data(), output.data(), kSteps);
        } else if (form.starts_with("cluster")) {
          launch(bug.cluster, dim3(ranks), dim3(kRankUnits), ranks, false, cluster_shared(ranks), nullptr, x.data(),
                 output.data(), kSteps, ranks);
        } else {
          launch(bug.group, dim3(ranks), dim3(kRankUnits), 1, true, 0, nullptr, x.data(), output.data(), h.data(),
                 &counter, kSteps);
        }
        wrong += std::memcmp(output.data(), expected.data(), x.size() * sizeof(float)) != 0;
      } catch (const rnnfast::emulator::Error& error) {
        if (!errors++) first = error.what();
      }
    }
  }
  std::printf("%d %d %d\n%s\n", runs, wrong, errors, first.c_str());
}
