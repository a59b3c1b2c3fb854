// Products of 32 x 32 numbers, and the layouts they read: fp32 by AVX-512, bf16 by AMX.
//
// The right operand of a product is packed in *panels* of 32 columns: fp32 [K][32], bf16 [K / 2][32][2], as AMX wants
// it. The left one is row-major. K is padded with zeros to a multiple of 32 everywhere.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

using bf16 = uint16_t;  // its bits

constexpr int64_t BLOCK = 32;

inline int64_t padded(int64_t count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

struct Pair {  // 32 numbers of a row
  __m512 low, high;
};

inline Pair load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }

inline __m512 widened(__m256i numbers) {  // 16 of bf16
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

inline Pair load(const bf16* p) {
  const __m256i* halves = (const __m256i*)p;
  return {widened(_mm256_loadu_si256(halves)), widened(_mm256_loadu_si256(halves + 1))};
}

inline Pair load(const float* p, __mmask32 columns) {
  return {_mm512_maskz_loadu_ps((__mmask16)columns, p), _mm512_maskz_loadu_ps((__mmask16)(columns >> 16), p + 16)};
}

inline Pair load(const bf16* p, __mmask32 columns) {
  __m512i numbers = _mm512_maskz_loadu_epi16(columns, p);
  return {widened(_mm512_castsi512_si256(numbers)), widened(_mm512_extracti64x4_epi64(numbers, 1))};
}

inline Pair sum_of(Pair a, Pair b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }

inline __mmask32 first_columns(int64_t count) { return count >= BLOCK ? ~0u : (1u << count) - 1; }

inline void store(float* p, Pair v, __mmask32 columns = ~0u) {
  _mm512_mask_storeu_ps(p, (__mmask16)columns, v.low);
  _mm512_mask_storeu_ps(p + 16, (__mmask16)(columns >> 16), v.high);
}

inline void store(bf16* p, Pair v, __mmask32 columns = ~0u) {
  _mm512_mask_storeu_epi16(p, columns, (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low));
}

// 64 bytes of a row, zeros where it has ended.
template <class T>
inline __m512i load_bytes(const T* row, int64_t left) {
  int64_t halves = left * (int64_t)sizeof(T) / 2;
  if (halves >= 32) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16(halves <= 0 ? 0 : (1u << halves) - 1, row);
}

// A row of `count` numbers, and zeros up to a multiple of 32.
template <class T>
inline void copy_padded(const T* row, int64_t count, T* to) {
  memcpy(to, row, count * sizeof(T));
  memset(to + count, 0, (padded(count) - count) * sizeof(T));
}

template <class T>
inline void prefetch(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) _mm_prefetch((const char*)(row + i), _MM_HINT_T0);
}

// ---- products: c [32][32] = a [rows][k] panel [k][32]; a is readable up to row 31

constexpr int64_t ROWS_AT_ONCE = 8;
constexpr int64_t DEPTH_IN_CACHE = 128;  // of a panel and of 32 rows, which then stay in the first-level cache

inline void multiply(const float* a, int64_t stride, const float* panel, int64_t k, int64_t rows, float* c) {
  for (int64_t first = 0; first < k || first == 0; first += DEPTH_IN_CACHE) {
    int64_t end = std::min(k, first + DEPTH_IN_CACHE);
    for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
      Pair sums[ROWS_AT_ONCE];
      float* target = c + row * BLOCK;
#pragma GCC unroll 8
      for (int i = 0; i < ROWS_AT_ONCE; i++)
        sums[i] = first ? load(target + i * BLOCK) : Pair{_mm512_setzero_ps(), _mm512_setzero_ps()};
      const float* from = a + row * stride;
      for (int64_t j = first; j < end; j++) {
        Pair b = load(panel + j * BLOCK);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
          __m512 x = _mm512_set1_ps(from[i * stride + j]);
          sums[i].low = _mm512_fmadd_ps(x, b.low, sums[i].low);
          sums[i].high = _mm512_fmadd_ps(x, b.high, sums[i].high);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS_AT_ONCE; i++) store(target + i * BLOCK, sums[i]);
    }
  }
}

// Compilers do not know that the tile instructions read and write memory.
inline void memory_is_used() { asm volatile("" ::: "memory"); }

template <bool TWO_ROWS>
inline void multiply_tiles(const bf16* a, int64_t stride, const bf16* panel, int64_t k, float* c) {
  memory_is_used();
  _tile_zero(0);
  _tile_zero(1);
  if (TWO_ROWS) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t j = 0; j < k; j += BLOCK) {
    _tile_loadd(4, a + j, stride * 2);
    _tile_loadd(6, panel + j * BLOCK, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + j * BLOCK + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO_ROWS) {
      _tile_loadd(5, a + 16 * stride + j, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  if (TWO_ROWS) {
    _tile_stored(2, c + 16 * BLOCK, 128);
    _tile_stored(3, c + 16 * BLOCK + 16, 128);
  }
  memory_is_used();
}

inline void multiply(const bf16* a, int64_t stride, const bf16* panel, int64_t k, int64_t rows, float* c) {
  rows > 16 ? multiply_tiles<true>(a, stride, panel, k, c) : multiply_tiles<false>(a, stride, panel, k, c);
}

// Products one after the other; the rows of each are used, use(row, column, Pair), while the next one is computed: row
// and column say where its block begins, as given.
template <class T, class Use>
class Products {
 public:
  // c: room for two products.
  Products(float* c, const Use& use) : c_(c), use_(use) {}

  void add(const T* a, int64_t stride, const T* panel, int64_t k, int64_t row, int64_t rows, int64_t column) {
    multiply(a, stride, panel, k, rows, c_ + now_ * BLOCK * BLOCK);
    finish();
    row_ = row, rows_ = rows, column_ = column;
    now_ = 1 - now_;
  }

  // Uses the last one.
  void finish() {
    const float* c = c_ + (1 - now_) * BLOCK * BLOCK;
    for (int64_t i = 0; i < rows_; i++) use_(row_ + i, column_, load(c + i * BLOCK));
    rows_ = 0;
  }

 private:
  float* c_;
  const Use& use_;
  int64_t now_ = 0, row_ = 0, rows_ = 0, column_ = 0;
};

// ---- layouts

// Columns of a and b in turn: the first 16 of each, and the last 16.
inline void interleave(__m512i a, __m512i b, __m512i* first, __m512i* last) {
  __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
  *first = _mm512_permutex2var_epi64(even, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), odd);
  *last = _mm512_permutex2var_epi64(even, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), odd);
}

// A panel of the k rows that row(0), row(1) ... point at, `columns` of them (up to 32).
template <class Row>
inline void pack_rows(const Row& row, int64_t k, int64_t columns, float* panel) {
  for (int64_t j = 0; j < padded(k); j++) {
    const float* from = j < k ? row(j) : nullptr;
    for (int64_t i = 0; i < BLOCK; i += 16)
      _mm512_storeu_si512(panel + j * BLOCK + i,
                          from ? load_bytes(from + i, columns - i) : _mm512_setzero_si512());
  }
}

template <class Row>
inline void pack_rows(const Row& row, int64_t k, int64_t columns, bf16* panel) {
  int64_t j = 0;
  auto put = [&](__m512i a, __m512i b) {
    __m512i first, last;
    interleave(a, b, &first, &last);
    _mm512_storeu_si512(panel + j * BLOCK, first);
    _mm512_storeu_si512(panel + j * BLOCK + 32, last);
  };
  if (columns >= BLOCK)
    for (; j + 2 <= k; j += 2) put(_mm512_loadu_si512(row(j)), _mm512_loadu_si512(row(j + 1)));
  for (; j < padded(k); j += 2)
    put(j < k ? load_bytes(row(j), columns) : _mm512_setzero_si512(),
        j + 1 < k ? load_bytes(row(j + 1), columns) : _mm512_setzero_si512());
}

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Sums of the 16 numbers in each of 16 registers.
inline void sum_rows(const __m512* rows, float* sums) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_castps_si512(rows[i]);
  transpose(r);
  __m512 sum = _mm512_castsi512_ps(r[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 16; i++) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(r[i]));
  _mm512_storeu_ps(sums, sum);
}

// A panel whose columns are `rows` rows (up to 32) of k numbers.
template <class T>
inline void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t k, T* panel) {
  constexpr int64_t IN_64_BYTES = 64 / sizeof(T);
  for (int64_t j = 0; j < padded(k); j += IN_64_BYTES)
    for (int64_t half = 0; half < BLOCK; half += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        r[i] = half + i < rows ? load_bytes(from + (half + i) * stride + j, k - j) : _mm512_setzero_si512();
      transpose(r);
      char* to = (char*)(panel + j * BLOCK) + half * 4;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 128, r[i]);
    }
}

// to [width][padded(k)] = from [k][width] transposed; width a multiple of 32.
inline void transpose_rows(const float* from, int64_t k, int64_t width, float* to) {
  int64_t depth = padded(k);
  for (int64_t j = 0; j < depth; j += 16)
    for (int64_t i = 0; i < width; i += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int s = 0; s < 16; s++)
        r[s] = j + s < k ? _mm512_loadu_si512(from + (j + s) * width + i) : _mm512_setzero_si512();
      transpose(r);
#pragma GCC unroll 16
      for (int s = 0; s < 16; s++) _mm512_storeu_si512(to + (i + s) * depth + j, r[s]);
    }
}

inline void transpose_rows(const bf16* from, int64_t k, int64_t width, bf16* to) {
  int64_t depth = padded(k);
  for (int64_t j = 0; j < depth; j += 32)
    for (int64_t i = 0; i < width; i += 32) {
      __m512i first[16], last[16];
#pragma GCC unroll 16
      for (int s = 0; s < 16; s++) {
        const bf16* row = from + (j + 2 * s) * width + i;
        __m512i a = j + 2 * s < k ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
        __m512i b = j + 2 * s + 1 < k ? _mm512_loadu_si512(row + width) : _mm512_setzero_si512();
        interleave(a, b, &first[s], &last[s]);
      }
      transpose(first);
      transpose(last);
#pragma GCC unroll 16
      for (int s = 0; s < 16; s++) {
        _mm512_storeu_si512(to + (i + s) * depth + j, first[s]);
        _mm512_storeu_si512(to + (i + 16 + s) * depth + j, last[s]);
      }
    }
}
