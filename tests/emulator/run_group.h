// C entry points of tier group in the emulator; arguments as in run_cta.h.
#pragma once
#include <cstdint>

extern "C" {
const char* rnnfast_group_forward(int arithmetic, const int64_t* sizes, void* const* data);
const char* rnnfast_group_backward(int arithmetic, const int64_t* sizes, void* const* data);
// What a launch takes: threads and bytes of shared memory of a CTA, CTAs of a group, bytes of the exchange.
void rnnfast_group_resources(int arithmetic, const int64_t* sizes, int is_backward, int64_t* resources);
void rnnfast_group_seed(uint64_t seed);
// How many blocks fit the emulated device.
void rnnfast_group_device(unsigned resident_blocks);
}
