// The three products of the sparse feed-forward network, with gathers before and sums after them in the cache.
//
// T tokens, H hidden, E experts of N neurons. C rows: token copies sorted by expert, inside an expert by token; expert e
// has rows [first[e], first[e + 1]). Tensors of rows are [C + 32, padded(N)].
//
// Everything is added up in an order that neither the number of threads nor the tasks they take change.

#pragma once

#include <cstring>

#include "parallel.h"

constexpr int64_t CACHED_BYTES = 1 << 20;  // of a source or of sums that are read and written out of order
constexpr int64_t MOST_COLUMNS = 256;
constexpr int64_t ROWS_AHEAD = 24;  // that are asked for before they are gathered

struct Rows {
  int64_t tokens, hidden, size, experts, width;
  const int32_t *token, *first;
  int64_t threads;
};

// The rows of an expert whose tokens are in [token, token + tokens).
struct Range {
  int64_t begin, end;
};

inline Range rows_of(const Rows& rows, int64_t expert, int64_t token, int64_t tokens) {
  const int32_t *begin = rows.token + rows.first[expert], *end = rows.token + rows.first[expert + 1];
  begin = std::lower_bound(begin, end, token);
  return {begin - rows.token, std::lower_bound(begin, end, token + tokens) - rows.token};
}

// How many experts as full as the fullest would have all rows: tasks by expert are that many at the most at once.
inline int64_t full_experts(const Rows& rows) {
  int64_t most = 1;
  for (int64_t e = 0; e < rows.experts; e++) most = std::max<int64_t>(most, rows.first[e + 1] - rows.first[e]);
  return std::max<int64_t>(1, rows.first[rows.experts] / most);
}

// out[row] = source[its token] w^T + bias, then ReLU if `relu`. With `outputs` of ReLU instead, out is a gradient: it
// is 0 where they are, and dgates[copy of the row] = sum over the neurons of gradient * output.
template <class T>
void up(const Rows& rows, const T* source, const T* w, const T* bias, bool relu, const T* outputs,
        const int32_t* copy, float* dgates, T* out) {
  int64_t hidden = rows.hidden, depth = padded(hidden), width = rows.width;
  int64_t tile = std::max<int64_t>(256, 2 * CACHED_BYTES / (hidden * sizeof(T)));
  while (tile > 256 && rows.tokens * full_experts(rows) < 4 * rows.threads * tile) tile /= 2;
  int64_t tiles = (rows.tokens + tile - 1) / tile;
  in_parallel<T>(tiles * rows.experts, rows.threads, [&](int64_t task) {
    int64_t expert = task % rows.experts;
    Range range = rows_of(rows, expert, task / rows.experts * tile, tile);
    if (range.begin == range.end) return;
    T* panels = scratch<T>(0, width * depth);
    for (int64_t n = 0; n < width; n += BLOCK)
      pack_columns(w + (expert * rows.size + n) * hidden, hidden, rows.size - n, hidden, panels + n * depth);
    T* gathered = scratch<T>(1, BLOCK * depth);
    float* c = scratch<float>(2, 2 * BLOCK * BLOCK);
    float* biases = scratch<float>(3, width);
    for (int64_t n = 0; bias && n < width; n += BLOCK)
      store(biases + n, load(bias + expert * rows.size + n, first_columns(rows.size - n)));
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t row = range.begin; row < range.end; row += BLOCK) {
      int64_t count = std::min(BLOCK, range.end - row);
      for (int64_t i = 0; i < count; i++)
        copy_padded(source + rows.token[row + i] * hidden, hidden, gathered + i * depth);
      __m512 parts[BLOCK];
      std::fill_n(parts, BLOCK, zero);
      auto use = [&](int64_t i, int64_t n, Pair v) {
        if (bias) v = sum_of(v, load(biases + n));
        if (relu) v = {_mm512_max_ps(zero, v.low), _mm512_max_ps(zero, v.high)};
        if (outputs) {
          Pair o = load(outputs + (row + i) * width + n);
          parts[i] = _mm512_fmadd_ps(v.low, o.low, _mm512_fmadd_ps(v.high, o.high, parts[i]));
          v.low = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(o.low, zero, _CMP_NLE_UQ), v.low);
          v.high = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(o.high, zero, _CMP_NLE_UQ), v.high);
        }
        store(out + (row + i) * width + n, v);
      };
      Products<T, decltype(use)> products(c, use);
      for (int64_t n = 0; n < width; n += BLOCK) {
        for (int64_t i = n * BLOCK / width; i < (n + BLOCK) * BLOCK / width; i++)
          if (row + BLOCK + i < range.end) prefetch(source + rows.token[row + BLOCK + i] * hidden, hidden);
        products.add(gathered, depth, panels + n * depth, depth, 0, count, n);
      }
      products.finish();
      if (dgates) {
        float sums[BLOCK];
        sum_rows(parts, sums);
        sum_rows(parts + 16, sums + 16);
        for (int64_t i = 0; i < count; i++) dgates[copy[row + i]] = sums[i];
      }
    }
  });
}

// out[token] = sum over its rows of a w (+ a2 w2).
template <class T>
void down(const Rows& rows, const T* a, const T* w, const T* a2, const T* w2, T* out) {
  int64_t hidden = rows.hidden, width = rows.width, size = rows.size;
  int64_t columns = std::min<int64_t>(MOST_COLUMNS / 2, padded(hidden)), tile = CACHED_BYTES / (columns * sizeof(float));
  int64_t tiles = std::max<int64_t>(1, (rows.tokens + tile - 1) / tile);
  auto parts = [&] { return (hidden + columns - 1) / columns; };
  while (columns > BLOCK && parts() * tiles < 2 * rows.threads) columns /= 2;
  columns = padded(columns);
  in_parallel<T>(tiles * parts(), rows.threads, [&](int64_t task) {
    int64_t column = task % parts() * columns, token = task / parts() * tile;
    int64_t tokens = std::min(tile, rows.tokens - token), used = std::min(columns, hidden - column);
    T* panels = scratch<T>(0, width * columns);
    float* sums = scratch<float>(1, tokens * columns);
    float* c = scratch<float>(2, 2 * BLOCK * BLOCK);
    memset(sums, 0, tokens * columns * sizeof(float));
    auto use = [&](int64_t row, int64_t n, Pair v) {
      float* sum = sums + (rows.token[row] - token) * columns + n;
      store(sum, sum_of(load(sum), v));
    };
    for (int64_t expert = 0; expert < rows.experts; expert++) {
      Range range = rows_of(rows, expert, token, tokens);
      if (range.begin == range.end) continue;
      for (int both = 0; both < (a2 ? 2 : 1); both++) {
        const T *rows_in = both ? a2 : a, *weights = (both ? w2 : w) + expert * size * hidden + column;
        for (int64_t n = 0; n < used; n += BLOCK)
          pack_rows([&](int64_t i) { return weights + i * hidden + n; }, size, used - n, panels + n * width);
        Products<T, decltype(use)> products(c, use);
        for (int64_t row = range.begin; row < range.end; row += BLOCK)
          for (int64_t n = 0; n < used; n += BLOCK)
            products.add(rows_in + row * width, width, panels + n * width, width, row,
                         std::min(BLOCK, range.end - row), n);
        products.finish();
      }
    }
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t n = 0; n < used; n += BLOCK)
        store(out + (token + t) * hidden + column + n, load(sums + t * columns + n), first_columns(used - n));
  });
}

// dw[neurons of an expert] = a[its rows]^T source[their tokens]; `transposed` has room for width * (C + 32 (E + 1)).
template <class T>
void weight_grad(const Rows& rows, const T* a, const T* source, T* transposed, T* dw) {
  int64_t hidden = rows.hidden, width = rows.width, size = rows.size;
  auto transposed_of = [&](int64_t expert) {
    return transposed + width * (padded(rows.first[expert]) + BLOCK * expert);
  };
  in_parallel<float>(rows.experts, rows.threads, [&](int64_t e) {
    transpose_rows(a + rows.first[e] * width, rows.first[e + 1] - rows.first[e], width, transposed_of(e));
  });
  int64_t columns = CACHED_BYTES / (std::max<int64_t>(1, rows.tokens) * sizeof(T)) / BLOCK * BLOCK;
  columns = std::clamp(columns, BLOCK, std::min(MOST_COLUMNS, padded(hidden)));
  while (columns > BLOCK && hidden * full_experts(rows) < 2 * rows.threads * columns) columns = padded(columns / 2);
  in_parallel<T>((hidden + columns - 1) / columns * rows.experts, rows.threads, [&](int64_t task) {
    int64_t e = task % rows.experts, column = task / rows.experts * columns;
    int64_t count = rows.first[e + 1] - rows.first[e], depth = padded(count);
    const int32_t* token = rows.token + rows.first[e];
    T* panel = scratch<T>(0, depth * BLOCK);
    float* c = scratch<float>(2, 2 * BLOCK * BLOCK);
    for (int64_t n = column; n < std::min(hidden, column + columns); n += BLOCK) {
      auto row_of = [&](int64_t i) {
        prefetch(source + token[std::min(i + ROWS_AHEAD, count - 1)] * hidden + n, BLOCK);
        return source + token[i] * hidden + n;
      };
      pack_rows(row_of, count, hidden - n, panel);
      __mmask32 used = first_columns(hidden - n);
      auto use = [&](int64_t m, int64_t, Pair v) { store(dw + (e * size + m) * hidden + n, v, used); };
      Products<T, decltype(use)> products(c, use);
      for (int64_t m = 0; m < size; m += BLOCK)
        products.add(transposed_of(e) + m * depth, depth, panel, depth, m, std::min(BLOCK, size - m), n);
      products.finish();
    }
  });
}

// db[neurons of an expert] = sum of its rows of a.
template <class T>
void bias_grad(const Rows& rows, const T* a, T* db) {
  in_parallel<float>(rows.experts, rows.threads, [&](int64_t e) {
    for (int64_t n = 0; n < rows.size; n += BLOCK) {
      Pair sum{_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t row = rows.first[e]; row < rows.first[e + 1]; row++) sum = sum_of(sum, load(a + row * rows.width + n));
      store(db + e * rows.size + n, sum, first_columns(rows.size - n));
    }
  });
}
