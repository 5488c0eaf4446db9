// One stackful coroutine: its saved stack pointer and what ASan and TSan must be told when it runs.
//
// x86-64 switches by a dozen instructions (fiber.cpp); elsewhere, and with RNNFAST_EMULATOR_UCONTEXT, by swapcontext.
// Sanitizer hooks are weak symbols, so that one source serves every build. This code must itself be built without
// -fsanitize=thread: the emulator's own bookkeeping is not what TSan shall look at.
#pragma once
#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(RNNFAST_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define RNNFAST_FIBER_UCONTEXT 1
#endif

namespace rnnfast::emulator {

// A kernel's frames are small, but ASan puts wide red zones around every local array.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kStackBytes = 256 << 10;
#else
inline constexpr size_t kStackBytes = 64 << 10;
#endif

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;        // lowest usable byte; null for the fiber that called launch()
  void* asan_stack = nullptr;   // ASan's shadow of the locals while the fiber is switched out
  void* tsan_thread = nullptr;  // TSan's idea of this fiber
  bool finished = false;
#if defined(RNNFAST_FIBER_UCONTEXT)
  ucontext_t context;
#endif
};

// Makes `fiber` start in `entry`, which never returns, on `stack` of kStackBytes.
void prepare_fiber(Fiber& fiber, char* stack, size_t index, void (*entry)());

// Leaves `from` and runs `to`. Returns when somebody switches back.
void switch_fiber(Fiber& from, Fiber& to);

// Must be the first statement of `entry`.
void enter_fiber();

// Called by `caller` for a fiber that has finished or will never be resumed. What it did was before whoever acquires
// `tag`.
void destroy_fiber(Fiber& fiber, Fiber& caller, void* tag);

// Memory for `count` stacks, kept from launch to launch; each has an inaccessible page below it where there are not too
// many. After an error some fibers never end: their stacks are given back, so that nobody inherits what TSan knows.
char* reserve_stacks(size_t count);
void release_stacks();

// --- TSan: ordering that a primitive gives, and accesses that the runtime makes for a thread. No-ops without TSan.
void release(void* tag);
void acquire(void* tag);
void mark_read(const void* address, size_t bytes);
void mark_write(void* address, size_t bytes);
bool race_detector();

// TSan ignores what the runtime does in this scope.
struct Ignore {
  Ignore();
  ~Ignore();
};

}  // namespace rnnfast::emulator
