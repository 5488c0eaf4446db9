// C entry points of tier cluster in the emulator. sizes: cell, relu, H, P, T, B, D, N. data: offsets, lengths, then the
// pointers of ForwardLayer or BackwardLayer (csrc/cuda/layer.h) in order. Returns null or what went wrong.
#pragma once
#include <cstdint>

extern "C" {
const char* rnnfast_cluster_forward(int arithmetic, const int64_t* sizes, void* const* data);
const char* rnnfast_cluster_backward(int arithmetic, const int64_t* sizes, void* const* data);
// What a launch takes of an SM, by `sizes` as above.
void rnnfast_cluster_resources(int arithmetic, const int64_t* sizes, int is_backward, int* threads, int* shared_bytes);
// Whether the device (here: the emulator) can run it: 1 or 0; -1 for an error.
int rnnfast_cluster_fits(int arithmetic, const int64_t* sizes, int is_backward);
void rnnfast_cluster_seed(uint64_t seed);
}
