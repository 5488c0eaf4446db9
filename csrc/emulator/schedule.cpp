// Which thread runs next: three policies over one set of ready threads. Why warps get priorities: see runtime.h.
#include <deque>
#include <set>
#include <utility>

#include "emulator/machine.h"

namespace rnnfast::emulator {

namespace {

// One in this many choices gives a random warp a new priority. A short kernel sees a few changes.
constexpr uint64_t kChangeEvery = 512;
constexpr uint64_t kMiddle = uint64_t{1} << 40;

Schedule schedule = Schedule::kRandom;
uint64_t random_state = 1;
std::vector<Warp*> all_warps;
std::set<std::pair<uint64_t, Warp*>> ready_warps;  // kRandom
std::deque<Thread*> ready_threads;                 // kUniform, kFifo
uint64_t lowest = kMiddle;                         // priorities of demoted warps count down from here

uint64_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Dull;
}

void set_priority(Warp* warp, uint64_t priority) {
  if (warp->ready) ready_warps.erase({warp->priority, warp});
  warp->priority = priority;
  if (warp->ready) ready_warps.insert({priority, warp});
}

int random_lane(uint32_t lanes) {
  const int shift = static_cast<int>(random_below(32));
  const uint32_t turned = lanes >> shift | (shift ? lanes << (32 - shift) : 0);
  return (__builtin_ctz(turned) + shift) & 31;
}

}  // namespace

uint64_t random_below(uint64_t limit) { return (random_bits() >> 32) % limit; }

void schedule_start(const Options& options) {
  schedule = options.schedule;
  random_state = (options.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 8; ++i) random_bits();  // neighbouring seeds begin with similar numbers
}

void schedule_reset(std::vector<Warp*> warps) {
  all_warps = std::move(warps);
  ready_warps.clear();
  ready_threads.clear();
  lowest = kMiddle;
  for (Warp* warp : all_warps) warp->priority = kMiddle + 1 + random_below(kMiddle);
}

void make_ready(Thread* thread) {
  if (schedule != Schedule::kRandom) {
    ready_threads.push_back(thread);
    return;
  }
  Warp* warp = thread->warp;
  if (!warp->ready) ready_warps.insert({warp->priority, warp});
  warp->ready |= 1u << thread->lane;
}

void demote(Warp* warp) {
  if (schedule == Schedule::kRandom) set_priority(warp, --lowest);
}

Thread* next_thread() {
  if (schedule == Schedule::kRandom) {
    if (ready_warps.empty()) return nullptr;
    if (random_below(kChangeEvery) == 0) {
      set_priority(all_warps[random_below(all_warps.size())], kMiddle + 1 + random_below(kMiddle));
    }
    const auto highest = std::prev(ready_warps.end());
    Warp* warp = highest->second;
    const int lane = random_lane(warp->ready);
    warp->ready &= ~(1u << lane);
    if (!warp->ready) ready_warps.erase(highest);
    return warp->threads[lane];
  }
  if (ready_threads.empty()) return nullptr;
  if (schedule == Schedule::kUniform) {
    std::swap(ready_threads[random_below(ready_threads.size())], ready_threads.front());
  }
  Thread* thread = ready_threads.front();
  ready_threads.pop_front();
  return thread;
}

}  // namespace rnnfast::emulator
