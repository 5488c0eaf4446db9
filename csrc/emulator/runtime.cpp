// Launches: sets up blocks and fibers, runs them to the end, reports errors. Also the barriers of block and cluster.
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "emulator/machine.h"

namespace rnnfast::emulator {

Thread* current = nullptr;
dim3 grid_size, block_size;

namespace {

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 16;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of an H100; no GPU that we build for has more
constexpr size_t kSharedAlignment = 1024;
constexpr unsigned kMaxTsanFibers = 8000;  // TSan's own limit is 8128 threads
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes = 0;  // ASan's red zone begins at the very end of the shared memory
#else
constexpr size_t kGuardBytes = 4096;
#endif

constexpr uint64_t kLoadsPerPoll = 64;  // loads of one round of a poll: its part of a row of h
constexpr uint64_t kPatience = 4;       // rounds of fruitless polls before a late store_async must arrive
constexpr uint64_t kObserveEvery = 8;   // chances of a switch at a load; more would only cost time

std::mutex one_launch;
Options options;
bool started = false;
Thread caller;  // stands for the host thread
const std::function<void()>* kernel = nullptr;
thread_local bool in_launch = false;
std::string error;
std::vector<Thread> threads;
unsigned live = 0;
uint64_t fruitless_polls = 0, fruitless_loads = 0;
char start_tag, end_tag;

std::string text_of(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

Thread* choose_next() {
  deliver_sometimes();
  Thread* next = next_thread();
  while (!next && stores_under_way()) {
    deliver_one();
    next = next_thread();
  }
  return next ? next : &caller;
}

void switch_to(Thread* next) {
  if (next == current) return;
  Thread* from = current;
  current = next;
  switch_fiber(from->fiber, next->fiber);
}

void thread_main() {
  enter_fiber();
  acquire(&start_tag);
  (*kernel)();
  release(&end_tag);
  Thread* next;
  {
    const Ignore ignore;
    current->fiber.finished = true;
    --current->block->live;
    --live;
    progress();
    next = choose_next();
  }
  switch_to(next);
  std::abort();  // nobody resumes a finished thread
}

// All shared memory is NaN until somebody writes it.
void make_shared_memory(Block& block, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, std::max<size_t>(bytes + kGuardBytes, 1))) throw std::bad_alloc();
  std::memset(memory, 0xFF, bytes + kGuardBytes);
  block.shared = static_cast<unsigned char*>(memory);
  block.shared_bytes = bytes;
}

std::string guard_violation(const Block& block) {
  const unsigned char* guard = block.shared + block.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] != 0xFF) return "shared memory written " + std::to_string(i) + " bytes past its end";
  }
  return "";
}

std::string blocked_threads() {
  std::map<std::string, int> count;
  for (const Thread& thread : threads) {
    if (thread.block && !thread.fiber.finished)
      ++count["block " + text_of(thread.block_index) + " in " + thread.waits_for];
  }
  std::string text = "deadlock: nothing can run, " + std::to_string(live) + " threads have not returned:";
  int lines = 0;
  for (const auto& [where, number] : count) {
    if (++lines > 8) return text + " ...";
    text += "\n  " + std::to_string(number) + " threads of " + where;
  }
  return text;
}

// The blocks that run at the same time: one cluster, or the whole cooperative grid.
struct Group {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;

  ~Group() {
    for (const auto& block : blocks) std::free(block->shared);
  }

  Group(const Launch& launch, unsigned first, unsigned count, char* stacks) {
    const dim3 grid = launch.grid, size = launch.block;
    const unsigned per_block = size.x * size.y * size.z;
    std::vector<Warp*> warps;
    for (unsigned i = 0; i < count; ++i) {
      if (i % launch.cluster == 0) clusters.push_back(std::make_unique<Cluster>());
      Block& block = *blocks.emplace_back(std::make_unique<Block>());
      block.cluster = clusters.back().get();
      block.rank = i % launch.cluster;
      block.cluster->blocks.push_back(&block);
      block.cluster->threads += per_block;
      block.live = per_block;
      block.warps.resize((per_block + 31) / 32);
      make_shared_memory(block, launch.shared_bytes);
      for (Warp& warp : block.warps) warps.push_back(&warp);
    }
    schedule_reset(std::move(warps));
    for (unsigned i = 0; i < count; ++i) {
      const unsigned id = first + i;
      for (unsigned t = 0; t < per_block; ++t) {
        const size_t slot = size_t{i} * per_block + t;
        Thread& thread = threads[slot];
        thread = {};
        thread.block = blocks[i].get();
        thread.warp = &thread.block->warps[t / 32];
        thread.lane = static_cast<int>(t % 32);
        thread.warp->threads[thread.lane] = &thread;
        thread.warp->lanes |= 1u << thread.lane;
        thread.thread_index = dim3(t % size.x, t / size.x % size.y, t / (size.x * size.y));
        thread.block_index = dim3(id % grid.x, id / grid.x % grid.y, id / (grid.x * grid.y));
        prepare_fiber(thread.fiber, stacks + slot * kStackBytes, slot, thread_main);
        make_ready(&thread);
      }
    }
    live = count * per_block;
    memory_reset();
    progress();
  }

  // Runs all threads to their end. Returns an error's text, or nothing.
  std::string run() {
    current = &caller;
    in_launch = true;
    switch_to(choose_next());
    in_launch = false;
    if (!error.empty()) return error;
    if (live) return blocked_threads();
    if (stores_under_way()) return "store_async still under way when all threads had returned";
    if (unexpected_bytes()) return "an mbarrier received bytes that nobody expected";
    for (const auto& block : blocks) {
      const std::string violation = guard_violation(*block);
      if (!violation.empty()) return violation;
    }
    return "";
  }
};

void options_from_environment() {
  const auto number = [](const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
  };
  options.seed = number("RNNFAST_EMULATOR_SEED", options.seed);
  options.spin_rounds = number("RNNFAST_EMULATOR_SPIN_ROUNDS", options.spin_rounds);
  options.resident_blocks = unsigned(number("RNNFAST_EMULATOR_RESIDENT_BLOCKS", options.resident_blocks));
  if (const char* name = std::getenv("RNNFAST_EMULATOR_SCHEDULE")) options.schedule = schedule_named(name);
  started = true;
  schedule_start(options);
}

void clean_up(size_t count, bool failed) {
  for (size_t i = 0; i < count; ++i) {
    destroy_fiber(threads[i].fiber, caller.fiber, &end_tag);
    threads[i] = {};
  }
  // Blocks run one after the other here. TSan must not take that for their order, so the next ones get new stacks.
  if (failed || race_detector()) release_stacks();
}

}  // namespace

Schedule schedule_named(const std::string& name) {
  if (name == "random") return Schedule::kRandom;
  if (name == "uniform") return Schedule::kUniform;
  if (name == "fifo") return Schedule::kFifo;
  throw Error("emulator: schedule " + name + ", expected random, uniform or fifo");
}

void configure(const Options& wanted) {
  const std::lock_guard lock(one_launch);
  options = wanted;
  started = true;
  schedule_start(options);
}

unsigned resident_blocks() {
  const std::lock_guard lock(one_launch);
  if (!started) options_from_environment();
  return options.resident_blocks;
}

cudaError_t run(const Launch& launch, const std::function<void()>& body) {
  if (in_launch) throw Error("emulator: a kernel cannot launch a kernel");
  const std::lock_guard lock(one_launch);
  const Ignore ignore;
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  const unsigned per_block = launch.block.x * launch.block.y * launch.block.z;
  if (blocks == 0 || per_block == 0 || per_block > kMaxThreads || launch.cluster == 0 || launch.cluster > kMaxCluster ||
      launch.grid.x % launch.cluster || launch.shared_bytes > kMaxSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  if (!started) options_from_environment();
  if (launch.cooperative && blocks > options.resident_blocks) return cudaErrorCooperativeLaunchTooLarge;
  const unsigned together = launch.cooperative ? blocks : launch.cluster;
  const size_t count = size_t{together} * per_block;
  if (race_detector() && count > kMaxTsanFibers) throw Error("TSan cannot follow more than 8000 threads at once");
  grid_size = launch.grid;
  block_size = launch.block;
  kernel = &body;
  if (threads.size() < count) threads = std::vector<Thread>(count);
  std::vector<unsigned> order(blocks / together);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (options.schedule != Schedule::kFifo) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  release(&start_tag);
  std::string problem;
  for (unsigned group : order) {
    char* stacks = reserve_stacks(count);
    if (!stacks) throw Error("no memory for the stacks of " + std::to_string(count) + " threads");
    error.clear();
    problem = Group(launch, group * together, together, stacks).run();
    clean_up(count, !problem.empty());
    if (!problem.empty()) break;
  }
  acquire(&end_tag);
  if (!problem.empty()) throw Error("emulator: " + problem);
  return cudaSuccess;
}

void fail(const std::string& message) {
  end_launch(message + "\n  in thread " + text_of(current->thread_index) + " of block " +
             text_of(current->block_index));
}

void end_launch(const std::string& message) {
  error = message;
  Thread* from = current;
  current = &caller;
  switch_fiber(from->fiber, caller.fiber);
  std::abort();  // the launch is over
}

void block_thread(const char* waits_for) {
  current->waits_for = waits_for;
  switch_to(choose_next());
}

bool poll() {
  const Ignore ignore;
  if (++fruitless_polls > options.spin_rounds * live) return false;
  if (fruitless_polls > kPatience * live && stores_under_way()) deliver_one();  // what the poll may wait for
  demote(current->warp);
  make_ready(current);
  block_thread("a poll");
  return true;
}

unsigned observe() {
  const Ignore ignore;
  // Kernels poll through Spin, which counts. This stops a loop without Spin.
  if (++fruitless_loads > kLoadsPerPoll * options.spin_rounds * live) fail("a poll without Spin does not end");
  if (random_below(kObserveEvery) == 0) {
    make_ready(current);
    block_thread("a poll");
  }
  return static_cast<unsigned>(random_below(1u << 31));
}

void progress() { fruitless_polls = fruitless_loads = 0; }

unsigned char* shared_memory() { return current->block->shared; }
unsigned cluster_rank() { return current->block->rank; }

void* map_to_rank(const void* shared, unsigned rank) {
  const Ignore ignore;
  Block& block = *current->block;
  if (!block.contains(shared, 1)) fail("map_to_rank: not an address in the block's shared memory");
  if (rank >= block.cluster->blocks.size()) fail("map_to_rank: the cluster has no rank " + std::to_string(rank));
  return block.cluster->blocks[rank]->shared + (static_cast<const unsigned char*>(shared) - block.shared);
}

namespace {

void arrive(Barrier& barrier, unsigned expected, bool wait, const char* name) {
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) fail(std::string(name) + ": threads disagree on how many take part");
  void* tag = &barrier.tags[barrier.phase & 1];
  release(tag);
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.phase;
    progress();
    for (Thread* thread : barrier.waiters) make_ready(thread);
    barrier.waiters.clear();
    if (wait) make_ready(current);
  } else if (wait) {
    barrier.waiters.push_back(current);
  }
  if (!wait) return;
  block_thread(name);
  acquire(tag);
}

}  // namespace

void block_barrier(unsigned id, unsigned count, bool wait) {
  const Ignore ignore;
  const unsigned all = block_size.x * block_size.y * block_size.z;
  if (id >= Block::kNamedBarriers) fail("block_sync: a block has 16 barriers");
  if (count == 0 || count > all || (count % 32 && count != all)) fail("block_sync: not a number of whole warps");
  const char* name = wait ? "block_sync" : "block_arrive";
  if (id != 0) collective(nullptr, nullptr, name);
  arrive(current->block->barriers[id], count, wait, name);
}

void cluster_arrive() {
  const Ignore ignore;
  Cluster& cluster = *current->block->cluster;
  collective(nullptr, nullptr, "cluster_arrive");
  if (current->cluster_phase) fail("cluster_arrive: twice without cluster_wait");
  current->cluster_phase = cluster.barrier.phase + 1;
  arrive(cluster.barrier, cluster.threads, false, "cluster_arrive");
}

void cluster_wait() {
  const Ignore ignore;
  Barrier& barrier = current->block->cluster->barrier;
  collective(nullptr, nullptr, "cluster_wait");
  if (!current->cluster_phase) fail("cluster_wait: without cluster_arrive");
  const uint64_t phase = current->cluster_phase - 1;
  current->cluster_phase = 0;
  if (barrier.phase == phase) {
    barrier.waiters.push_back(current);
    block_thread("cluster_wait");
  }
  acquire(&barrier.tags[phase & 1]);
}

void collective(Collective compute, void* argument, const char* name) {
  const Ignore ignore;
  Warp& warp = *current->warp;
  if (compute && warp.lanes != ~0u) fail(std::string(name) + ": the block's last warp has fewer than 32 lanes");
  if (warp.arrived == 0) {
    warp.compute = compute;
    warp.name = name;
  } else if (warp.name != name && std::strcmp(warp.name, name) != 0) {
    fail(std::string("divergent warp: one lane in ") + warp.name + ", another in " + name);
  }
  warp.arguments[current->lane] = argument;
  warp.arrived |= 1u << current->lane;
  if (warp.arrived == warp.lanes) {
    warp.arrived = 0;
    if (compute) compute(warp.arguments);
    for (Thread* thread : warp.threads) {
      if (thread) make_ready(thread);
    }
  }
  block_thread(name);
}

void warp_barrier() {
  void* tag = &current->warp->tags[current->warp_barriers++ & 1];
  release(tag);
  collective(nullptr, nullptr, "warp_sync");
  acquire(tag);
}

}  // namespace rnnfast::emulator
