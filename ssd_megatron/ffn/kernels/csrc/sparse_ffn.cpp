// What cpp_build.py loads: the kernels of the other files for fp32 and bf16, as C functions.

#include "copies.h"
#include "network.h"
#include "router.h"

extern "C" {

int64_t sort_copies_of(const int64_t* ids, int64_t tokens, int64_t top_k, int64_t experts, int32_t* first,
                       int32_t* token, int32_t* copy) {
  return sort_copies(ids, tokens, top_k, experts, first, token, copy);
}

void top_k_of(const float* scores, int64_t tokens, int64_t experts, int64_t k, int64_t threads, int64_t* ids) {
  top_k(scores, tokens, experts, k, threads, ids);
}

void softmax_of(const float* scores, const int64_t* ids, int64_t tokens, int64_t experts, int64_t k, int64_t threads,
                float* p) {
  softmax(scores, ids, tokens, experts, k, threads, p);
}

#define EXPORT(T, suffix)                                                                                              \
  void up_##suffix(const Rows* rows, const T* source, const T* w, const T* bias, int64_t relu, const T* outputs,      \
                   const int32_t* copy, float* dgates, T* out) {                                                       \
    up(*rows, source, w, bias, relu, outputs, copy, dgates, out);                                                      \
  }                                                                                                                    \
  void scores_##suffix(const T* x, const T* w, int64_t tokens, int64_t hidden, int64_t experts, int64_t threads,       \
                       float* out) {                                                                                   \
    scores(x, w, tokens, hidden, experts, threads, out);                                                               \
  }                                                                                                                    \
  void scores_grad_##suffix(const int64_t* ids, const float* p, const float* dgates, const T* w, const T* add,         \
                            int64_t tokens, int64_t hidden, int64_t experts, int64_t k, int64_t threads, T* dscores,   \
                            T* dx) {                                                                                   \
    scores_grad(ids, p, dgates, w, add, tokens, hidden, experts, k, threads, dscores, dx);                             \
  }                                                                                                                    \
  void down_##suffix(const Rows* rows, const T* a, const T* w, const T* a2, const T* w2, T* out) {                     \
    down(*rows, a, w, a2, w2, out);                                                                                    \
  }                                                                                                                    \
  void weight_grad_##suffix(const Rows* rows, const T* a, const T* source, T* transposed, T* dw) {                     \
    weight_grad(*rows, a, source, transposed, dw);                                                                     \
  }                                                                                                                    \
  void bias_grad_##suffix(const Rows* rows, const T* a, T* db) { bias_grad(*rows, a, db); }

EXPORT(float, fp32)
EXPORT(bf16, bf16)
}
