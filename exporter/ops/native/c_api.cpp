// The plain C interface, through which the torch operators and the tests use the kernels. Threads are made for each call.
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>

#include "operators.h"
#include "probe.h"

#define ISTHMUS_EXPORT extern "C" __attribute__((visibility("default")))

namespace isthmus {
namespace {

int fail(char* message, size_t capacity, const char* text) {
  if (message && capacity) snprintf(message, capacity, "%s", text);
  return 1;
}

struct Threads {
  size_t count;
};

void run_threads(void* host, size_t count, void (*body)(void*, size_t), void* state) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(state, i);
  };
  std::vector<std::thread> others;
  const size_t wanted = std::min(static_cast<Threads*>(host)->count, count);
  try {
    others.reserve(wanted);
    while (others.size() + 1 < wanted) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace
}  // namespace isthmus

// Runs an operator. Inputs, outputs and attributes are all of the schema's, in its order; an input that is not given has rank -1. Memory is
// the caller's, contiguous, and no output overlaps an input. Returns 0, or 1 and a message.
ISTHMUS_EXPORT int isthmus_run(const char* name, const isthmus_tensor* inputs, const isthmus_tensor* outputs,
                               const isthmus_attribute* attributes, int threads, char* message, size_t capacity) {
  using namespace isthmus;
  try {
    for (const Operator& op : operators()) {
      if (strcmp(op.name, name)) continue;
      Threads host{static_cast<size_t>(std::max(threads, 1))};
      execute(op, inputs, outputs, attributes, infer_sizes(op, inputs, attributes), Parallel{run_threads, &host, std::max(threads, 1)});
      return 0;
    }
    return fail(message, capacity, "there is no such operator");
  } catch (const Refusal& refusal) {
    return fail(message, capacity, refusal.message.c_str());
  } catch (const std::exception& error) {
    return fail(message, capacity, error.what());
  }
}

// Chooses the instruction set by name, or the best with "". Returns 0, or 1 and a message.
ISTHMUS_EXPORT int isthmus_choose_level(const char* name, char* message, size_t capacity) {
  using namespace isthmus;
  try {
    choose_level(name);
    return 0;
  } catch (const Refusal& refusal) {
    return fail(message, capacity, refusal.message.c_str());
  }
}

// The names of the instruction sets that this processor executes, separated by spaces, the one in use first. Returns 0, or 1 and a message.
ISTHMUS_EXPORT int isthmus_levels(char* message, size_t capacity) {
  using namespace isthmus;
  try {
    std::string names = levels()[current_level()].name;
    for (const Level& level : levels())
      if (level.executable()) names += std::string(" ") + level.name;
    fail(message, capacity, names.c_str());
    return 0;
  } catch (const Refusal& refusal) {
    return fail(message, capacity, refusal.message.c_str());
  }
}

// y[i] = f(x[i]) with a function of the kernels: 0 exp, 1 exp2, 2 softplus, 3 silu, 4 exp2 of exponents up to 125; `repeats` times, for measuring. Returns 0, or 1.
ISTHMUS_EXPORT int isthmus_probe(int function, const float* x, float* y, int64_t count, int64_t repeats) {
  using namespace isthmus;
  try {
    probes()[current_level()](function, x, y, count, repeats);
    return 0;
  } catch (const Refusal&) {
    return 1;
  }
}
