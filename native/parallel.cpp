#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "bitstep.h"

namespace bitstep {
namespace {

// libgomp's entry point for a parallel region: run fn(data) on a team of `threads`. Calling the runtime that torch
// has loaded, rather than linking one, leaves a single pool of threads in the process.
using Fork = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<Fork> fork_team{nullptr};
// OpenMP's omp_get_thread_num and omp_get_num_threads.
std::atomic<int (*)()> thread_number{nullptr}, team_size{nullptr};

struct Region {
  int64_t count;
  int parts;
  void (*body)(void*, int64_t, int64_t);
  void* context;
  std::atomic<bool> exhausted{false};
};

void work(void* data) {
  auto& region = *static_cast<Region*>(data);
  // The same thread has the same part of every map, which then stays in its core's cache from layer to layer. A team
  // may be smaller than asked for.
  const int team = team_size.load(std::memory_order_relaxed)();
  try {
    for (int part = thread_number.load(std::memory_order_relaxed)(); part < region.parts; part += team) {
      region.body(region.context, region.count * part / region.parts, region.count * (part + 1) / region.parts);
    }
  } catch (const std::bad_alloc&) {  // may not leave its thread
    region.exhausted = true;
  }
}

struct Buffer {
  size_t size = 0;
  std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
};

}  // namespace

void parallel(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  const Fork fork = fork_team.load(std::memory_order_relaxed);
  const int parts = static_cast<int>(std::min<int64_t>(count, threads));
  if (parts <= 1 || !fork) return body(context, 0, count);
  Region region{count, parts, body, context};
  fork(work, &region, static_cast<unsigned>(parts), 0);
  if (region.exhausted) throw std::bad_alloc();
}

void* scratch(Slot slot, size_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes) {
    const size_t size = (bytes + 4095) / 4096 * 4096;
    buffer = {};
    buffer.data.reset(std::aligned_alloc(64, size));
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data.get();
}

}  // namespace bitstep

extern "C" void bitstep_set_threads(void* fork, void* number, void* size) {
  bitstep::thread_number = reinterpret_cast<int (*)()>(number);
  bitstep::team_size = reinterpret_cast<int (*)()>(size);
  bitstep::fork_team = reinterpret_cast<bitstep::Fork>(fork);
}
