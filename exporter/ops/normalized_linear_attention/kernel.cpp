// SANA's normalised linear attention on a CPU; see __init__.py for the formula.
//
// Lanes are values. A task is a block of value columns of one head: it sums the products of keys and values over all tokens, and then
// multiplies the queries with the sum. One more column of values, all ones, makes the sum of the keys, and with it the normaliser.
#include "recurrence.h"
#include "schemas.h"

namespace isthmus::ISTHMUS_ISA {
namespace {

namespace schema = schemas::normalized_linear_attention;

constexpr int64_t TILE = 32;     // tokens
constexpr int64_t COLUMNS = 64;  // columns of a task
constexpr int64_t MANY = 16;     // tasks, below which columns are cut finer

struct Normalized {
  Source q, k, v;
  Target y;
  int64_t batch, length, tokens, heads, key, value;
  float eps;
};

ISTHMUS_INLINE void features(float* row, int64_t padded) {
  for (int64_t i = 0; i < padded; i += LANES) store(row + i, at_least(load(row + i), 0.0f));
}

// S is (key, V), rows of keys or queries (TILE, K), of values and results (TILE, V); the ones stand in column `width`.
void attend_block(const Normalized& s, int64_t batch, int64_t head, int64_t first, int64_t width, int64_t K, int64_t V, float* S,
                  float* keys, float* values) {
  memset(S, 0, sizeof(float) * s.key * V);
  for (int64_t start = 0; start < s.tokens; start += TILE) {
    const int64_t tokens = smaller(TILE, s.tokens - start);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row = (batch * s.tokens + start + t) * s.heads + head;
      s.k.fetch(keys + t * K, row * s.key, s.key, K);
      features(keys + t * K, K);
      s.v.fetch(values + t * V, row * s.value + first, width, V);
      values[t * V + width] = 1.0f;
    }
    update(S, V, nullptr, keys, K, values, V, s.key, tokens, V);
  }
  for (int64_t start = 0; start < s.length; start += TILE) {
    const int64_t tokens = smaller(TILE, s.length - start);
    for (int64_t t = 0; t < tokens; ++t) {
      s.q.fetch(keys + t * K, ((batch * s.length + start + t) * s.heads + head) * s.key, s.key, K);
      features(keys + t * K, K);
    }
    product(values, V, keys, K, S, V, tokens, s.key, V);
    for (int64_t t = 0; t < tokens; ++t) {
      float* y = values + t * V;
      const float normaliser = y[width] + s.eps;
      for (int64_t j = 0; j < width; j += LANES) store(y + j, load(y + j) / normaliser);
      s.y.put(((batch * s.length + start + t) * s.heads + head) * s.value + first, y, width);
    }
  }
}

}  // namespace

void normalized_linear_attention(const Call& call) {
  Normalized s;
  s.q = source(call, schema::q);
  s.k = source(call, schema::k);
  s.v = source(call, schema::v);
  s.y = target(call, schema::out_y);
  s.batch = call.size(schema::size_batch);
  s.length = call.size(schema::size_length);
  s.tokens = call.size(schema::size_tokens);
  s.heads = call.size(schema::size_num_heads);
  s.key = call.size(schema::size_key);
  s.value = call.size(schema::size_value);
  s.eps = static_cast<float>(call.number(schema::attribute_eps));
  if (!(s.eps >= 0.0f)) refuse("normalized_linear_attention: eps is below 0");
  const int64_t columns = smaller(s.value, s.batch * s.heads < MANY ? COLUMNS / 2 : COLUMNS);
  const int64_t blocks = columns ? (s.value + columns - 1) / columns : 0, tasks = s.batch * s.heads * blocks;
  const int64_t K = round_up(s.key > 0 ? s.key : 1, LANES), V = round_up(columns + 1, LANES);
  const int64_t state = round_up(s.key * V, 16), keys = round_up(TILE * K, 16), total = state + keys + round_up(TILE * V, 16);
  float* memory = scratch(call, tasks * total);
  parallel_for(call, tasks, [&](int64_t i) {
    const int64_t head = i / blocks % s.heads, batch = i / blocks / s.heads, first = i % blocks * columns;
    float* S = memory + i * total;
    attend_block(s, batch, head, first, smaller(columns, s.value - first), K, V, S, S + state, S + state + keys);
  });
}

}  // namespace isthmus::ISTHMUS_ISA
