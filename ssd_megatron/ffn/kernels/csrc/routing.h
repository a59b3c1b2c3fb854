// Which experts a token goes to, and where its copies lie.

#pragma once

#include <cstring>

#include "parallel.h"

// Sorts copies by expert, those with id -1 left out: first [E + 1], token [T K], copy [T K]. Returns their number.
inline int64_t sort_copies(const int64_t* ids, int64_t tokens, int64_t top_k, int64_t experts, int32_t* first,
                    int32_t* token, int32_t* copy) {
  memset(first, 0, (experts + 1) * sizeof(int32_t));
  int64_t copies = tokens * top_k;
  for (int64_t c = 0; c < copies; c++)
    if (ids[c] >= 0) first[ids[c] + 1]++;
  for (int64_t e = 0; e < experts; e++) first[e + 1] += first[e];
  int64_t total = first[experts];
  int64_t c = 0;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t k = 0; k < top_k; k++, c++)
      if (ids[c] >= 0) {
        int32_t row = first[ids[c]]++;
        token[row] = (int32_t)t;
        copy[row] = (int32_t)c;
      }
  for (int64_t e = experts; e > 0; e--) first[e] = first[e - 1];
  first[0] = 0;
  return total;
}

// The k best scores of each token, [tokens][k], best first, and their experts; of equal scores the first. Scores have
// `stride` columns, a multiple of 32.
inline void top_k(const float* scores, int64_t stride, int64_t tokens, int64_t experts, int64_t k, int64_t threads,
           float* best, int64_t* ids) {
  constexpr int64_t TOKENS = 64;
  in_parallel<float>((tokens + TOKENS - 1) / TOKENS, threads, [&](int64_t task) {
    int32_t* keys = scratch<int32_t>(0, stride);
    const __m512i taken = _mm512_set1_epi32(INT32_MIN);
    for (int64_t t = task * TOKENS; t < std::min(tokens, (task + 1) * TOKENS); t++) {
      const float* row = scores + t * stride;
      for (int64_t e = 0; e < stride; e += 16) {  // whole numbers in the order of the scores, NaN above all
        __m512i bits = _mm512_loadu_si512(row + e);
        __m512i low = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MAX));
        int64_t left = experts - e;
        __mmask16 real = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
        _mm512_storeu_si512(keys + e, _mm512_mask_xor_epi32(taken, real, bits, low));
      }
      for (int64_t i = 0; i < k; i++) {
        __m512i most = taken;
        for (int64_t e = 0; e < stride; e += 16) most = _mm512_max_epi32(most, _mm512_loadu_si512(keys + e));
        __m512i key = _mm512_set1_epi32(_mm512_reduce_max_epi32(most));
        int64_t first = 0;
        __mmask16 equal;
        while (!(equal = _mm512_cmpeq_epi32_mask(key, _mm512_loadu_si512(keys + first)))) first += 16;
        first += __builtin_ctz(equal);
        keys[first] = INT32_MIN;
        ids[t * k + i] = first;
        best[t * k + i] = row[first];
      }
    }
  });
}

// Gradient of the scores, [tokens][stride], from that of gates whose gradients are those of p, a softmax over the k
// chosen scores.
template <class T>
void scores_grad(const int64_t* ids, const float* p, const float* dgates, int64_t tokens, int64_t k, int64_t stride,
                 int64_t threads, T* dscores) {
  constexpr int64_t TOKENS = 256;
  in_parallel<float>((tokens + TOKENS - 1) / TOKENS, threads, [&](int64_t task) {
    float* row = scratch<float>(0, stride);
    memset(row, 0, stride * sizeof(float));
    for (int64_t t = task * TOKENS; t < std::min(tokens, (task + 1) * TOKENS); t++) {
      float mean = 0;
      for (int64_t c = t * k; c < (t + 1) * k; c++) mean += p[c] * dgates[c];
      for (int64_t c = t * k; c < (t + 1) * k; c++) row[ids[c]] = p[c] * (dgates[c] - mean);
      for (int64_t e = 0; e < stride; e += BLOCK) store(dscores + t * stride + e, load(row + e));
      for (int64_t c = t * k; c < (t + 1) * k; c++) row[ids[c]] = 0;
    }
  });
}
