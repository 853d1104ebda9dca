// The causal convolution on a CPU; see __init__.py for the formulas.
//
// Lanes are tokens, which lie side by side. A task is a run of rows (one channel of one batch each); a row is converted tile by tile into a
// buffer that begins with the carry, so that every tap is one load at an offset.
#include "schemas.h"
#include "simd.h"

namespace isthmus::ISTHMUS_ISA {
namespace {

namespace schema = schemas::causal_conv1d;

constexpr int64_t TILE = 1024;  // tokens; a multiple of every number of lanes
constexpr int64_t WORK = 16384;  // products of a task, at least
constexpr int64_t NARROW = 64;   // widths up to here need no memory beyond the stack

struct Convolution {
  Source x, weight, bias, initial;
  Target y, last;
  int64_t batch, channels, length, width;
  bool silu;
};

// `buffer` holds the carry, a tile, and a vector more; `taps` the weights.
void convolve_row(const Convolution& s, int64_t row, float* buffer, float* taps) {
  const int64_t channel = row % s.channels, carry = s.width - 1;
  for (int64_t j = 0; j < s.width; ++j) taps[j] = s.weight.at(channel * s.width + j);
  const float bias = s.bias ? s.bias.at(channel) : 0.0f;
  for (int64_t j = 0; j < carry; ++j) buffer[j] = s.initial ? s.initial.at(row * carry + j) : 0.0f;
  float y[TILE];
  for (int64_t start = 0; start < s.length; start += TILE) {
    const int64_t tokens = s.length - start < TILE ? s.length - start : TILE;
    s.x.fetch(buffer + carry, row * s.length + start, tokens, (tokens + LANES - 1) / LANES * LANES);
    for (int64_t t = 0; t < tokens; t += LANES) {
      vfloat sum = splat(bias);
      for (int64_t j = 0; j < s.width; ++j) sum += load(buffer + t + j) * taps[j];
      store(y + t, s.silu ? silu(sum) : sum);
    }
    s.y.put(row * s.length + start, y, tokens);
    memmove(buffer, buffer + tokens, sizeof(float) * carry);
  }
  // The carry's numbers are copied as they are, so that none is rounded twice.
  const int64_t bytes = s.x.dtype == ISTHMUS_FLOAT32 ? 4 : 2;
  for (int64_t j = 0; j < carry; ++j) {
    const int64_t t = s.length - carry + j;
    char* to = static_cast<char*>(s.last.data) + (row * carry + j) * bytes;
    if (t >= 0) {
      memcpy(to, static_cast<const char*>(s.x.data) + (row * s.length + t) * bytes, bytes);
    } else if (s.initial) {
      memcpy(to, static_cast<const char*>(s.initial.data) + (row * carry + carry + t) * bytes, bytes);
    } else {
      memset(to, 0, bytes);
    }
  }
}

}  // namespace

void causal_conv1d(const Call& call) {
  Convolution s;
  s.x = source(call, schema::x);
  s.weight = source(call, schema::weight);
  s.bias = source(call, schema::bias);
  s.initial = source(call, schema::initial_state);
  s.y = target(call, schema::out_y);
  s.last = target(call, schema::out_last_state);
  s.batch = call.size(schema::size_batch);
  s.channels = call.size(schema::size_channels);
  s.length = call.size(schema::size_length);
  s.width = call.size(schema::size_width);
  s.silu = call.number(schema::attribute_silu) != 0.0;
  if (s.width < 2) refuse("causal_conv1d: weight has a width below 2");
  const int64_t rows = s.batch * s.channels, cost = s.length * s.width + 1;
  const int64_t run = cost < WORK ? WORK / cost : 1, tasks = (rows + run - 1) / run;
  const int64_t size = s.width * 2 + TILE + 2 * LANES;
  float* memory = s.width > NARROW ? scratch(call, tasks * size) : nullptr;
  parallel_for(call, tasks, [&](int64_t i) {
    float local[NARROW * 2 + TILE + 2 * LANES];
    float* taps = memory ? memory + i * size : local;
    // Lanes past the end of a row are computed from whatever is there: make it numbers.
    memset(taps, 0, sizeof(float) * size);
    for (int64_t row = i * run; row < rows && row < (i + 1) * run; ++row) convolve_row(s, row, taps + s.width, taps);
  });
}

}  // namespace isthmus::ISTHMUS_ISA
