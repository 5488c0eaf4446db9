// What the runtime's parts share: blocks, warps, barriers, the schedule. Kernels never see this header.
#pragma once
#include <vector>

#include "emulator/runtime.h"

namespace rnnfast::emulator {

struct Block;
struct Cluster;

// Counts arrivals. Two tags, used in turn, tell TSan the order that the barrier gives.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t phase = 0;
  std::vector<Thread*> waiters;
  char tags[2];
};

struct Warp {
  uint64_t priority = 0;
  uint32_t ready = 0;    // lanes that can run
  uint32_t lanes = 0;    // lanes that exist
  uint32_t arrived = 0;  // lanes in the current collective
  Collective compute = nullptr;
  const char* name = "";
  void* arguments[32] = {};
  Thread* threads[32] = {};
  char tags[2];
};

struct Cluster {
  unsigned threads = 0;
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  static constexpr int kNamedBarriers = 16;  // as the hardware has

  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  unsigned live = 0;  // threads that have not returned
  Barrier barriers[kNamedBarriers];
  std::vector<Warp> warps;

  bool contains(const void* address, size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(address);
    return first >= shared && first + bytes <= shared + shared_bytes;
  }
};

// Which thread runs next (schedule.cpp).
void schedule_start(const Options& options);    // new random numbers
void schedule_reset(std::vector<Warp*> warps);  // the warps of the blocks that run now
void make_ready(Thread* thread);
Thread* next_thread();  // null when nobody can run
void demote(Warp* warp);
uint64_t random_below(uint64_t limit);

// Ends the launch with an Error that blames no thread.
[[noreturn]] void end_launch(const std::string& message);

// Leaves the running thread until make_ready() is called for it.
void block_thread(const char* waits_for);

// Asynchronous traffic (memory.cpp).
void memory_reset();
bool stores_under_way();
bool unexpected_bytes();   // whether some mbarrier received more bytes than were announced
void deliver_one();        // one store_async, at random
void deliver_sometimes();  // the same, by chance

}  // namespace rnnfast::emulator
