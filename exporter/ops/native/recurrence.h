// The matrix recurrence of linear attention in chunks of tokens, and the matrix products that it is made of.
//
// For each batch and head, with the state S (key, value):
//
//   S_t = e_t S_{t-1} + k_t v_t^T     y_t = S_t^T q_t
//
// is solved for CHUNK tokens at a time, so that the state is read and written once a chunk: with P_t the product of the decays e up to t,
//
//   y_t = (q_t P_t)^T S_0 + sum_{s<=t} (q_t . k_s, decayed since) v_s
//
// Decays are multiplied up token by token and never divided by, so that none is too long or too steep. Lanes are keys in the dot products
// and values everywhere else. The delta rules fit with beta_t (v_t - w_t) in place of v_t, where w_t is what k_t reads from e_t S_{t-1}.
#pragma once

#include "simd.h"

namespace isthmus::ISTHMUS_ISA {

constexpr int CHUNK = 8;

// out (rows, columns) = left (rows, depth) right (depth, columns), for ROWS rows and VECTORS vectors of columns.
template <int ROWS, int VECTORS>
ISTHMUS_INLINE void product_tile(float* out, int64_t out_stride, const float* left, int64_t left_stride, const float* right,
                                 int64_t right_stride, int64_t depth) {
  vfloat sums[ROWS][VECTORS] = {};
  for (int64_t i = 0; i < depth; ++i) {
    vfloat x[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) x[j] = load(right + i * right_stride + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[r][j] += x[j] * left[r * left_stride + i];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(out + r * out_stride + j * LANES, sums[r][j]);
}

template <int VECTORS>
ISTHMUS_INLINE void product_strip(float* out, int64_t out_stride, const float* left, int64_t left_stride, const float* right,
                                  int64_t right_stride, int64_t rows, int64_t depth) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    product_tile<4, VECTORS>(out + r * out_stride, out_stride, left + r * left_stride, left_stride, right, right_stride, depth);
  for (; r < rows; ++r)
    product_tile<1, VECTORS>(out + r * out_stride, out_stride, left + r * left_stride, left_stride, right, right_stride, depth);
}

// out = left right; columns are a multiple of LANES.
inline void product(float* out, int64_t out_stride, const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                    int64_t rows, int64_t depth, int64_t columns) {
  int64_t c = 0;
  for (; c + 2 * LANES <= columns; c += 2 * LANES)
    product_strip<2>(out + c, out_stride, left, left_stride, right + c, right_stride, rows, depth);
  if (c < columns) product_strip<1>(out + c, out_stride, left, left_stride, right + c, right_stride, rows, depth);
}

// S (rows, columns) = decay S + left^T right, where left is (depth, rows) and decay one number a row, or none.
template <int ROWS, int VECTORS>
ISTHMUS_INLINE void update_tile(float* S, int64_t stride, const float* decay, const float* left, int64_t left_stride, const float* right,
                                int64_t right_stride, int64_t depth) {
  vfloat sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      sums[r][j] = load(S + r * stride + j * LANES);
      if (decay) sums[r][j] *= decay[r];
    }
  for (int64_t i = 0; i < depth; ++i) {
    vfloat x[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) x[j] = load(right + i * right_stride + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[r][j] += x[j] * left[i * left_stride + r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(S + r * stride + j * LANES, sums[r][j]);
}

template <int VECTORS>
ISTHMUS_INLINE void update_strip(float* S, int64_t stride, const float* decay, const float* left, int64_t left_stride, const float* right,
                                 int64_t right_stride, int64_t rows, int64_t depth) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    update_tile<4, VECTORS>(S + r * stride, stride, decay ? decay + r : nullptr, left + r, left_stride, right, right_stride, depth);
  for (; r < rows; ++r)
    update_tile<1, VECTORS>(S + r * stride, stride, decay ? decay + r : nullptr, left + r, left_stride, right, right_stride, depth);
}

inline void update(float* S, int64_t stride, const float* decay, const float* left, int64_t left_stride, const float* right,
                   int64_t right_stride, int64_t rows, int64_t depth, int64_t columns) {
  int64_t c = 0;
  for (; c + 2 * LANES <= columns; c += 2 * LANES)
    update_strip<2>(S + c, stride, decay, left, left_stride, right + c, right_stride, rows, depth);
  if (c < columns) update_strip<1>(S + c, stride, decay, left, left_stride, right + c, right_stride, rows, depth);
}

ISTHMUS_INLINE float dot(const float* x, const float* y, int64_t padded) {
  vfloat total = load(x) * load(y);
  for (int64_t i = LANES; i < padded; i += LANES) total += load(x + i) * load(y + i);
  return sum(total);
}

enum class Rule {
  write,    // no removal: linear and gated
  correct,  // the delta rules: what the key reads from the decayed state is taken from the value
};

// The tensors of a call, (batch, length, heads * width) each, and its sizes.
struct Recurrence {
  Source q, k, v;
  Source decay;  // none for no decay
  Source beta;   // of the delta rules
  const float* initial;
  Target y;
  float* last;
  int64_t batch, length, heads, repeats, key, value, decays, betas;
  float scale;
};

// Where a task finds its numbers: rows are CHUNK tokens, `key` and `value` are rounded up to LANES.
struct Workspace {
  int64_t key, value;
  float *S, *P, *e, *k, *q, *a, *weights, *v, *w, *y;
};

// The rows of a token to come.
ISTHMUS_INLINE void ask(const Recurrence& s, int64_t row, int64_t first, int64_t width) {
  s.q.prefetch(row * s.repeats * s.key, s.repeats * s.key);
  s.k.prefetch(row * s.key, s.key);
  s.v.prefetch(row * s.value + first, width);
  if (s.decays > 1) s.decay.prefetch(row * s.key, s.key);
  for (int64_t r = 0; r < s.repeats; ++r) s.y.prefetch((row * s.repeats + r) * s.value + first, width);
}

// One head of one batch, for the values from `first` on, `width` of them.
template <Rule rule>
void solve(const Recurrence& s, int64_t batch, int64_t head, int64_t first, int64_t width, const Workspace& m) {
  const int64_t K = m.key, V = m.value;
  const int64_t state = (batch * s.heads + head) * s.key;
  for (int64_t i = 0; i < s.key; ++i) {
    for (int64_t j = 0; j < V; j += LANES) {
      store(m.S + i * V + j, s.initial ? load(s.initial + (state + i) * s.value + first + j, width - j) : vfloat{});
    }
  }
  for (int64_t start = 0; start < s.length; start += CHUNK) {
    const int tokens = static_cast<int>(smaller(CHUNK, s.length - start));
    // What the tokens of the chunk give each other: row t, column s <= t.
    float from_k[CHUNK][CHUNK], beta[CHUNK];
    for (int64_t i = 0; i < K; i += LANES) store(m.P + i, splat(1.0f));
    for (int t = 0; t < tokens; ++t) {
      const int64_t row = (batch * s.length + start + t) * s.heads + head;
      if (start + CHUNK + t < s.length) ask(s, row + CHUNK * s.heads, first, width);
      float* k = m.k + t * K;
      s.k.fetch(k, row * s.key, s.key, K);
      s.v.fetch(m.v + t * V, row * s.value + first, width, V);
      if (rule == Rule::correct) {
        const int64_t token = batch * s.length + start + t;
        beta[t] = s.beta.at(s.betas == 1 ? token : token * s.heads + head);
      }
      if (s.decay) {
        const bool one = s.decays == 1;
        const vfloat all_keys = one ? exp(splat(s.decay.at(row))) : vfloat{};
        if (!one) s.decay.fetch(m.e, row * s.key, s.key, K);
        for (int64_t i = 0; i < K; i += LANES) {
          const vfloat e = one ? all_keys : exp(load(m.e + i));
          store(m.P + i, load(m.P + i) * e);
          for (int u = 0; u < t; ++u) store(m.k + u * K + i, load(m.k + u * K + i) * e);
        }
      }
      if (rule == Rule::correct) {
        for (int u = 0; u < t; ++u) from_k[t][u] = dot(k, m.k + u * K, K);
        for (int64_t i = 0; i < K; i += LANES) store(m.a + t * K + i, load(k + i) * load(m.P + i));
      }
      for (int64_t r = 0; r < s.repeats; ++r) {
        float* q = m.q + (r * CHUNK + t) * K;
        float* weights = m.weights + (r * CHUNK + t) * CHUNK;
        s.q.fetch(q, (row * s.repeats + r) * s.key, s.key, K);
        for (int u = 0; u <= t; ++u) weights[u] = dot(q, m.k + u * K, K);
        if (s.decay)
          for (int64_t i = 0; i < K; i += LANES) store(q + i, load(q + i) * load(m.P + i));
      }
    }
    if (rule == Rule::correct) {
      product(m.w, V, m.a, K, m.S, V, tokens, s.key, V);
      for (int t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < V; j += LANES) {
          vfloat w = load(m.w + t * V + j);
          for (int u = 0; u < t; ++u) w += load(m.v + u * V + j) * from_k[t][u];
          store(m.v + t * V + j, (load(m.v + t * V + j) - w) * beta[t]);
        }
      }
    }
    for (int64_t r = 0; r < s.repeats; ++r) {
      product(m.y, V, m.q + r * CHUNK * K, K, m.S, V, tokens, s.key, V);
      for (int t = 0; t < tokens; ++t) {
        const float* weights = m.weights + (r * CHUNK + t) * CHUNK;
        float* y = m.y + t * V;
        for (int64_t j = 0; j < V; j += LANES) {
          vfloat total = load(y + j);
          for (int u = 0; u <= t; ++u) total += load(m.v + u * V + j) * weights[u];
          store(y + j, total * s.scale);
        }
        const int64_t row = (batch * s.length + start + t) * s.heads + head;
        s.y.put((row * s.repeats + r) * s.value + first, y, width);
      }
    }
    update(m.S, V, s.decay ? m.P : nullptr, m.k, K, m.v, V, s.key, tokens, V);
  }
  for (int64_t i = 0; i < s.key; ++i) {
    for (int64_t j = 0; j < V; j += LANES) store(s.last + (state + i) * s.value + first + j, load(m.S + i * V + j), width - j);
  }
}

// All heads. The columns of a state do not see each other: few heads, or states beyond the first cache, are cut along the values.
template <Rule rule>
void solve_all(const Call& call, const Recurrence& s) {
  constexpr int64_t MANY = 16, COLUMNS = 32, STATE = 8192;  // tasks; columns at least; floats
  int64_t columns = s.value;
  if (s.batch * s.heads < MANY || s.key * s.value > STATE) {
    columns = smaller(columns, s.key * COLUMNS > STATE || s.batch * s.heads < MANY ? COLUMNS : STATE / s.key / COLUMNS * COLUMNS);
  }
  const int64_t blocks = columns ? (s.value + columns - 1) / columns : 0, tasks = s.batch * s.heads * blocks;
  const int64_t K = round_up(s.key > 0 ? s.key : 1, LANES), V = round_up(columns, LANES);
  const int64_t sizes[] = {s.key * V, K, K, CHUNK * K, s.repeats * CHUNK * K, CHUNK * K, s.repeats * CHUNK * CHUNK,
                           CHUNK * V, CHUNK * V, CHUNK * V};
  int64_t total = 0;
  for (const int64_t size : sizes) total += round_up(size, 16);
  float* memory = scratch(call, tasks * total);
  parallel_for(call, tasks, [&](int64_t i) {
    const int64_t head = i / blocks % s.heads, batch = i / blocks / s.heads, first = i % blocks * columns;
    Workspace m;
    m.key = K;
    m.value = V;
    float* next = memory + i * total;
    float** const parts[] = {&m.S, &m.P, &m.e, &m.k, &m.q, &m.a, &m.weights, &m.v, &m.w, &m.y};
    for (int part = 0; part < 10; ++part) {
      *parts[part] = next;
      next += round_up(sizes[part], 16);
    }
    solve<rule>(s, batch, head, first, smaller(columns, s.value - first), m);
  });
}

}  // namespace isthmus::ISTHMUS_ISA
