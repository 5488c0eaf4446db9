// The emulator's machine: what a launch is, what the primitives of tests/emulator/primitives.h call.
//
// Every CUDA thread of the blocks that run together is a fiber, and only one fiber runs at a time: a kernel is ordinary
// C++ until it calls a primitive that waits. A primitive of a warp (mma, shuffle) is computed by the lane that comes
// last; lanes in different primitives are an error. What the hardware leaves open is made as bad as it may be:
//   - which warp runs next is random by seed. The default schedule gives warps random priorities, changes them now and
//     then, and lets a warp that polls fall behind the others: one warp runs far ahead, which a uniform choice never
//     shows;
//   - shared memory starts as NaN (0xFF); so does the destination of a copy_async until the thread waits for it;
//   - store_async arrives late and out of order, at the latest when nothing else can run;
//   - blocks of an ordinary launch run one cluster after the other, in random order; a cooperative grid runs as a
//   whole.
// Misuse (divergence, barriers, bounds), deadlock and trap() end the launch by throwing Error from launch() on the
// host. Not emulated: reordering of plain memory accesses by the hardware, proxies, bank conflicts, time.
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
  // A poll gives up after this many fruitless rounds of all threads: no store, barrier or mma happened meanwhile. More
  // than a kernel's shuffles between two of these.
  uint64_t spin_rounds = 1000;
  // How many blocks fit the pretended device at once; a cooperative launch of more is refused.
  unsigned resident_blocks = 1u << 20;
};

Schedule schedule_named(const std::string& name);

// The options of launches from now on, by any thread; also restarts the random numbers. A program that never calls it
// gets them from the environment: RNNFAST_EMULATOR_SEED, _SCHEDULE (random, uniform, fifo), _SPIN_ROUNDS and
// _RESIDENT_BLOCKS.
void configure(const Options& options);

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;  // blocks per cluster, along x
  bool cooperative = false;
  size_t shared_bytes = 0;
};

// Runs `body` once per thread. One launch at a time; the others wait. Throws Error.
cudaError_t run(const Launch& launch, const std::function<void()>& body);
unsigned resident_blocks();

// --- The running thread
struct Block;
struct Warp;

// A copy_async under way; `group` counts the copy_commit()s before it.
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

// One round of a polling loop: yields; false when polling is hopeless. progress() says that something happened.
bool poll();
void progress();

// Before an access to memory that others write meanwhile: now and then lets them run first. Returns a random number.
unsigned observe();

// --- Collectives of a warp: `compute` sees the arguments of all lanes, in order of lane.
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
