// Work shared among the threads of the process's own OpenMP runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitstep {

// Run body(context, begin, end) over a partition of [0, count) into at most `threads` contiguous ranges.
void parallel(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* context);

template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  parallel(
      count, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// Memory of the calling thread that lives until it asks again for the same slot; 64-byte aligned, contents undefined.
// std::bad_alloc where there is none, which parallel hands on from its threads.
enum class Slot {
  kCodes, kGroupNorm, kMoments, kPanel, kTables, kOffsets, kFactors, kKeys, kKeySteps, kKeySums, kValues,
  kValueSteps, kValueSums, kQueryRows, kQueries, kMixed, kPowers, kOrigins, kGradients, kCount
};
void* scratch(Slot slot, size_t bytes);

}  // namespace bitstep
