// Where the copies of tokens lie, once their experts are chosen.

#pragma once

#include <cstdint>
#include <cstring>

// Sorts copies by expert, those with id -1 left out: first [E + 1], token [T K], copy [T K]. Returns their number.
// Two threads take longer than one.
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
