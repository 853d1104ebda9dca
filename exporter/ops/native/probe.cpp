// See probe.h.
#include "simd.h"

namespace isthmus::ISTHMUS_ISA {
namespace {

template <int function>
ISTHMUS_INLINE vfloat apply(vfloat x) {
  switch (function) {
    case 0: return exp(x);
    case 1: return exp2_product(x, splat(1.0f));
    case 2: return softplus(x);
    case 3: return silu(x);
    default: return exp2_product_near(x, splat(1.0f));
  }
}

template <int function>
void loop(const float* x, float* y, int64_t count, int64_t repeats) {
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(y + i, apply<function>(load(x + i)));
    if (i < count) store(y + i, apply<function>(load(x + i, count - i)), count - i);
  }
}

}  // namespace

void probe(int function, const float* x, float* y, int64_t count, int64_t repeats) {
  switch (function) {
    case 0: return loop<0>(x, y, count, repeats);
    case 1: return loop<1>(x, y, count, repeats);
    case 2: return loop<2>(x, y, count, repeats);
    case 3: return loop<3>(x, y, count, repeats);
    default: return loop<4>(x, y, count, repeats);
  }
}

}  // namespace isthmus::ISTHMUS_ISA
