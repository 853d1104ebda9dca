// The selective scan on a CPU; see __init__.py for the formulas.
//
// Lanes are channels. A task is a span of channels of one group, over all tokens. Time is cut into tiles and the span into blocks: a tile's
// rows of u, delta, B and C are converted into buffers that stay in the first caches, and the tile's y is gathered there. Within a tile, a
// few states of one vector of channels live in registers while the tokens pass by. The blocks of a task take turns, tile by tile: their
// rows share pages, and each visit of a page by one block alone would cost a walk through the page tables.
// Extra memory: the state and the decay of each block, O(batch channels state).
#include "schemas.h"
#include "simd.h"

namespace isthmus::ISTHMUS_ISA {
namespace {

namespace schema = schemas::selective_scan;

constexpr int BLOCK = 256;   // channels of a block at most
constexpr int SPAN = 2048;   // channels of a task at most
constexpr int LEAST = 64;    // channels of a task when there are more threads than that makes tasks
constexpr int VECTORS = BLOCK / LANES;
constexpr int TILE = 8;      // tokens of a tile
constexpr int ROW = BLOCK + 16;  // of a tile's buffers: a load at a multiple of 4 KiB from a store in flight waits for that store
constexpr int FLOATS = LINE / sizeof(float);  // in a line of the cache
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
  float delta[TILE][ROW], drive[TILE][ROW], y[TILE][ROW], z[BLOCK];
  float B[TILE][STATES], C[TILE][STATES];
};

// A token for STEP states of one vector of channels.
template <bool near>
ISTHMUS_INLINE void step(Tile& tile, int t, int j, int column, vfloat* states, const vfloat* decays) {
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

// A whole tile for STEP states of one vector of channels, or its first tokens. Unrolled, the exponentials of all tokens overlap.
template <bool near, bool whole>
ISTHMUS_INLINE void advance(Tile& tile, int tokens, int j, int column, float* h, const float* A) {
  vfloat states[STEP], decays[STEP];
#pragma GCC unroll 4
  for (int i = 0; i < STEP; ++i) {
    states[i] = load(h + i * BLOCK);
    decays[i] = load(A + i * BLOCK);
  }
  if (whole) {
#pragma GCC unroll 8
    for (int t = 0; t < TILE; ++t) step<near>(tile, t, j, column, states, decays);
  } else {
    for (int t = 0; t < tokens; ++t) step<near>(tile, t, j, column, states, decays);
  }
#pragma GCC unroll 4
  for (int i = 0; i < STEP; ++i) store(h + i * BLOCK, states[i]);
}

// Not inlined: GCC would move what this has in common with the whole and near tile to before the choice, which costs more than these calls.
__attribute__((noinline)) void advance_rare(Tile& tile, bool near, int tokens, int j, int column, float* h, const float* A) {
  if (near) {
    advance<true, false>(tile, tokens, j, column, h, A);
  } else {
    advance<false, false>(tile, tokens, j, column, h, A);
  }
}

// A block of the channels of a task, and what it keeps from tile to tile: h and A are (state, BLOCK), the state rounded up to STEP.
struct Block {
  int64_t b, group, first, width, padded;
  float *h, *A;
  float* steepest;  // of the decays of a channel; NaN where a decay is: then nothing is near

  int vectors() const { return static_cast<int>((width + LANES - 1) / LANES); }
  static int64_t size(int64_t padded) { return (2 * padded + 1) * BLOCK; }
};

void begin(const Scan& s, const Block& k) {
  memset(k.h, 0, sizeof(float) * Block::size(k.padded));
  for (int64_t c = 0; c < k.width; ++c) {
    const int64_t row = k.first + c;
    for (int64_t n = 0; n < s.state; ++n) {
      const float a = s.A[row * s.state + n] * LOG2E;
      k.A[n * BLOCK + c] = a;
      const float size = a < 0.0f ? -a : a;
      float& steepest = k.steepest[c];
      if (!(size <= steepest)) steepest = steepest == steepest ? size : steepest;
      if (s.initial) k.h[n * BLOCK + c] = s.initial[(k.b * s.channels + row) * s.state + n];
    }
  }
}

// The tokens from `start` on of one block. Every step asks for a share of the rows that come next: from token `next` and channel
// `next_first` on.
void scan_tile(const Scan& s, const Block& k, int64_t start, int64_t next, int64_t next_first, Tile& tile) {
  const int tokens = static_cast<int>(smaller(TILE, s.length - start)), vectors = k.vectors();
  const int ahead = static_cast<int>(smaller(TILE, s.length - next));
  vint near[VECTORS];
  for (int j = 0; j < vectors; ++j) near[j] = splat_int(-1);
  for (int t = 0; t < tokens; ++t) {
    const int64_t row = s.token(k.b, start + t) * s.channels + k.first;
    s.u.fetch(tile.drive[t], row, k.width, vectors * LANES);
    s.delta.fetch(tile.delta[t], row, k.width, vectors * LANES);
    for (int j = 0; j < vectors; ++j) {
      const int64_t channel = k.first + j * LANES, left = k.width - j * LANES;
      const vfloat u = load(&tile.drive[t][j * LANES]);
      vfloat delta = load(&tile.delta[t][j * LANES]);
      if (s.bias) delta += load(s.bias + channel, left);
      if (s.softplus) delta = softplus(delta);
      store(&tile.delta[t][j * LANES], delta);
      store(&tile.drive[t][j * LANES], delta * u);
      store(&tile.y[t][j * LANES], s.D ? load(s.D + channel, left) * u : vfloat{});
      near[j] &= magnitude(delta) * load(k.steepest + j * LANES) <= splat(NEAR);
    }
  }
  bool quick[VECTORS];
  for (int j = 0; j < vectors; ++j) quick[j] = all(near[j]);
  for (int64_t n = 0; n < k.padded; n += STATES) {
    const int64_t columns = smaller(STATES, s.state - n);
    for (int t = 0; t < tokens; ++t) {
      const int64_t row = (s.token(k.b, start + t) * s.groups + k.group) * s.state + n;
      s.B.fetch(tile.B[t], row, columns, STATES);
      s.C.fetch(tile.C[t], row, columns, STATES);
    }
    for (int64_t m = n; m < k.padded && m < n + STATES; m += STEP) {
      for (int j = 0; j < vectors; ++j) {
        for (int64_t t = m / STEP; j * LANES % FLOATS == 0 && t < ahead; t += k.padded / STEP) {
          const int64_t place = s.token(k.b, next + t) * s.channels + next_first + j * LANES;
          s.u.prefetch(place, 1);
          s.delta.prefetch(place, 1);
          s.y.prefetch(place, 1);
          if (s.z) s.z.prefetch(place, 1);
        }
        float* states = k.h + m * BLOCK + j * LANES;
        const float* decays = k.A + m * BLOCK + j * LANES;
        if (quick[j] && tokens == TILE) {
          advance<true, true>(tile, tokens, j * LANES, static_cast<int>(m - n), states, decays);
        } else {
          advance_rare(tile, quick[j], tokens, j * LANES, static_cast<int>(m - n), states, decays);
        }
      }
    }
  }
  for (int t = 0; t < tokens; ++t) {
    const int64_t row = s.token(k.b, start + t) * s.channels + k.first;
    if (s.z) {
      s.z.fetch(tile.z, row, k.width, vectors * LANES);
      for (int j = 0; j < vectors; ++j) {
        float* y = &tile.y[t][j * LANES];
        store(y, load(y) * silu(load(&tile.z[j * LANES])));
      }
    }
    s.y.put(row, tile.y[t], k.width);
  }
}

void end(const Scan& s, const Block& k) {
  for (int64_t c = 0; c < k.width; ++c) {
    for (int64_t n = 0; n < s.state; ++n) s.last[(k.b * s.channels + k.first + c) * s.state + n] = k.h[n * BLOCK + c];
  }
}

// The channels from `first` on, `width` of them, which lie in one group.
void scan(const Scan& s, int64_t b, int64_t group, int64_t first, int64_t width, float* memory) {
  const int64_t padded = round_up(s.state, STEP), count = (width + BLOCK - 1) / BLOCK;
  const auto block = [&](int64_t i) {
    float* h = memory + i * Block::size(padded);
    float* A = h + padded * BLOCK;
    return Block{b, group, first + i * BLOCK, smaller(BLOCK, width - i * BLOCK), padded, h, A, A + padded * BLOCK};
  };
  Tile tile;
  for (int64_t i = 0; i < count; ++i) begin(s, block(i));
  for (int64_t start = 0; start < s.length; start += TILE) {
    for (int64_t i = 0; i < count; ++i) {
      const bool turn = i + 1 == count;
      scan_tile(s, block(i), start, turn ? start + TILE : start, turn ? first : first + (i + 1) * BLOCK, tile);
    }
  }
  for (int64_t i = 0; i < count; ++i) end(s, block(i));
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
  int64_t span = SPAN;
  const auto spans = [&] { return (members + span - 1) / span; };
  while (span > LEAST && call.parallel.threads > 1 && s.batch * s.groups * spans() < 2 * call.parallel.threads) span /= 2;
  const int64_t parts = spans(), tasks = s.batch * s.groups * parts;
  const int64_t size = (smaller(span, members) + BLOCK - 1) / BLOCK * Block::size(round_up(s.state, STEP));
  float* memory = scratch(call, tasks * size);
  parallel_for(call, tasks, [&](int64_t i) {
    const int64_t b = i / (s.groups * parts), group = i / parts % s.groups, offset = i % parts * span;
    scan(s, b, group, group * members + offset, smaller(span, members - offset), memory + i * size);
  });
}

}  // namespace isthmus::ISTHMUS_ISA
