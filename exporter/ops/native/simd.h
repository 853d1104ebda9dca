// Vectors of floats, their conversions and their elementary functions, for the instruction set of this compilation.
//
// ISTHMUS_ISA is the namespace, ISTHMUS_LANES the number of floats in a vector. Everything is written with the vector extensions of GCC and
// Clang, so that one source serves every instruction set; intrinsics appear only where there is an instruction that compilers do not find.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "call.h"

namespace isthmus::ISTHMUS_ISA {

constexpr int LANES = ISTHMUS_LANES;

typedef float vfloat __attribute__((vector_size(ISTHMUS_LANES * 4)));
typedef int32_t vint __attribute__((vector_size(ISTHMUS_LANES * 4)));
typedef uint16_t vshort __attribute__((vector_size(ISTHMUS_LANES * 2)));

ISTHMUS_INLINE vfloat splat(float x) { return x - vfloat{}; }  // x + 0 would lose the sign of -0
ISTHMUS_INLINE vint splat_int(int32_t x) { return x - vint{}; }
ISTHMUS_INLINE vint as_int(vfloat x) { return reinterpret_cast<vint>(x); }
ISTHMUS_INLINE vfloat as_float(vint x) { return reinterpret_cast<vfloat>(x); }
ISTHMUS_INLINE vfloat magnitude(vfloat x) { return as_float(as_int(x) & 0x7fffffff); }

// Bounds that let NaN through: a comparison with NaN is false.
ISTHMUS_INLINE vfloat at_least(vfloat x, float low) {
#if defined(__AVX512F__) && ISTHMUS_LANES == 16
  return reinterpret_cast<vfloat>(_mm512_max_ps(_mm512_set1_ps(low), reinterpret_cast<__m512>(x)));  // the second operand if one is NaN
#elif defined(__AVX2__) && ISTHMUS_LANES == 8
  return reinterpret_cast<vfloat>(_mm256_max_ps(_mm256_set1_ps(low), reinterpret_cast<__m256>(x)));
#else
  return splat(low) > x ? splat(low) : x;
#endif
}
ISTHMUS_INLINE vfloat at_most(vfloat x, float high) {
#if defined(__AVX512F__) && ISTHMUS_LANES == 16
  return reinterpret_cast<vfloat>(_mm512_min_ps(_mm512_set1_ps(high), reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__) && ISTHMUS_LANES == 8
  return reinterpret_cast<vfloat>(_mm256_min_ps(_mm256_set1_ps(high), reinterpret_cast<__m256>(x)));
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

ISTHMUS_INLINE bool all(vint mask) {
  int64_t lanes = -1;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) lanes &= mask[i];
  return lanes != 0;
}

ISTHMUS_INLINE float sum(vfloat x) {
  constexpr int QUARTER = LANES / 4;
  typedef float quad __attribute__((vector_size(16)));
  quad parts[QUARTER];
  memcpy(parts, &x, sizeof(x));
#pragma GCC unroll 4
  for (int stride = QUARTER / 2; stride > 0; stride /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < stride; ++i) parts[i] += parts[i + stride];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// Loads and stores of LANES numbers, converted to float and back; rounding is to nearest, ties to even.

ISTHMUS_INLINE vfloat load(const float* p) {
  vfloat x;
  memcpy(&x, p, sizeof(x));
  return x;
}
ISTHMUS_INLINE void store(float* p, vfloat x) { memcpy(p, &x, sizeof(x)); }

ISTHMUS_INLINE vint load_short(const void* p) {
  vshort x;
  memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, vint);
}
ISTHMUS_INLINE void store_short(void* p, vint x) {
  const vshort narrow = __builtin_convertvector(x, vshort);
  memcpy(p, &narrow, sizeof(narrow));
}

ISTHMUS_INLINE vfloat load(const BFloat* p) { return as_float(load_short(p) << 16); }
ISTHMUS_INLINE void store(BFloat* p, vfloat x) {
  const vint bits = as_int(x);
  const vint rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  store_short(p, x != x ? splat_int(0x7fc0) : rounded);
}

ISTHMUS_INLINE vfloat load(const Half* p) {
#if defined(__AVX512F__) && ISTHMUS_LANES == 16
  return reinterpret_cast<vfloat>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && ISTHMUS_LANES == 8
  return reinterpret_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return reinterpret_cast<vfloat>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))));
#else
  // The exponent is rebiased by a product, which is exact and makes normal numbers of float16's subnormal ones.
  const vint bits = load_short(p);
  const vfloat value = as_float((bits & 0x7fff) << 13) * 0x1p112f;
  const vint special = (bits & 0x7c00) == 0x7c00;
  return as_float(as_int(value) | (special & 0x7f800000) | ((bits & 0x8000) << 16));
#endif
}
ISTHMUS_INLINE void store(Half* p, vfloat x) {
#if defined(__AVX512F__) && ISTHMUS_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && ISTHMUS_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(reinterpret_cast<float32x4_t>(x))));
#else
  const vint bits = as_int(x) & 0x7fffffff;
  const vint sign = (as_int(x) >> 16) & 0x8000;
  // Normal numbers: the carry of the rounding may run into the exponent, as it should, up to infinity.
  const vint normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Subnormal ones: the sum with 1/2 leaves them, rounded, in the last ten bits.
  const vint subnormal = as_int(as_float(bits) + 0.5f) - 0x3f000000;
  const vint special = bits > 0x7f800000 ? splat_int(0x7e00) : splat_int(0x7c00);
  const vint finite = bits < 0x38800000 ? subnormal : normal;
  store_short(p, (bits >= 0x47800000 ? special : finite) | sign);
#endif
}

// The first `count` lanes, the others zero.
template <class T>
ISTHMUS_INLINE vfloat load(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  T lanes[LANES] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
ISTHMUS_INLINE void store(T* p, vfloat x, int64_t count) {
  if (count >= LANES) return store(p, x);
  T lanes[LANES];
  store(lanes, x);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// Rows of activations, whose dtype is known when the program runs. A row is converted at a time, so that kernels are compiled once.

// Asks for the lines of `count` numbers from `offset` on, which are wanted soon. A block of channels or a head is a short piece of each
// token's row, and the next piece is on another page: no processor guesses it. A function that does nothing else has to be inlined: GCC
// takes one for a function without effects, and drops its calls.
constexpr int64_t LINE = 64;  // bytes
ISTHMUS_INLINE void prefetch(const void* data, int32_t dtype, int64_t offset, int64_t count) {
  const int64_t size = dtype == ISTHMUS_FLOAT32 ? 4 : 2;
  const char* from = static_cast<const char*>(data) + offset * size;
  for (int64_t i = 0; i < count * size; i += LINE) __builtin_prefetch(from + i, 0, 2);
}

struct Source {
  const void* data;  // null where the input is not given
  int32_t dtype;

  explicit operator bool() const { return data != nullptr; }

  // `count` numbers from `offset` on, then zeros up to `padded`, a multiple of LANES.
  void fetch(float* to, int64_t offset, int64_t count, int64_t padded) const {
    switch (dtype) {
      case ISTHMUS_FLOAT16: return convert(to, static_cast<const Half*>(data) + offset, count, padded);
      case ISTHMUS_BFLOAT16: return convert(to, static_cast<const BFloat*>(data) + offset, count, padded);
      default: return convert(to, static_cast<const float*>(data) + offset, count, padded);
    }
  }

  ISTHMUS_INLINE void prefetch(int64_t offset, int64_t count) const { ISTHMUS_ISA::prefetch(data, dtype, offset, count); }

  float at(int64_t offset) const {
    float lanes[LANES];
    fetch(lanes, offset, 1, LANES);
    return lanes[0];
  }

 private:
  template <class T>
  static void convert(float* to, const T* from, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; i += LANES) store(to + i, load(from + i, count - i));
  }
};

struct Target {
  void* data;
  int32_t dtype;

  ISTHMUS_INLINE void prefetch(int64_t offset, int64_t count) const { ISTHMUS_ISA::prefetch(data, dtype, offset, count); }

  // The first `count` numbers of `from`, which has a multiple of LANES, to `offset` and on.
  void put(int64_t offset, const float* from, int64_t count) const {
    switch (dtype) {
      case ISTHMUS_FLOAT16: return convert(static_cast<Half*>(data) + offset, from, count);
      case ISTHMUS_BFLOAT16: return convert(static_cast<BFloat*>(data) + offset, from, count);
      default: return convert(static_cast<float*>(data) + offset, from, count);
    }
  }

 private:
  template <class T>
  static void convert(T* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i), count - i);
  }
};

ISTHMUS_INLINE Source source(const Call& call, int input) { return {call.inputs[input].data, call.inputs[input].dtype}; }
ISTHMUS_INLINE Target target(const Call& call, int output) { return {call.outputs[output].data, call.outputs[output].dtype}; }

ISTHMUS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
ISTHMUS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Elementary functions. The polynomials are minimax in relative error, with their leading coefficients held at the exact values.

// The sum with this number rounds to an integer, and leaves it in the last bits.
constexpr float ROUND = 0x1.8p23f;
constexpr float LOG2E = 0x1.715476p0f;

// 2^f - for |f| <= 1/2, to 1.6 * 2^-24.
ISTHMUS_INLINE vfloat exp2_fraction(vfloat f) {
  vfloat p = f * 0.0013264727f + 0.009671513f;
  p = p * f + 0.055507336f;
  p = p * f + 0.24022242f;
  p = p * f + 0.693147f;
  return p * f + 1.0f;
}

// 2^(x y) for |x y| <= 125; the product is not rounded where there are fused operations.
ISTHMUS_INLINE vfloat exp2_product_near(vfloat x, vfloat y) {
  const vfloat rounded = x * y + ROUND;
  const vfloat n = rounded - ROUND;
  const vfloat f = x * y - n;
  return as_float(as_int(exp2_fraction(f)) + (as_int(rounded) << 23));
}

// 2^(x y) for every number: 0 below the normal numbers, NaN for NaN.
ISTHMUS_INLINE vfloat exp2_product(vfloat x, vfloat y) {
  const vfloat t = at_most(at_least(x * y, -127.0f), 128.0f);
  const vfloat rounded = t + ROUND;
  const vfloat f = t - (rounded - ROUND);
  return exp2_fraction(f) * as_float((as_int(rounded) << 23) + (127 << 23));
}

// e^x to 1 ulp: 0 below e^-86.98, infinity beyond float's range, NaN for NaN.
ISTHMUS_INLINE vfloat exp(vfloat x) {
  x = at_most(at_least(x, -87.5f), 89.5f);
  const vfloat rounded = x * LOG2E + ROUND;
  const vfloat n = rounded - ROUND;
  vfloat r = x - n * 0x1.62ep-1f;  // ln 2 in two parts; the first has so few bits that n times it is exact
  r = r - n * 0x1.0bfbe8p-15f;
  vfloat p = r * 0.0013814599f + 0.008368717f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r * r + r + 1.0f;
  // 2^128 is no float: twice 2^(n - 1).
  return (p + p) * as_float((as_int(rounded) << 23) + (126 << 23));
}

ISTHMUS_INLINE vfloat silu(vfloat x) { return x / (1.0f + exp(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), the latter through the series of 2 artanh(w / (2 + w)).
ISTHMUS_INLINE vfloat softplus(vfloat x) {
  const vfloat w = exp(-magnitude(x));
  const vfloat s = w / (2.0f + w);
  const vfloat s2 = s * s;
  vfloat p = s2 * 0.24289557f + 0.21430741f;
  p = p * s2 + 0.28616595f;
  p = p * s2 + 0.3999889f;
  p = p * s2 + 0.66666675f;
  return at_least(x, 0.0f) + (p * s2 * s + (s + s));
}

}  // namespace isthmus::ISTHMUS_ISA
