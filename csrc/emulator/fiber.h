// One stackful coroutine: its saved stack pointer, and what ASan and TSan must know when it runs.
//
// x86-64 switches by a dozen instructions (fiber.cpp). Other machines, and RNNFAST_EMULATOR_UCONTEXT, use swapcontext.
// Sanitizer hooks are weak symbols, so one source serves every build. This code must be built without
// -fsanitize=thread: TSan must not look at the emulator's own bookkeeping.
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
  void* tsan_thread = nullptr;  // TSan's handle of this fiber
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

// `caller` calls this for a fiber that has finished or will never be resumed. The fiber's work is ordered before every
// acquire(tag).
void destroy_fiber(Fiber& fiber, Fiber& caller, void* tag);

// Memory for `count` stacks, kept from launch to launch. If they are not too many, each has an inaccessible page below
// it. After an error some fibers never end. release_stacks() gives their memory back, with what TSan knows of it.
char* reserve_stacks(size_t count);
void release_stacks();

// --- TSan: the order that a primitive gives, and accesses that the runtime makes for a thread. No-ops without TSan.
void release(void* tag);
void acquire(void* tag);
void mark_read(const void* address, size_t bytes);
void mark_write(void* address, size_t bytes);
bool race_detector();

// TSan ignores the runtime's accesses in this scope.
struct Ignore {
  Ignore();
  ~Ignore();
};

}  // namespace rnnfast::emulator
