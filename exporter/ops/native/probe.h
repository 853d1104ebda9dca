// The kernels' elementary functions on arrays, for tests of their accuracy and for measuring what an exponential costs.
#pragma once

#include <stdint.h>

#include <vector>

namespace isthmus {

using Probe = void (*)(int function, const float* x, float* y, int64_t count, int64_t repeats);
const std::vector<Probe>& probes();  // generated; one a level

}  // namespace isthmus
