// Chooses the clone for the machine, and forwards the C interface to it.
#include <algorithm>
#include <cstring>
#include <new>
#if defined(BITSTEP_HAVE_amx) || defined(BITSTEP_HAVE_avxvnni)
#include <cpuid.h>
#endif
#ifdef BITSTEP_HAVE_amx
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "clone.h"
#include "parallel.h"

namespace bitstep {
namespace {

#ifdef BITSTEP_HAVE_amx
// Whether the processor multiplies tiles of bytes, and the kernel lets this process use them.
bool amx_granted() {
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;  // of cpuid leaf 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kBytes) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#ifdef BITSTEP_HAVE_avxvnni
// Dot products of bytes in registers of 256 bits, which processors without AVX512 have too.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

struct Candidate {
  const char* name;
  const Clone* clone;
};

// The clones this machine can run, best first, ended by a null name.
struct Offer {
  Candidate candidates[7] = {};
  const char* names[7] = {};

  Offer() {
    int count = 0;
    const auto add = [&](const char* name, const Clone& clone) {
      names[count] = name;
      candidates[count++] = {name, &clone};
    };
#ifdef BITSTEP_HAVE_avx512
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef BITSTEP_HAVE_amx
      if (amx_granted()) add("amx", amx::clone);
#endif
      if (__builtin_cpu_supports("avx512vbmi")) add("avx512vbmi", avx512vbmi::clone);
      add("avx512", avx512::clone);
    }
#endif
#ifdef BITSTEP_HAVE_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#ifdef BITSTEP_HAVE_avxvnni
      if (has_avx_vnni()) add("avxvnni", avxvnni::clone);
#endif
      add("avx2", avx2::clone);
    }
#endif
    add("portable", portable::clone);
  }
};

const Offer& offer() {
  static const Offer made;
  return made;
}

const Clone*& current() {
  static const Clone* clone = offer().candidates[0].clone;
  return clone;
}

// A 1x1 convolution sees no neighbours: its pixels become many short rows, which are easier to share among threads.
bitstep_map in_short_rows(const bitstep_layer& layer, bitstep_map map) {
  const bool single = layer.kernel_h == 1 && layer.kernel_w == 1 && layer.stride_h == 1 && layer.stride_w == 1;
  const int64_t pixels = int64_t{map.height} * map.width;
  if (single && map.pad_h == 0 && map.pad_w == 0 && map.repeat == 1 && pixels <= INT32_MAX) {
    for (map.width = static_cast<int32_t>(std::min<int64_t>(pixels, 16)); pixels % map.width; --map.width) {}
    map.height = static_cast<int32_t>(pixels / map.width);
  }
  return map;
}

// Run body(clone); whether memory ran out, as no exception may leave a C function.
template <class Body>
int exhausted(const Body& body) {
  try {
    body(*current());
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
}  // namespace bitstep

using bitstep::current;
using bitstep::exhausted;

extern "C" {

const char* const* bitstep_instruction_sets(void) { return bitstep::offer().names; }

int bitstep_use(const char* instruction_set) {
  for (const auto* candidate = bitstep::offer().candidates; candidate->name; ++candidate) {
    if (!std::strcmp(candidate->name, instruction_set)) {
      current() = candidate->clone;
      return 0;
    }
  }
  return 1;
}

int bitstep_table(void) { return current()->table; }

int bitstep_convolution(const bitstep_layer* layer, const bitstep_map* map, const bitstep_prologue* prologue,
                        const bitstep_step* step, const float* x, const bitstep_epilogue* epilogue, float* y,
                        int threads) {
  using bitstep::scratch;
  using bitstep::Slot;
  return exhausted([&](const bitstep::Clone& clone) {
    const bitstep_map input = bitstep::in_short_rows(*layer, *map);
    bitstep_prologue before = prologue ? *prologue : bitstep_prologue{};
    if (before.groups) {
      const size_t count = size_t(input.batch) * input.channels;
      auto* gain = static_cast<float*>(scratch(Slot::kGroupNorm, 2 * count * sizeof(float)));
      clone.group_norm(input, before, x, gain, gain + count, threads);
      before.normalization = 0;
      before.gain = gain;
      before.shift = gain + count;
      before.rows = input.batch;
    }
    const size_t pixels = size_t(input.batch) * (input.height + 2 * input.pad_h) * (input.width + 2 * input.pad_w);
    auto* codes = static_cast<uint8_t*>(scratch(Slot::kCodes, pixels * input.padded_channels));
    clone.quantize(input, before, *step, x, codes, threads);
    clone.convolve(*layer, input, *step, codes, *epilogue, y, threads);
  });
}

int bitstep_attention(const bitstep_attention_shape* shape, const float* q, const float* k, const float* v, float* y,
                      int threads) {
  return exhausted([&](const bitstep::Clone& clone) { clone.attend(*shape, q, k, v, y, threads); });
}

int bitstep_coded_attention(const bitstep_attention_shape* shape, const bitstep_step* steps, const float* q,
                            const float* k, const float* v, float* y, int threads) {
  return exhausted([&](const bitstep::Clone& clone) { clone.attend_coded(*shape, steps, q, k, v, y, threads); });
}

int bitstep_fake_quantize(const bitstep_rows* rows, const float* x, float* y, int threads) {
  return exhausted([&](const bitstep::Clone& clone) { clone.fake_quantize(*rows, x, y, threads); });
}

int bitstep_fake_quantize_backward(const bitstep_rows* rows, const float* x, const float* grad, float* grad_x,
                                   float* grad_scale, float* grad_zero_point, int threads) {
  return exhausted([&](const bitstep::Clone& clone) {
    clone.fake_quantize_backward(*rows, x, grad, grad_x, grad_scale, grad_zero_point, threads);
  });
}

}  // extern "C"
