// What follows from the schemas for every operator alike: sizes from shapes, checks, the choice of the instruction set, scratch memory.
#include "operators.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace isthmus {

struct Arena {
  struct Free {
    void operator()(void* p) const { free(p); }
  };
  std::vector<std::unique_ptr<void, Free>> blocks;
};

float* scratch(const Call& call, int64_t count) {
  size_t bytes = 0;
  if (count < 0 || __builtin_mul_overflow(static_cast<size_t>(count), sizeof(float), &bytes) || bytes > SIZE_MAX / 2) throw std::bad_alloc();
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<size_t>(bytes, 64))) throw std::bad_alloc();
  call.arena->blocks.emplace_back(memory);
  return static_cast<float*>(memory);
}

void refuse(const char* message) { throw Refusal{message}; }

namespace {

std::string text(const Operator& op, const Dimension& dim) {
  std::string result;
  for (int i = 0; i < dim.count; ++i) result += (i ? "*" : "") + std::string(op.sizes[dim.factors[i]]);
  if (!dim.count) result = std::to_string(dim.constant);
  return dim.less ? result + "-" + std::to_string(dim.less) : result;
}

[[noreturn]] void mismatch(const Operator& op, const Argument& a, int axis, int64_t got, const std::string& expected) {
  throw Refusal{std::string(op.name) + ": " + a.name + " has " + std::to_string(got) + " on axis " + std::to_string(axis) + ", expected " +
                expected + " (" + text(op, a.shape[axis]) + ")"};
}

int64_t times(const Operator& op, int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) throw Refusal{std::string(op.name) + ": sizes overflow"};
  return product;
}

void unify(const Operator& op, const Argument& a, int axis, int64_t got, std::vector<int64_t>& sizes, const std::vector<bool>& set) {
  const Dimension& dim = a.shape[axis];
  int64_t known = dim.constant;
  int missing = -1, missing_count = 0;
  for (int i = 0; i < dim.count; ++i) {
    if (sizes[dim.factors[i]] == UNKNOWN) {
      missing = dim.factors[i];
      ++missing_count;
    } else {
      known = times(op, known, sizes[dim.factors[i]]);
    }
  }
  if (got == UNKNOWN || missing_count > 1) return;
  if (missing_count == 0) {
    if (got != known - dim.less) mismatch(op, a, axis, got, std::to_string(known - dim.less));
    return;
  }
  // A size that was seen, and is unknown, is symbolic: whatever follows from this axis may be less than what it stands for.
  if (dim.count > 1 || dim.less) {
    if (set[missing]) return;
    if (dim.less) {
      sizes[missing] = got + dim.less;
      return;
    }
    if (known == 0 || got % known) mismatch(op, a, axis, got, "a multiple of " + std::to_string(known));
    sizes[missing] = got / known;
  } else {
    sizes[missing] = got;
  }
}

}  // namespace

std::vector<int64_t> infer_sizes(const Operator& op, const isthmus_tensor* inputs, const isthmus_attribute* attributes) {
  std::vector<int64_t> sizes(op.sizes.size(), UNKNOWN);
  std::vector<bool> set(op.sizes.size(), false);
  for (size_t i = 0; i < op.attributes.size(); ++i) {
    if (op.attributes[i].size < 0) continue;
    const double value = attributes[i].number;
    if (!(value >= 1 && value <= 1 << 30)) {
      throw Refusal{std::string(op.name) + ": " + op.attributes[i].name + " is " + std::to_string(value) + ", expected at least 1"};
    }
    sizes[op.attributes[i].size] = static_cast<int64_t>(value);
    set[op.attributes[i].size] = true;
  }
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    const Argument& a = op.inputs[i];
    if (inputs[i].rank < 0) {
      if (!a.optional) throw Refusal{std::string(op.name) + ": " + a.name + " is missing"};
    } else if (inputs[i].rank != a.rank) {
      throw Refusal{std::string(op.name) + ": " + a.name + " has " + std::to_string(inputs[i].rank) + " axes, expected " +
                    std::to_string(a.rank)};
    }
  }
  // Plain names first: a product needs all but one of its factors.
  for (const bool plain : {true, false}) {
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      for (int axis = 0; axis < inputs[i].rank; ++axis) {
        const Dimension& dim = op.inputs[i].shape[axis];
        if ((dim.count <= 1 && !dim.less) != plain) continue;
        unify(op, op.inputs[i], axis, inputs[i].shape[axis], sizes, set);
        if (plain && dim.count == 1) set[dim.factors[0]] = true;
      }
    }
  }
  return sizes;
}

std::vector<int64_t> output_shape(const Argument& output, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> shape;
  for (int axis = 0; axis < output.rank; ++axis) {
    const Dimension& dim = output.shape[axis];
    int64_t value = dim.constant;
    for (int i = 0; i < dim.count && value != UNKNOWN; ++i) {
      const int64_t factor = sizes[dim.factors[i]];
      if (factor == UNKNOWN || __builtin_mul_overflow(value, factor, &value)) value = UNKNOWN;
    }
    shape.push_back(value == UNKNOWN ? UNKNOWN : value - dim.less);
  }
  return shape;
}

std::vector<int64_t> bounded_shape(const Operator& op, const Argument& output, const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> shape = output_shape(output, sizes);
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0) throw Refusal{std::string(op.name) + ": the inputs do not determine the shape of " + output.name};
    if (__builtin_mul_overflow(count, size, &count) || count > LARGEST) {
      throw Refusal{std::string(op.name) + ": " + output.name + " would have more than 2^40 numbers"};
    }
  }
  return shape;
}

void execute(const Operator& op, const isthmus_tensor* inputs, const isthmus_tensor* outputs, const isthmus_attribute* attributes,
             const std::vector<int64_t>& sizes, const Parallel& parallel) {
  const int32_t dtype = inputs[0].dtype;
  if (dtype != ISTHMUS_FLOAT32 && dtype != ISTHMUS_FLOAT16 && dtype != ISTHMUS_BFLOAT16) {
    throw Refusal{std::string(op.name) + ": " + op.inputs[0].name + " has element type " + std::to_string(dtype) +
                  ", expected float32 (1), float16 (10) or bfloat16 (16)"};
  }
  const auto check = [&](const Argument& a, const isthmus_tensor& tensor) {
    const int32_t expected = a.wide ? static_cast<int32_t>(ISTHMUS_FLOAT32) : dtype;
    if (tensor.rank >= 0 && tensor.dtype != expected) {
      throw Refusal{std::string(op.name) + ": " + a.name + " has element type " + std::to_string(tensor.dtype) + ", expected " +
                    std::to_string(expected)};
    }
  };
  for (size_t i = 0; i < op.inputs.size(); ++i) check(op.inputs[i], inputs[i]);
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    check(op.outputs[i], outputs[i]);
    const std::vector<int64_t> shape = bounded_shape(op, op.outputs[i], sizes);
    if (outputs[i].rank != op.outputs[i].rank || !std::equal(shape.begin(), shape.end(), outputs[i].shape, outputs[i].shape + outputs[i].rank)) {
      throw Refusal{std::string(op.name) + ": the output " + op.outputs[i].name + " does not have the shape that the inputs imply"};
    }
  }
  Arena arena;
  const Call call = {inputs, outputs, attributes, sizes.data(), parallel, &arena};
  op.kernels[current_level()](call);
}

// The instruction set.

namespace {

bool always() { return true; }

#if ISTHMUS_X86_LEVELS
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

size_t find_level(const std::string& name) {
  for (size_t i = 0; i < levels().size(); ++i) {
    if (name != levels()[i].name) continue;
    if (levels()[i].executable()) return i;
    throw Refusal{"this processor does not execute " + name};
  }
  std::string known;
  for (const Level& level : levels()) known += std::string(known.empty() ? "" : ", ") + level.name;
  throw Refusal{"there is no instruction set '" + name + "' in this library; it has " + known};
}

size_t best_level() {
  size_t best = 0;
  for (size_t i = 0; i < levels().size(); ++i)
    if (levels()[i].executable() && strcmp(levels()[i].name, "avx2x16")) best = i;
  return best;
}

std::atomic<int> chosen{-1};

}  // namespace

const std::vector<Level>& levels() {
  static const std::vector<Level> all = {
      {"baseline", always},
#if ISTHMUS_X86_LEVELS
      {"avx2", has_avx2},
      // The vectors of AVX-512 made of pairs of AVX2's: for tests of its code on processors that lack it. Never chosen by itself.
      {"avx2x16", has_avx2},
      {"avx512", has_avx512},
#endif
  };
  return all;
}

size_t current_level() {
  const int level = chosen.load(std::memory_order_relaxed);
  if (level >= 0) return static_cast<size_t>(level);
  const char* wanted = getenv("ISTHMUS_OPS_ISA");
  const size_t found = wanted && *wanted ? find_level(wanted) : best_level();
  chosen.store(static_cast<int>(found), std::memory_order_relaxed);
  return found;
}

void choose_level(const std::string& name) {
  chosen.store(static_cast<int>(name.empty() ? best_level() : find_level(name)), std::memory_order_relaxed);
}

}  // namespace isthmus
