// Chooses the clone for the machine, and forwards the C interface to it.
#include <cstring>
#include <new>

#include "clone.h"
#include "parallel.h"

namespace bitstep {
namespace {

struct Candidate {
  const char* name;
  const Clone* clone;
};

// The clones this machine can run, best first, ended by a null name.
struct Offer {
  Candidate candidates[4] = {};
  const char* names[4] = {};

  Offer() {
    int count = 0;
    const auto add = [&](const char* name, const Clone& clone) {
      names[count] = name;
      candidates[count++] = {name, &clone};
    };
#ifdef BITSTEP_HAVE_avx512
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      add("avx512", avx512::clone);
    }
#endif
#ifdef BITSTEP_HAVE_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add("avx2", avx2::clone);
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

int bitstep_convolution(const bitstep_layer* layer, const bitstep_map* map, const bitstep_prologue* prologue,
                        const bitstep_step* step, const float* x, const bitstep_epilogue* epilogue, float* y,
                        int threads) {
  using bitstep::scratch;
  using bitstep::Slot;
  return exhausted([&](const bitstep::Clone& clone) {
    bitstep_prologue before = prologue ? *prologue : bitstep_prologue{};
    if (before.groups) {
      const size_t count = size_t(map->batch) * map->channels;
      auto* gain = static_cast<float*>(scratch(Slot::kGroupNorm, 2 * count * sizeof(float)));
      clone.group_norm(*map, before, x, gain, gain + count, threads);
      before.normalization = 0;
      before.gain = gain;
      before.shift = gain + count;
      before.rows = map->batch;
    }
    const size_t pixels = size_t(map->batch) * (map->height + 2 * map->pad_h) * (map->width + 2 * map->pad_w);
    auto* codes = static_cast<uint8_t*>(scratch(Slot::kCodes, pixels * map->padded_channels));
    clone.quantize(*map, before, *step, x, codes, threads);
    clone.convolve(*layer, *map, *step, codes, *epilogue, y, threads);
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
