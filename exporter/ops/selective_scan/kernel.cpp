// The selective scan on a CPU; see __init__.py for the formulas.
//
// Lanes are channels. A task is a block of channels of one group, over all tokens. Time is cut into tiles: the tile's rows of u, delta, B
// and C are converted into buffers that stay in the first cache, and the tile's y is gathered there. Within a tile, a few states of
// one vector of channels live in registers while the tokens pass by. Extra memory: the state and the decay of each block, O(batch channels state).
#include "schemas.h"
#include "simd.h"

namespace isthmus::ISTHMUS_ISA {
namespace {

namespace schema = schemas::selective_scan;

constexpr int BLOCK = 256;   // channels of a task at most: long rows stream well, and rows of one task often share their cache sets
constexpr int LEAST = 64;    // channels of a task when there are more threads than that makes tasks
constexpr int VECTORS = BLOCK / LANES;
constexpr int TILE = 8;      // tokens of a tile
constexpr int STATES = 16;   // columns of B and C that are converted at once
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int STEP = 2;      // states in registers, of which there are 16
#else
constexpr int STEP = 4;      // of which there are 32
#endif
constexpr float NEAR = 125.0f;  // exponents up to which `exp2_product_near` is right

struct Scan {
  Source u, delta, B, C, z;
  const float *A, *D, *bias, *initial;
  Target y;
  float* last;
  int64_t batch, length, channels, state, groups;
  bool softplus, reverse;

  // The i-th token that is visited, as a row of (batch * length).
  int64_t token(int64_t b, int64_t i) const { return b * length + (reverse ? length - 1 - i : i); }
};

struct alignas(64) Tile {
  float delta[TILE][BLOCK], drive[TILE][BLOCK], y[TILE][BLOCK], z[BLOCK];
  float B[TILE][STATES], C[TILE][STATES];
};

// The tokens of a tile for STEP states of one vector of channels.
template <bool near>
ISTHMUS_INLINE void advance(Tile& tile, int tokens, int j, int column, float* h, const float* A) {
  vfloat states[STEP], decays[STEP];
#pragma GCC unroll 4
  for (int i = 0; i < STEP; ++i) {
    states[i] = load(h + i * BLOCK);
    decays[i] = load(A + i * BLOCK);
  }
  for (int t = 0; t < tokens; ++t) {
    const vfloat delta = load(&tile.delta[t][j]), drive = load(&tile.drive[t][j]);
    vfloat y = load(&tile.y[t][j]);
#pragma GCC unroll 4
    for (int i = 0; i < STEP; ++i) {
      const vfloat decay = near ? exp2_product_near(delta, decays[i]) : exp2_product(delta, decays[i]);
      states[i] = decay * states[i] + drive * tile.B[t][column + i];
      y += states[i] * tile.C[t][column + i];
    }
    store(&tile.y[t][j], y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < STEP; ++i) store(h + i * BLOCK, states[i]);
}

// One block of channels: those from `first` on, `width` of them. h and A are (state, BLOCK), the state rounded up to STEP.
void scan_block(const Scan& s, int64_t b, int64_t group, int64_t first, int64_t width, float* h, float* A) {
  const int64_t padded = (s.state + STEP - 1) / STEP * STEP;
  const int vectors = static_cast<int>((width + LANES - 1) / LANES);
  memset(h, 0, sizeof(float) * padded * BLOCK);
  memset(A, 0, sizeof(float) * padded * BLOCK);
  alignas(64) float steepest[BLOCK] = {};  // NaN where a decay is: then nothing is near
  for (int64_t c = 0; c < width; ++c) {
    const int64_t row = first + c;
    for (int64_t n = 0; n < s.state; ++n) {
      const float a = s.A[row * s.state + n] * LOG2E;
      A[n * BLOCK + c] = a;
      const float size = a < 0.0f ? -a : a;
      if (!(size <= steepest[c])) steepest[c] = steepest[c] == steepest[c] ? size : steepest[c];
      if (s.initial) h[n * BLOCK + c] = s.initial[(b * s.channels + row) * s.state + n];
    }
  }
  vfloat skip[VECTORS], bias[VECTORS];
  for (int j = 0; j < vectors; ++j) {
    skip[j] = s.D ? load(s.D + first + j * LANES, width - j * LANES) : vfloat{};
    bias[j] = s.bias ? load(s.bias + first + j * LANES, width - j * LANES) : vfloat{};
  }
  Tile tile;
  for (int64_t start = 0; start < s.length; start += TILE) {
    const int tokens = static_cast<int>(s.length - start < TILE ? s.length - start : TILE);
    vint near[VECTORS];
    for (int j = 0; j < vectors; ++j) near[j] = splat_int(-1);
    for (int t = 0; t < tokens; ++t) {
      const int64_t row = s.token(b, start + t) * s.channels + first;
      s.u.fetch(tile.drive[t], row, width, vectors * LANES);
      s.delta.fetch(tile.delta[t], row, width, vectors * LANES);
      for (int j = 0; j < vectors; ++j) {
        const vfloat u = load(&tile.drive[t][j * LANES]);
        vfloat delta = load(&tile.delta[t][j * LANES]) + bias[j];
        if (s.softplus) delta = softplus(delta);
        store(&tile.delta[t][j * LANES], delta);
        store(&tile.drive[t][j * LANES], delta * u);
        store(&tile.y[t][j * LANES], skip[j] * u);
        near[j] &= magnitude(delta) * load(steepest + j * LANES) <= splat(NEAR);
      }
    }
    bool quick[VECTORS];
    for (int j = 0; j < vectors; ++j) quick[j] = all(near[j]);
    for (int64_t n = 0; n < padded; n += STATES) {
      const int64_t columns = s.state - n < STATES ? s.state - n : STATES;
      for (int t = 0; t < tokens; ++t) {
        const int64_t row = (s.token(b, start + t) * s.groups + group) * s.state + n;
        s.B.fetch(tile.B[t], row, columns, STATES);
        s.C.fetch(tile.C[t], row, columns, STATES);
      }
      for (int64_t m = n; m < padded && m < n + STATES; m += STEP) {
        for (int j = 0; j < vectors; ++j) {
          float* states = h + m * BLOCK + j * LANES;
          const float* decays = A + m * BLOCK + j * LANES;
          if (quick[j]) {
            advance<true>(tile, tokens, j * LANES, static_cast<int>(m - n), states, decays);
          } else {
            advance<false>(tile, tokens, j * LANES, static_cast<int>(m - n), states, decays);
          }
        }
      }
    }
    for (int t = 0; t < tokens; ++t) {
      const int64_t row = s.token(b, start + t) * s.channels + first;
      if (s.z) {
        s.z.fetch(tile.z, row, width, vectors * LANES);
        for (int j = 0; j < vectors; ++j) {
          float* y = &tile.y[t][j * LANES];
          store(y, load(y) * silu(load(&tile.z[j * LANES])));
        }
      }
      s.y.put(row, tile.y[t], width);
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t n = 0; n < s.state; ++n) s.last[(b * s.channels + first + c) * s.state + n] = h[n * BLOCK + c];
  }
}

}  // namespace

void selective_scan(const Call& call) {
  Scan s;
  s.u = source(call, schema::u);
  s.delta = source(call, schema::delta);
  s.B = source(call, schema::B);
  s.C = source(call, schema::C);
  s.z = source(call, schema::z);
  s.y = target(call, schema::out_y);
  s.A = call.input<float>(schema::A);
  s.D = call.input<float>(schema::D);
  s.bias = call.input<float>(schema::delta_bias);
  s.initial = call.input<float>(schema::initial_state);
  s.last = call.output<float>(schema::out_last_state);
  s.batch = call.size(schema::size_batch);
  s.length = call.size(schema::size_length);
  s.channels = call.size(schema::size_channels);
  s.state = call.size(schema::size_state);
  s.groups = call.size(schema::size_groups);
  s.softplus = call.number(schema::attribute_delta_softplus) != 0.0;
  s.reverse = call.number(schema::attribute_reverse) != 0.0;
  if (s.groups == 0 || s.channels % s.groups) refuse("selective_scan: the groups of B and C do not divide the channels");
  const int64_t members = s.channels / s.groups;
  // Halved until every thread has two tasks. Vectors and tiles stay what they are, so that no result depends on it.
  int64_t block = BLOCK;
  while (block > LEAST && s.batch * s.groups * ((members + block - 1) / block) < 2 * call.parallel.threads) block /= 2;
  const int64_t blocks = (members + block - 1) / block;
  const int64_t tasks = s.batch * s.groups * blocks, size = (s.state + STEP - 1) / STEP * STEP * BLOCK;
  float* memory = scratch(call, tasks * size * 2);
  parallel_for(call, tasks, [&](int64_t i) {
    const int64_t b = i / (s.groups * blocks), group = i / blocks % s.groups, offset = i % blocks * block;
    const int64_t width = members - offset < block ? members - offset : block;
    scan_block(s, b, group, group * members + offset, width, memory + i * size * 2, memory + i * size * 2 + size);
  });
}

}  // namespace isthmus::ISTHMUS_ISA
