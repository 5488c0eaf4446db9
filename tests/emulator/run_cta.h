// C entry points of tier CTA in the emulator. sizes: cell, relu, H, P, T, B, D, N. data: offsets, lengths, then the
// pointers of ForwardLayer or BackwardLayer (csrc/cuda/layer.h) in order. Returns null or what went wrong.
#pragma once
#include <cstdint>

extern "C" {
const char* rnnfast_cta_forward(int arithmetic, const int64_t* sizes, void* const* data);
const char* rnnfast_cta_backward(int arithmetic, const int64_t* sizes, void* const* data);
// What a launch takes of an SM, by `sizes` as above.
void rnnfast_cta_resources(int arithmetic, const int64_t* sizes, int is_backward, int* threads, int* shared_bytes);
void rnnfast_cta_seed(uint64_t seed);
}
