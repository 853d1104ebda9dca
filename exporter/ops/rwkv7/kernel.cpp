// RWKV-7's time mixing on a CPU; see __init__.py for the formulas.
//
// One token after the other: the state is read and written once a token, and on the way gives y of this token and a^T S of the next. That
// is five operations for each number of the state. Chunks of tokens, as in native/recurrence.h, need four, and more than the fifth for what
// the tokens of a chunk give each other.
//
// Lanes are values. A task is a block of the values of some heads, over all tokens. Time is cut into tiles, whose rows are converted into
// buffers; a strip of the state stays in the first cache while the tokens of a tile pass by. The heads of a task take turns, tile by tile:
// their rows share pages, and each visit of a page by one head alone would cost a walk through the page tables.
#include "schemas.h"
#include "simd.h"

namespace isthmus::ISTHMUS_ISA {
namespace {

namespace schema = schemas::rwkv7;

constexpr int TILE = 8;          // tokens of a tile
constexpr int STRIP = 4;         // vectors of a strip: as many sums for y and for the next removal stay in registers
constexpr int64_t MANY = 16;     // tasks; few heads are cut along the values, whose columns do not see each other
constexpr int64_t FEW = 32;      // values of a task then
constexpr int64_t COLUMNS = 64;  // and otherwise: rows of the state that lie farther apart would share their cache sets
constexpr int64_t GROUP = 8;     // heads of a task
constexpr int64_t STATES = 1 << 15;  // floats of its states, which stay in the second cache

struct Mixing {
  Source r, decay, k, v, a, b;
  const float* initial;
  Target y;
  float* last;
  int64_t batch, length, heads, key, value;

  // The rows of a token to come, for the values from `first` on.
  ISTHMUS_INLINE void ask(int64_t row, int64_t first, int64_t width) const {
    const Source of_keys[] = {r, decay, k, a, b};
    for (const Source& x : of_keys) x.prefetch(row * key, key);
    v.prefetch(row * value + first, width);
    y.prefetch(row * value + first, width);
  }
};

// S is (keys, columns) for each head of the task, the others are (TILE, keys) and (TILE, columns).
struct Workspace {
  int64_t keys, columns;
  float *S, *r, *e, *k, *a, *b, *v, *y;
};

// The tokens of a tile for VECTORS vectors of columns, from `column` on.
template <int VECTORS, class Ask>
ISTHMUS_INLINE void advance(const Workspace& m, int tokens, int64_t keys, int64_t column, const Ask& ask) {
  vfloat w[VECTORS] = {};
  for (int64_t i = 0; i < keys; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) w[j] += load(m.S + i * m.columns + column + j * LANES) * m.a[i];
  }
  for (int t = 0; t < tokens; ++t) {
    ask(t);
    const float *r = m.r + t * m.keys, *e = m.e + t * m.keys, *k = m.k + t * m.keys, *b = m.b + t * m.keys;
    const float* a = m.a + (t + 1 < tokens ? t + 1 : t) * m.keys;  // what it gives after the last token, nobody reads
    vfloat v[VECTORS], y[VECTORS] = {}, next[VECTORS] = {};
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) v[j] = load(m.v + t * m.columns + column + j * LANES);
    float* S = m.S + column;
    for (int64_t i = 0; i < keys; ++i, S += m.columns) {
      const vfloat ei = splat(e[i]), ki = splat(k[i]), bi = splat(b[i]), ri = splat(r[i]), ai = splat(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        const vfloat state = load(S + j * LANES) * ei + (w[j] * bi + v[j] * ki);
        store(S + j * LANES, state);
        y[j] += state * ri;
        next[j] += state * ai;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      store(m.y + t * m.columns + column + j * LANES, y[j]);
      w[j] = next[j];
    }
  }
}

// Some heads of one batch, for the values from `first` on, `width` of them.
void mix(const Mixing& s, int64_t batch, int64_t head, int64_t heads, int64_t first, int64_t width, Workspace m) {
  const auto row_of = [&](int64_t t, int64_t h) { return (batch * s.length + t) * s.heads + head + h; };
  const int64_t keys = s.key, state = (batch * s.heads + head) * keys, rows = heads * keys;
  float* const states = m.S;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < m.columns; j += LANES) {
      store(states + i * m.columns + j, s.initial ? load(s.initial + (state + i) * s.value + first + j, width - j) : vfloat{});
    }
  }
  for (int64_t start = 0; start < s.length; start += TILE) {
    const int tokens = static_cast<int>(smaller(TILE, s.length - start));
    for (int64_t h = 0; h < heads; ++h) {
      m.S = states + h * keys * m.columns;
      for (int t = 0; t < tokens; ++t) {
        const int64_t row = row_of(start + t, h);
        s.r.fetch(m.r + t * m.keys, row * keys, keys, m.keys);
        s.k.fetch(m.k + t * m.keys, row * keys, keys, m.keys);
        s.a.fetch(m.a + t * m.keys, row * keys, keys, m.keys);
        s.b.fetch(m.b + t * m.keys, row * keys, keys, m.keys);
        s.v.fetch(m.v + t * m.columns, row * s.value + first, width, m.columns);
        float* e = m.e + t * m.keys;
        s.decay.fetch(e, row * keys, keys, m.keys);
        for (int64_t i = 0; i < m.keys; i += LANES) store(e + i, exp(load(e + i)));
      }
      // Each strip asks for some tokens of the next head, or of the first head's next tile.
      const int64_t strips = (m.columns + STRIP * LANES - 1) / (STRIP * LANES);
      const int64_t next = h + 1 < heads ? start : start + TILE, next_head = h + 1 < heads ? h + 1 : 0;
      for (int64_t column = 0; column < m.columns;) {
        const int64_t vectors = (m.columns - column) / LANES, strip = column / (STRIP * LANES);
        const auto ask = [&](int t) __attribute__((always_inline)) {
          if (t % strips == strip && next + t < s.length) s.ask(row_of(next + t, next_head), first, width);
        };
        if (vectors >= STRIP) {
          advance<STRIP>(m, tokens, keys, column, ask);
          column += STRIP * LANES;
        } else if (vectors >= 2) {
          advance<2>(m, tokens, keys, column, ask);
          column += 2 * LANES;
        } else {
          advance<1>(m, tokens, keys, column, ask);
          column += LANES;
        }
      }
      for (int t = 0; t < tokens; ++t) s.y.put(row_of(start + t, h) * s.value + first, m.y + t * m.columns, width);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < m.columns; j += LANES) {
      store(s.last + (state + i) * s.value + first + j, load(states + i * m.columns + j), width - j);
    }
  }
}

}  // namespace

void rwkv7(const Call& call) {
  Mixing s;
  s.r = source(call, schema::r);
  s.decay = source(call, schema::decay);
  s.k = source(call, schema::k);
  s.v = source(call, schema::v);
  s.a = source(call, schema::a);
  s.b = source(call, schema::b);
  s.initial = call.input<float>(schema::initial_state);
  s.y = target(call, schema::out_y);
  s.last = call.output<float>(schema::out_last_state);
  s.batch = call.size(schema::size_batch);
  s.length = call.size(schema::size_length);
  s.heads = call.size(schema::size_num_heads);
  s.key = call.size(schema::size_key);
  s.value = call.size(schema::size_value);
  const int64_t columns = smaller(s.value, s.batch * s.heads < MANY ? FEW : COLUMNS);
  const int64_t blocks = columns ? (s.value + columns - 1) / columns : 0;
  const int64_t K = round_up(s.key, LANES), V = round_up(columns, LANES);
  // Halved until every thread has two tasks; no result depends on it.
  int64_t group = GROUP, groups = 0;
  for (;; group /= 2) {
    groups = (s.heads + group - 1) / group;
    if (group == 1 || (s.batch * groups * blocks >= 2 * call.parallel.threads && group * s.key * V <= STATES)) break;
  }
  const int64_t states = round_up(group * s.key * V, 16), keys = TILE * round_up(K, 16), values = TILE * round_up(V, 16);
  const int64_t tasks = s.batch * groups * blocks, total = states + 5 * keys + 2 * values;
  float* memory = scratch(call, tasks * total);
  parallel_for(call, tasks, [&](int64_t i) {
    float *S = memory + i * total, *r = S + states, *v = r + 5 * keys;
    const Workspace m = {K, V, S, r, r + keys, r + 2 * keys, r + 3 * keys, r + 4 * keys, v, v + values};
    const int64_t first = i % blocks * columns, head = i / blocks % groups * group;
    mix(s, i / blocks / groups, head, smaller(group, s.heads - head), first, smaller(columns, s.value - first), m);
  });
}

}  // namespace isthmus::ISTHMUS_ISA
