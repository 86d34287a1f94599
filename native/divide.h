// Division of counts, rounded up.
#pragma once

#include <cstdint>

namespace bitstep {
namespace {

constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
constexpr int64_t round_up(int64_t x, int64_t multiple) { return divide_up(x, multiple) * multiple; }

}  // namespace
}  // namespace bitstep
