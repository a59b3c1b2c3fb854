// A router over all tokens: scores, the best experts of each, and gradients.
//
// Tensors of scores have padded(experts) columns.

#pragma once

#include <cmath>
#include <cstring>

#include "parallel.h"

// task(begin, end) for all tokens; begin is a multiple of 32.
template <class T, class Task>
void for_tokens(int64_t tokens, int64_t threads, const Task& task) {
  int64_t step = std::clamp<int64_t>(padded(tokens / (4 * threads)), BLOCK, 256);
  in_parallel<T>((tokens + step - 1) / step, threads,
                 [&](int64_t i) { task(i * step, std::min(tokens, (i + 1) * step)); });
}

// out = x w^T.
template <class T>
void scores(const T* x, const T* w, int64_t tokens, int64_t hidden, int64_t experts, int64_t threads, float* out) {
  int64_t depth = padded(hidden), width = padded(experts);
  T* panels = scratch<T>(3, width * depth);
  in_parallel<float>(width / BLOCK, threads, [&](int64_t i) {
    int64_t e = i * BLOCK;
    pack_columns(w + e * hidden, hidden, experts - e, hidden, panels + e * depth);
  });
  for_tokens<T>(tokens, threads, [&](int64_t begin, int64_t end) {
    T* copied = scratch<T>(1, BLOCK * depth);
    auto use = [&](int64_t row, int64_t e, Pair v) { store(out + row * width + e, v); };
    Products<T, decltype(use)> products(scratch<float>(2, 2 * BLOCK * BLOCK), use);
    for (int64_t row = begin; row < end; row += BLOCK) {
      int64_t count = std::min(BLOCK, end - row);
      const T* rows = x + row * hidden;
      if (depth > hidden || count < BLOCK) {  // a product would read beyond them
        for (int64_t i = 0; i < count; i++) copy_padded(rows + i * hidden, hidden, copied + i * depth);
        rows = copied;
      }
      for (int64_t e = 0; e < width; e += BLOCK) products.add(rows, depth, panels + e * depth, depth, row, count, e);
    }
    products.finish();
  });
}

// The experts with the k best scores of each token, [tokens][k], best first, of equal ones the first.
inline void top_k(const float* scores, int64_t tokens, int64_t experts, int64_t k, int64_t threads, int64_t* ids) {
  int64_t width = padded(experts);
  for_tokens<float>(tokens, threads, [&](int64_t begin, int64_t end) {
    int32_t* keys = scratch<int32_t>(0, width);
    const __m512i taken = _mm512_set1_epi32(INT32_MIN);
    for (int64_t t = begin; t < end; t++) {
      const float* row = scores + t * width;
      for (int64_t e = 0; e < width; e += 16) {  // whole numbers in the order of the scores, NaN above all
        __m512i bits = _mm512_loadu_si512(row + e);
        __m512i low = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MAX));
        __m512 score = _mm512_castsi512_ps(bits);
        int64_t left = experts - e;
        __mmask16 real = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
        __m512i key = _mm512_mask_xor_epi32(taken, real, bits, low);
        __mmask16 broken = _mm512_mask_cmp_ps_mask(real, score, score, _CMP_UNORD_Q);
        _mm512_storeu_si512(keys + e, _mm512_mask_mov_epi32(key, broken, _mm512_set1_epi32(INT32_MAX)));
      }
      for (int64_t c = t * k; c < (t + 1) * k; c++) {
        __m512i most = taken;
        for (int64_t e = 0; e < width; e += 16) most = _mm512_max_epi32(most, _mm512_loadu_si512(keys + e));
        __m512i key = _mm512_set1_epi32(_mm512_reduce_max_epi32(most));
        int64_t first = 0;
        __mmask16 equal;
        while (!(equal = _mm512_cmpeq_epi32_mask(key, _mm512_loadu_si512(keys + first)))) first += 16;
        first += __builtin_ctz(equal);
        keys[first] = INT32_MIN;
        ids[c] = first;
      }
    }
  });
}

// p [tokens][k] = softmax over the scores of the experts `ids`.
inline void softmax(const float* scores, const int64_t* ids, int64_t tokens, int64_t experts, int64_t k,
                    int64_t threads, float* p) {
  int64_t width = padded(experts);
  for_tokens<float>(tokens, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float most = -INFINITY, sum = 0;
      for (int64_t c = t * k; c < (t + 1) * k; c++) most = std::max(most, p[c] = scores[t * width + ids[c]]);
      for (int64_t c = t * k; c < (t + 1) * k; c++) sum += p[c] = std::exp(p[c] - most);
      for (int64_t c = t * k; c < (t + 1) * k; c++) p[c] /= sum;
    }
  });
}

// Gradients of the scores and of x from those of gates, whose gradients are those of p; to that of x `add` is added
// where there is one. `dscores` has 32 rows more, which are read and not used.
template <class T>
void scores_grad(const int64_t* ids, const float* p, const float* dgates, const T* w, const T* add, int64_t tokens,
                 int64_t hidden, int64_t experts, int64_t k, int64_t threads, T* dscores, T* dx) {
  int64_t width = padded(experts);
  T* panels = scratch<T>(3, width * padded(hidden));
  in_parallel<float>(padded(hidden) / BLOCK, threads, [&](int64_t i) {
    int64_t n = i * BLOCK;
    pack_rows([&](int64_t e) { return w + e * hidden + n; }, experts, hidden - n, panels + n * width);
  });
  for_tokens<T>(tokens, threads, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, width);
    memset(row, 0, width * sizeof(float));
    for (int64_t t = begin; t < end; t++) {
      float mean = 0;
      for (int64_t c = t * k; c < (t + 1) * k; c++) mean += p[c] * dgates[c];
      for (int64_t c = t * k; c < (t + 1) * k; c++) row[ids[c]] = p[c] * (dgates[c] - mean);
      for (int64_t e = 0; e < width; e += BLOCK) store(dscores + t * width + e, load(row + e));
      for (int64_t c = t * k; c < (t + 1) * k; c++) row[ids[c]] = 0;
    }
    auto use = [&](int64_t t, int64_t n, Pair v) {
      __mmask32 used = first_columns(hidden - n);
      if (add) v = sum_of(v, load(add + t * hidden + n, used));
      store(dx + t * hidden + n, v, used);
    };
    Products<T, decltype(use)> products(scratch<float>(2, 2 * BLOCK * BLOCK), use);
    for (int64_t t = begin; t < end; t += BLOCK)
      for (int64_t n = 0; n < hidden; n += BLOCK)
        products.add(dscores + t * width, width, panels + n * width, width, t, std::min(BLOCK, end - t), n);
    products.finish();
  });
}
