// Products of a few tokens with rows of a weight matrix, each read once: what decoding is made of.
//
//   dots   out[r][t] = <row[r], x[t]>            rows that belong to outputs (q, k, v, gate, up)
//   sums   y[t]     += sum_r a[r][t] row[r]      rows that belong to inputs (o and down, stored unit by unit)
//
// Up to kBlockRows rows are worked on together. Meanwhile the rows that come next are fetched into the second-level cache: their
// addresses are known, and they lie anywhere in memory, where the hardware cannot guess them. They are fetched one whole row
// after the other, whatever the order of the work: memory likes long runs.
// Included only by files of csrc/cpu: internal linkage throughout.
#pragma once

#include "vec.h"

namespace {

// Loops over rows, tokens and vectors must be unrolled whole, or their sums live in memory in place of registers.
#define PPNET_UNROLL _Pragma("GCC unroll 16")

constexpr int kBlockRows = 16;
constexpr int64_t kLineBytes = 64;  // bytes

// The tokens of a call: (T, D) in the dtype of the weights, and widened to float. `stride` is in elements, for both.
template <class W>
struct Tokens {
  const W* raw;
  const float* wide;
  int64_t stride;
};

// Rows to fetch, a few cache lines with every step of the work.
struct Ahead {
  const char* const* rows;
  int count;
  int64_t bytes;  // of a row
  int64_t at = 0;
  template <int kLines>
  void fetch() {
    if (count == 0) return;
    const char* from = *rows + at;
    PPNET_UNROLL
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(from + line * kLineBytes, 0, 2);
    at += kLines * kLineBytes;
    if (at < bytes) return;
    at = 0;
    ++rows;
    --count;
  }
};

// ---- dots: kDotRows rows times T tokens are summed in registers; columns go in tiles whose tokens stay in the L1 cache ----

template <int T>
constexpr int kDotRows = T <= 2 || (T == 4 && kLanes == 16) ? 4 : 2;
template <int T>
constexpr int64_t kDotTile = 4096 / T;

// Adds the products of n elements from column d on to acc[r][t]; n is a multiple of a vector, or kPartial is set.
template <int T, int R, bool kPartial, class W>
inline void dot_step(vfloat (&acc)[R][T], const W* const* rows, const Tokens<W>& x, int64_t d, int64_t n) {
  for (int64_t i = d; i < d + n; i += kLanes) {
    const int64_t left = d + n - i;
    vfloat w[R];
    PPNET_UNROLL
    for (int r = 0; r < R; ++r) w[r] = kPartial && left < kLanes ? load(rows[r] + i, left) : load(rows[r] + i);
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      const float* p = x.wide + t * x.stride + i;
      const vfloat token = kPartial && left < kLanes ? load(p, left) : load(p);
      PPNET_UNROLL
      for (int r = 0; r < R; ++r) acc[r][t] = fma(w[r], token, acc[r][t]);
    }
  }
}

#if defined(__AVX512BF16__)
// bf16 pairs multiplied and added in float, 32 elements per instruction.
template <int T, int R, bool kPartial>
inline void dot_step(vfloat (&acc)[R][T], const bf16_t* const* rows, const Tokens<bf16_t>& x, int64_t d, int64_t n) {
  for (int64_t i = d; i < d + n; i += 32) {
    const auto lanes = static_cast<__mmask32>(_bzhi_u32(~0u, static_cast<unsigned>(d + n - i < 32 ? d + n - i : 32)));
    const auto pairs = [&](const bf16_t* p) {
      return reinterpret_cast<__m512bh>(kPartial ? _mm512_maskz_loadu_epi16(lanes, p) : _mm512_loadu_si512(p));
    };
    __m512bh w[R];
    PPNET_UNROLL
    for (int r = 0; r < R; ++r) w[r] = pairs(rows[r] + i);
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      const __m512bh token = pairs(x.raw + t * x.stride + i);
      PPNET_UNROLL
      for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], w[r], token);
    }
  }
}
#endif

// Columns [begin, end) of R rows. As many lines are fetched as are read (kHalf: half as many).
template <int T, int R, bool kHalf, class W>
inline void dot_rows(vfloat* sums, const W* const* rows, const Tokens<W>& x, int64_t begin, int64_t end,
                     Ahead& ahead) {
  constexpr int64_t kStep = 2 * kLineBytes / static_cast<int64_t>(sizeof(W));
  vfloat acc[R][T];
  PPNET_UNROLL
  for (int i = 0; i < R * T; ++i) acc[i / T][i % T] = sums[i];
  int64_t d = begin;
  for (; d + kStep <= end; d += kStep) {
    ahead.fetch<kHalf ? R : 2 * R>();
    dot_step<T, R, false>(acc, rows, x, d, kStep);
  }
  if (d < end) dot_step<T, R, true>(acc, rows, x, d, end - d);
  PPNET_UNROLL
  for (int i = 0; i < R * T; ++i) sums[i] = acc[i / T][i % T];
}

// out[r * T + t] = <rows[r], x[t]> for r < count <= kBlockRows.
template <int T, bool kHalf, class W>
void dots(const W* const* rows, int count, const Tokens<W>& x, int64_t width, Ahead& ahead, float* out) {
  constexpr int R = kDotRows<T>;
  vfloat total[kBlockRows * T];
  for (int i = 0; i < count * T; ++i) total[i] = splat(0);
  for (int64_t begin = 0; begin < width; begin += kDotTile<T>) {
    const int64_t end = begin + kDotTile<T> < width ? begin + kDotTile<T> : width;
    int r = 0;
    for (; r + R <= count; r += R) dot_rows<T, R, kHalf>(total + r * T, rows + r, x, begin, end, ahead);
    for (; r < count; ++r) dot_rows<T, 1, kHalf>(total + r * T, rows + r, x, begin, end, ahead);
  }
  for (int i = 0; i < count * T; ++i) out[i] = sum(total[i]);
}

// ---- sums: a tile of columns times T tokens is kept in registers while all rows of the block go by ------------------------

// Vectors of a tile.
template <int T>
constexpr int kSumVectors = kLanes == 16 ? (T == 1 ? 8 : T == 8 ? 2 : 4) : (T <= 2 ? 4 : T == 4 ? 2 : 1);

// y[t] += sum over r of a[r * T + t] * rows[r], for r < count and t < T, in V vectors of columns from d on; the last vector has
// `last` elements. N lines are fetched per line read.
template <int T, int V, int N, class W>
inline void sum_tile(const W* const* rows, int count, const float* a, float* y, int64_t stride, int64_t d, int64_t last,
                     Ahead& ahead) {
  constexpr int kLines = (V * kLanes * static_cast<int>(sizeof(W)) + kLineBytes - 1) / kLineBytes;
  vfloat acc[T][V];
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) {
    const float* from = y + i / V * stride + d + i % V * kLanes;
    acc[i / V][i % V] = i % V == V - 1 && last < kLanes ? load(from, last) : load(from);
  }
  for (int r = 0; r < count; ++r) {
    PPNET_UNROLL
    for (int n = 0; n < N; ++n) ahead.fetch<kLines>();
    vfloat w[V];
    PPNET_UNROLL
    for (int v = 0; v < V; ++v) {
      const W* from = rows[r] + d + v * kLanes;
      w[v] = v == V - 1 && last < kLanes ? load(from, last) : load(from);
    }
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      const vfloat factor = splat(a[r * T + t]);
      PPNET_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] = fma(w[v], factor, acc[t][v]);
    }
  }
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) {
    float* to = y + i / V * stride + d + i % V * kLanes;
    if (i % V == V - 1 && last < kLanes)
      store(to, acc[i / V][i % V], last);
    else
      store(to, acc[i / V][i % V]);
  }
}

// The same over all columns; y is (T, width) floats.
template <int T, int N, class W>
void sums(const W* const* rows, int count, const float* a, float* y, int64_t stride, int64_t width,
          Ahead& ahead) {
  constexpr int64_t kTile = kSumVectors<T> * kLanes;
  int64_t d = 0;
  for (; d + kTile <= width; d += kTile) sum_tile<T, kSumVectors<T>, N>(rows, count, a, y, stride, d, kLanes, ahead);
  for (; d < width; d += kLanes) {
    const int64_t last = width - d < kLanes ? width - d : kLanes;
    sum_tile<T, 1, N>(rows, count, a, y, stride, d, last, ahead);
  }
}

#if defined(__AVX512BF16__)
// bf16 rows two at a time: their elements side by side are the pairs that one instruction multiplies and adds in float.
// factors[r / 2 * T + t]: a of rows r and r + 1, rounded to bf16, as it is where an activation is stored. V is even.
template <int T, int V, int N>
inline void pair_tile(const bf16_t* const* rows, int count, const int32_t* factors, float* y, int64_t stride, int64_t d,
                      Ahead& ahead) {
  constexpr int kLines = V * kLanes * 2 / kLineBytes;
  // Element i of `low` is element i / 2 of the first row (i even) or of the second (i odd).
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  vfloat acc[T][V];
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) acc[i / V][i % V] = load(y + i / V * stride + d + i % V * kLanes);
  for (int r = 0; r < count; r += 2) {
    const bool two = r + 1 < count;
    PPNET_UNROLL
    for (int n = 0; n < 2 * N; ++n) ahead.fetch<kLines>();
    __m512bh pairs[V];
    PPNET_UNROLL
    for (int v = 0; v < V; v += 2) {
      const __m512i first = _mm512_loadu_si512(rows[r] + d + v * kLanes);
      const __m512i second = two ? _mm512_loadu_si512(rows[r + 1] + d + v * kLanes) : _mm512_setzero_si512();
      pairs[v] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, low, second));
      pairs[v + 1] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, high, second));
    }
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(factors[r / 2 * T + t]));
      PPNET_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] = _mm512_dpbf16_ps(acc[t][v], pairs[v], factor);
    }
  }
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) store(y + i / V * stride + d + i % V * kLanes, acc[i / V][i % V]);
}

template <int T, int N>
void sums(const bf16_t* const* rows, int count, const float* a, float* y, int64_t stride, int64_t width, Ahead& ahead) {
  constexpr int64_t kTile = kSumVectors<T> * kLanes;
  int32_t factors[kBlockRows / 2 * T];
  for (int r = 0; r < count; r += 2)
    for (int t = 0; t < T; ++t) {
      bf16_t pair[2] = {};
      narrow(a[r * T + t], pair[0]);
      if (r + 1 < count) narrow(a[(r + 1) * T + t], pair[1]);
      memcpy(&factors[r / 2 * T + t], pair, sizeof pair);
    }
  int64_t d = 0;
  for (; d + kTile <= width; d += kTile)
    pair_tile<T, kSumVectors<T>, N>(rows, count, factors, y, stride, d, ahead);
  for (; d < width; d += kLanes)
    sum_tile<T, 1, N>(rows, count, a, y, stride, d, width - d < kLanes ? width - d : kLanes, ahead);
}
#endif

}  // namespace
