// The emulator's machine: what a launch is, and what the primitives of csrc/emulator/primitives.h call.
//
// Every CUDA thread of the blocks that run together is a fiber. Only one fiber runs at a time: a kernel is ordinary C++
// until it calls a primitive that waits. The lane that comes last computes a primitive of a warp (mma, shuffle). Lanes
// in different primitives are an error. Where the hardware has a choice, the emulator makes a bad one:
//   - A seed decides which warp runs next. The default schedule gives warps random priorities and changes them at
//   times.
//     A warp that polls falls behind the others. So one warp may run far ahead, which a uniform choice never shows.
//   - Shared memory starts as NaN (0xFF). So does the destination of a copy_async, until the thread waits for it.
//   - store_async arrives late and out of order, at the latest when nothing else can run.
//   - Clusters of an ordinary launch run one after the other, in random order. A cooperative grid runs as a whole.
// Misuse (divergence, barriers, bounds), deadlock and trap() end the launch: launch() throws Error on the host.
// Not emulated: reordering of plain memory accesses by the hardware, proxies, bank conflicts, time.
#pragma once
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "emulator/device.h"
#include "emulator/fiber.h"

namespace rnnfast::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Schedule { kRandom, kUniform, kFifo };  // random warp priorities; any thread, evenly; in order

struct Options {
  uint64_t seed = 1;
  Schedule schedule = Schedule::kRandom;
  // A poll gives up after this many rounds of all threads without a store, a barrier or an mma. A kernel has fewer
  // shuffles than that between two of these.
  uint64_t spin_rounds = 1000;
  // How many blocks fit the emulated device at once. A cooperative launch of more is refused.
  unsigned resident_blocks = 1u << 20;
};

Schedule schedule_named(const std::string& name);

// The options of all threads' launches from now on. Also restarts the random numbers. A program that never calls it
// gets the options from the environment: RNNFAST_EMULATOR_SEED, _SCHEDULE (random, uniform, fifo), _SPIN_ROUNDS and
// _RESIDENT_BLOCKS.
void configure(const Options& options);

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;  // blocks per cluster, along x
  bool cooperative = false;
  size_t shared_bytes = 0;
};

// Runs `body` once per thread. There is one launch at a time; other threads wait. Throws Error.
cudaError_t run(const Launch& launch, const std::function<void()>& body);
unsigned resident_blocks();

// --- The running thread
struct Block;
struct Warp;

// A copy_async under way. group: the number of copy_commit()s before it.
struct Copy {
  void* shared;
  const void* global;
  unsigned bytes;
  bool valid;
  int group;
};

struct Thread {
  dim3 thread_index, block_index;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  const char* waits_for = "";  // for the report of a deadlock
  uint64_t cluster_phase = 0;  // 1 + the phase of the cluster's barrier that this thread arrived at; 0: none
  uint64_t warp_barriers = 0;
  int copy_group = 0;
  std::vector<Copy> copies;
  Fiber fiber;
};

extern Thread* current;
extern dim3 grid_size, block_size;

// Ends the launch with an Error that names the thread.
[[noreturn]] void fail(const std::string& message);

// One round of a polling loop: lets others run; false when polling is hopeless. progress() says that something
// happened.
bool poll();
void progress();

// Call it before an access to memory that others write: at times it lets them run first. Returns a random number.
unsigned observe();

// --- Collectives of a warp. `compute` gets the arguments of all lanes, in order of lane.
using Collective = void (*)(void** arguments);
void collective(Collective compute, void* argument, const char* name);
void warp_barrier();

// --- Block and cluster
unsigned char* shared_memory();
unsigned cluster_rank();
void* map_to_rank(const void* shared, unsigned rank);
void block_barrier(unsigned id, unsigned threads, bool wait);
void cluster_arrive();
void cluster_wait();

// --- Asynchronous copies and mbarriers
void copy_async(void* shared, const void* global, unsigned bytes, bool valid);
void copy_commit();
void copy_wait(int pending);
void barrier_init(void* barrier, unsigned arrivals);
void barrier_arrive(void* barrier, unsigned expected_bytes);
void barrier_wait(void* barrier, unsigned parity);
bool barrier_try_wait(void* barrier, unsigned parity);
void store_async(void* remote, const void* value, unsigned bytes, void* remote_barrier);

}  // namespace rnnfast::emulator

#define threadIdx (::rnnfast::emulator::current->thread_index)
#define blockIdx (::rnnfast::emulator::current->block_index)
#define blockDim (::rnnfast::emulator::block_size)
#define gridDim (::rnnfast::emulator::grid_size)
