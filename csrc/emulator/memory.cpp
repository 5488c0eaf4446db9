// Asynchronous traffic: copy_async groups of each thread, store_async between blocks, mbarriers. See runtime.h.
#include <unordered_map>

#include "emulator/machine.h"

namespace rnnfast::emulator {

namespace {

// A phase completes when no arrival is missing (pending 0) and all announced bytes have come (bytes 0).
struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  std::vector<Thread*> waiters;
  char tags[2];
};

struct Store {
  void* destination;
  void* barrier;
  Block* block;  // whose memory it writes
  unsigned bytes;
  unsigned char value[16];
};

constexpr int64_t kMaxBarrierBytes = (1 << 20) - 1;  // the hardware's counter

std::unordered_map<void*, Mbarrier> barriers;
std::vector<Store> stores;
uint64_t deliver_every = 8;  // the schedule's choices per delivery; 0: only when nothing else can run

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

Mbarrier& find_barrier(void* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("mbarrier used before barrier_init");
  return found->second;
}

void own_barrier(void* address) {
  if (!current->block->contains(address, 8) || !aligned(address, 8)) {
    fail("mbarrier: not 8 aligned bytes of the block's shared memory");
  }
}

void complete_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  progress();
  for (Thread* thread : barrier.waiters) make_ready(thread);
  barrier.waiters.clear();
}

void deliver(size_t index) {
  const Store store = stores[index];
  stores[index] = stores.back();
  stores.pop_back();
  if (store.block->live == 0) end_launch("store_async arrives at a block that has exited");
  std::memcpy(store.destination, store.value, store.bytes);
  Mbarrier& barrier = find_barrier(store.barrier);
  barrier.bytes -= store.bytes;
  // Bytes may come before their announcement, but only in a phase that still waits for it.
  if (barrier.pending == 0 && barrier.bytes < 0) end_launch("mbarrier: more bytes arrived than were expected");
  progress();
  complete_phase(barrier);
}

}  // namespace

void memory_reset() {
  constexpr uint64_t kChoices[] = {2, 8, 64, 0};
  barriers.clear();
  stores.clear();
  deliver_every = kChoices[random_below(4)];
}

bool stores_under_way() { return !stores.empty(); }
bool unexpected_bytes() {
  return std::any_of(barriers.begin(), barriers.end(), [](const auto& entry) { return entry.second.bytes < 0; });
}

void deliver_one() { deliver(random_below(stores.size())); }
void deliver_sometimes() {
  if (!stores.empty() && deliver_every && random_below(deliver_every) == 0) deliver_one();
}

void copy_async(void* shared, const void* global, unsigned bytes, bool valid) {
  const Ignore ignore;
  if (!current->block->contains(shared, bytes)) fail("copy_async: destination outside the block's shared memory");
  if (!aligned(shared, bytes) || (valid && !aligned(global, bytes))) {
    fail("copy_async: not aligned to its " + std::to_string(bytes) + " bytes");
  }
  mark_write(shared, bytes);
  std::memset(shared, 0xFF, bytes);
  current->copies.push_back({shared, global, bytes, valid, current->copy_group});
}

void copy_commit() { ++current->copy_group; }

void copy_wait(int pending) {
  const Ignore ignore;
  auto& copies = current->copies;
  const int complete_before = current->copy_group - pending;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < complete_before; ++done) {
    const Copy& copy = copies[done];
    if (copy.valid) mark_read(copy.global, copy.bytes);
    mark_write(copy.shared, copy.bytes);
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(copy.shared, 0, copy.bytes);
    }
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

void barrier_init(void* address, unsigned arrivals) {
  const Ignore ignore;
  own_barrier(address);
  if (arrivals == 0) fail("barrier_init: at least one arrival");
  mark_write(address, 8);
  Mbarrier& barrier = barriers[address] = {};
  barrier.arrivals = barrier.pending = static_cast<int>(arrivals);
}

void barrier_arrive(void* address, unsigned expected_bytes) {
  const Ignore ignore;
  own_barrier(address);
  Mbarrier& barrier = find_barrier(address);
  release(&barrier.tags[barrier.phase & 1]);
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxBarrierBytes) fail("mbarrier: more than 2^20 - 1 bytes expected");
  if (--barrier.pending < 0) fail("mbarrier: more arrivals than barrier_init said");
  if (barrier.pending == 0 && barrier.bytes < 0) fail("mbarrier: more bytes arrived than were expected");
  complete_phase(barrier);
}

void barrier_wait(void* address, unsigned parity) {
  const Ignore ignore;
  own_barrier(address);
  if (parity > 1) fail("barrier_wait: parity is 0 or 1");
  Mbarrier& barrier = find_barrier(address);
  while ((barrier.phase & 1) == parity) {
    barrier.waiters.push_back(current);
    block_thread("barrier_wait");
  }
  acquire(&barrier.tags[parity]);
}

bool barrier_try_wait(void* address, unsigned parity) {
  const Ignore ignore;
  own_barrier(address);
  Mbarrier& barrier = find_barrier(address);
  if ((barrier.phase & 1) == parity) return false;
  acquire(&barrier.tags[parity]);
  return true;
}

void store_async(void* remote, const void* value, unsigned bytes, void* remote_barrier) {
  const Ignore ignore;
  Block* target = nullptr;
  for (Block* block : current->block->cluster->blocks) {
    if (block->contains(remote, bytes)) target = block;
  }
  if (!target) fail("store_async: destination outside the cluster's shared memory");
  if (!target->contains(remote_barrier, 8)) fail("store_async: data and mbarrier in different blocks");
  if (!aligned(remote, bytes)) fail("store_async: not aligned to its " + std::to_string(bytes) + " bytes");
  if (target->live == 0) fail("store_async to a block that has exited");
  Mbarrier& barrier = find_barrier(remote_barrier);
  // The bytes may land from now on: all reads of the old value must be over.
  mark_write(remote, bytes);
  release(&barrier.tags[barrier.phase & 1]);
  std::memset(remote, 0xFF, bytes);
  Store& store = stores.emplace_back(Store{remote, remote_barrier, target, bytes, {}});
  std::memcpy(store.value, value, bytes);
}

}  // namespace rnnfast::emulator
