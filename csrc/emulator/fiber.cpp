// Stack switching and the sanitizers' hooks; see fiber.h.
#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

extern "C" {
#define WEAK __attribute__((weak))
void* __tsan_get_current_fiber() WEAK;
void* __tsan_create_fiber(unsigned) WEAK;
void __tsan_destroy_fiber(void*) WEAK;
void __tsan_switch_to_fiber(void*, unsigned) WEAK;
void __tsan_acquire(void*) WEAK;
void __tsan_release(void*) WEAK;
void __tsan_write_range(void*, unsigned long) WEAK;
void __tsan_read_range(void*, unsigned long) WEAK;
void AnnotateIgnoreReadsBegin(const char*, int) WEAK;
void AnnotateIgnoreReadsEnd(const char*, int) WEAK;
void AnnotateIgnoreWritesBegin(const char*, int) WEAK;
void AnnotateIgnoreWritesEnd(const char*, int) WEAK;
void __sanitizer_start_switch_fiber(void**, const void*, size_t) WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) WEAK;
void __asan_unpoison_memory_region(void const volatile*, size_t) WEAK;
void rnnfast_emulator_switch(void** save, void* to);
}

#if !defined(RNNFAST_FIBER_UCONTEXT)
// Saves the registers that a call preserves on the old stack, loads those of the new stack, and returns there.
asm(R"(
  .text
  .globl rnnfast_emulator_switch
  .hidden rnnfast_emulator_switch
  .type rnnfast_emulator_switch,@function
rnnfast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size rnnfast_emulator_switch, .-rnnfast_emulator_switch
)");
#endif

namespace rnnfast::emulator {

namespace {

char* stacks = nullptr;
size_t stack_count = 0;

// The stack of the thread that called launch(). ASan reports it to the first fiber and needs it at the end.
const void* caller_stack = nullptr;
size_t caller_bytes = 0;
bool left_caller = false;

// A guarded stack takes two mappings. Linux allows a process 65530 of them.
constexpr size_t kMostGuards = 8192;

void finish_switch(void* asan_stack) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(asan_stack, &stack, &bytes);
  if (!left_caller) return;
  caller_stack = stack;
  caller_bytes = bytes;
  left_caller = false;
}

// Stacks lie a power of two apart. Without an offset, the hot ends of all would share a few sets of the cache.
size_t colour(size_t index) { return index % 61 * 192; }

}  // namespace

char* reserve_stacks(size_t count) {
  if (count <= stack_count) return stacks;
  if (stacks) release_stacks();
  void* memory =
      mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  stack_count = stacks ? count : 0;
  if (stacks && count <= kMostGuards) {
    for (size_t i = 0; i < count; ++i) mprotect(stacks + i * kStackBytes, sysconf(_SC_PAGESIZE), PROT_NONE);
  }
  return stacks;
}

void release_stacks() {
  munmap(stacks, stack_count * kStackBytes);
  stacks = nullptr;
  stack_count = 0;
}

void prepare_fiber(Fiber& fiber, char* stack, size_t index, void (*entry)()) {
  fiber = {};
  fiber.stack = stack;
  // The stack's previous user may not have left its frames: removes their red zones.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
  if (__tsan_create_fiber) fiber.tsan_thread = __tsan_create_fiber(0);
#if defined(RNNFAST_FIBER_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes - colour(index);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack + kStackBytes - colour(index));
  *--top = nullptr;  // the return address of `entry`: a function begins 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six saved registers
  fiber.stack_pointer = top;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (__tsan_switch_to_fiber) {
    if (!from.stack) from.tsan_thread = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_thread, 1);  // 1: switching orders nothing
  }
  if (__sanitizer_start_switch_fiber) {
    left_caller = !from.stack;
    __sanitizer_start_switch_fiber(from.finished ? nullptr : &from.asan_stack, to.stack ? to.stack : caller_stack,
                                   to.stack ? kStackBytes : caller_bytes);
  }
#if defined(RNNFAST_FIBER_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  rnnfast_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
  finish_switch(from.asan_stack);
}

void enter_fiber() { finish_switch(nullptr); }

void destroy_fiber(Fiber& fiber, Fiber& caller, void* tag) {
  if (!__tsan_destroy_fiber) return;
  if (fiber.finished) {
    __tsan_destroy_fiber(fiber.tsan_thread);
    return;
  }
  // TSan ends the process if a fiber is destroyed that stopped inside the runtime, in an Ignore scope. So it stays.
  __tsan_switch_to_fiber(fiber.tsan_thread, 1);
  __tsan_release(tag);
  __tsan_switch_to_fiber(caller.tsan_thread, 1);
}

void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}

void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}

bool race_detector() { return __tsan_create_fiber != nullptr; }

namespace {

void ignore_begin() {
  if (!AnnotateIgnoreReadsBegin) return;
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
}

void ignore_end() {
  if (!AnnotateIgnoreReadsEnd) return;
  AnnotateIgnoreReadsEnd("", 0);
  AnnotateIgnoreWritesEnd("", 0);
}

}  // namespace

Ignore::Ignore() { ignore_begin(); }
Ignore::~Ignore() { ignore_end(); }

void mark_read(const void* address, size_t bytes) {
  if (!__tsan_read_range) return;
  ignore_end();
  __tsan_read_range(const_cast<void*>(address), bytes);
  ignore_begin();
}

void mark_write(void* address, size_t bytes) {
  if (!__tsan_write_range) return;
  ignore_end();
  __tsan_write_range(address, bytes);
  ignore_begin();
}

}  // namespace rnnfast::emulator
