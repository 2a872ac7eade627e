// Products of a few tokens with rows of a weight matrix, each read once: what decoding is made of.
//
//   dots   out[r][t] = <row[r], x[t]>            rows that belong to outputs (q, k, v, gate, up)
//   sums   y[t]     += sum_r a[r][t] row[r]      rows that belong to inputs (o and down, stored unit by unit)
//
// Blocks of kBlockRows rows are worked on together. Meanwhile the rows that come next are fetched into the second-level
// cache: their addresses are known, and they lie anywhere in memory, where the hardware cannot guess them. They are
// fetched one whole row after the other, whatever the order of the work: memory likes long runs. x and y lie in groups
// of columns, see tokens.h. Included only by files of csrc/cpu: internal linkage throughout.
#pragma once

#include "sum_each.h"
#include "tokens.h"
#include "vec.h"

namespace {

using ppnet::Dtype;
using ppnet::kGroup;

constexpr int kBlockRows = 16;
constexpr int64_t kLineBytes = 64;  // bytes

// body(W{}) for the element type W of a dtype.
template <class Body>
inline void with_element(Dtype dtype, const Body& body) {
  if (dtype == Dtype::bf16) return body(bf16_t{});
  if (dtype == Dtype::f16) return body(f16_t{});
  body(float{});
}

template <int T, class W>
struct Kind {
  static constexpr int kTokens = T;
  using Element = W;
};

// body(Kind<T, W>{}) for the tokens, filled up, and the element type of a call.
template <class Body>
inline void with_kind(Dtype dtype, int64_t tokens, const Body& body) {
  with_element(dtype, [&](auto element) {
    using W = decltype(element);
    switch (ppnet::padded_tokens(tokens)) {
      case 1: return body(Kind<1, W>{});
      case 2: return body(Kind<2, W>{});
      case 4: return body(Kind<4, W>{});
      default: return body(Kind<8, W>{});
    }
  });
}

// What tokens are held as beside rows of W.
template <class W>
struct FactorOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct FactorOf<bf16_t> {
  using type = bf16_t;
};
#endif
template <class W>
using Factor = typename FactorOf<W>::type;

// Where column d of the first of some tokens lies; the next token's is kGroup further.
inline constexpr int64_t grouped_at(int64_t d, int64_t tokens) { return d / kGroup * kGroup * tokens + d % kGroup; }

// Rows to fetch: as many cache lines with every step of the work as it reads.
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

// Brings lines into the L1 cache.
template <int kLines>
inline void soon(const void* from) {
  PPNET_UNROLL
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(static_cast<const char*>(from) + line * kLineBytes);
}

// ---- dots: kDotRows rows times T tokens in registers; columns go in tiles whose tokens stay in the L1 cache ---------

template <int T>
constexpr int kDotRows = kLanes == 16 ? (T <= 4 ? 4 : 3) : T <= 2 ? 4 : T == 4 ? 2 : 1;
template <int T, class W>
constexpr int64_t kDotTile = 16384 / T / static_cast<int64_t>(sizeof(Factor<W>));

// Holds a loaded vector in a register: without it the compiler loads it anew for every product.
inline void hold(vfloat& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// Adds the products of n <= kGroup elements from column d on to acc[r][t]; n is kGroup unless kPartial is set.
template <int T, int R, bool kPartial, class W>
inline void dot_group(vfloat (&acc)[R][T], const W* const* rows, const float* x, int64_t d, int64_t n) {
  PPNET_UNROLL
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    const int64_t left = n - i;
    if (kPartial && left <= 0) return;
    vfloat w[R];
    PPNET_UNROLL
    for (int r = 0; r < R; ++r) w[r] = kPartial && left < kLanes ? load(rows[r] + d + i, left) : load(rows[r] + d + i);
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      vfloat token = load(x + d * T + t * kGroup + i);
      if (R > 1) hold(token);
      PPNET_UNROLL
      for (int r = 0; r < R; ++r) acc[r][t] = fma(w[r], token, acc[r][t]);
    }
  }
}

#if defined(__AVX512BF16__)
// bf16 pairs multiplied and added in float, a group per instruction.
template <int T, int R, bool kPartial>
inline void dot_group(vfloat (&acc)[R][T], const bf16_t* const* rows, const bf16_t* x, int64_t d, int64_t n) {
  const auto lanes = static_cast<__mmask32>(_bzhi_u32(~0u, static_cast<unsigned>(n)));
  __m512bh w[R];
  PPNET_UNROLL
  for (int r = 0; r < R; ++r)
    w[r] = reinterpret_cast<__m512bh>(kPartial ? _mm512_maskz_loadu_epi16(lanes, rows[r] + d)
                                               : _mm512_loadu_si512(rows[r] + d));
  PPNET_UNROLL
  for (int t = 0; t < T; ++t) {
    const auto token = reinterpret_cast<__m512bh>(_mm512_load_si512(x + d * T + t * kGroup));
    PPNET_UNROLL
    for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], w[r], token);
  }
}
#endif

// Columns [begin, end) of R rows. With many tokens the rows that come next, `soon_rows` from column `soon_from` on, are
// brought into the L1 cache.
template <int T, int R, class W>
inline void dot_rows(vfloat* sums, const W* const* rows, const Factor<W>* x, int64_t begin, int64_t end,
                     const W* const* soon_rows, int64_t soon_from, Ahead& ahead) {
  constexpr int64_t kStep = 2 * kLineBytes / static_cast<int64_t>(sizeof(W));
  vfloat acc[R][T];
  PPNET_UNROLL
  for (int i = 0; i < R * T; ++i) acc[i / T][i % T] = sums[i];
  int64_t d = begin;
  for (; d + kStep <= end; d += kStep) {
    ahead.fetch<2 * R>();
    if (T >= 4) {
      PPNET_UNROLL
      for (int r = 0; r < R; ++r) soon<2>(soon_rows[r] + soon_from + d - begin);
    }
    PPNET_UNROLL
    for (int64_t i = 0; i < kStep; i += kGroup) dot_group<T, R, false>(acc, rows, x, d + i, kGroup);
  }
  for (; d < end; d += kGroup) dot_group<T, R, true>(acc, rows, x, d, end - d < kGroup ? end - d : kGroup);
  PPNET_UNROLL
  for (int i = 0; i < R * T; ++i) sums[i] = acc[i / T][i % T];
}

// out[r * T + t] = <rows[r], x[t]> for r < count <= kBlockRows.
template <int T, class W>
void dots(const W* const* rows, int count, const Factor<W>* x, int64_t width, Ahead& ahead, float* out) {
  constexpr int R = kDotRows<T>;
  constexpr int64_t kTile = kDotTile<T, W>;
  vfloat total[kBlockRows * T + kLanes];
  for (int i = 0; i < count * T + kLanes; ++i) total[i] = splat(0);
  for (int64_t begin = 0; begin < width; begin += kTile) {
    const int64_t end = begin + kTile < width ? begin + kTile : width;
    int r = 0;
    for (; r + R <= count; r += R) {
      const bool more = r + 2 * R <= count;
      dot_rows<T, R>(total + r * T, rows + r, x, begin, end, more ? rows + r + R : rows, more ? begin : end, ahead);
    }
    for (; r < count; ++r) dot_rows<T, 1>(total + r * T, rows + r, x, begin, end, rows + r, end, ahead);
  }
  for (int i = 0; i < count * T; i += kLanes)
    store(out + i, sum_each(total + i), count * T - i < kLanes ? count * T - i : kLanes);
}

// ---- sums, one or two tokens: rows side by side, so that each is read as one long run -------------------------------

constexpr int kSumRows = 8;

// y[t] += sum over r of a[r * T + t] * rows[r] for r < kSumRows.
template <int T, class W>
void sum_rows(const W* const* rows, const float* a, float* y, int64_t width, Ahead& ahead) {
  constexpr int V = 2;
  constexpr int kLines = kSumRows * V * kLanes * static_cast<int>(sizeof(W)) / kLineBytes;
  const auto step = [&](int64_t d, int64_t n) {
    vfloat acc[T][V];
    PPNET_UNROLL
    for (int i = 0; i < T * V; ++i) acc[i / V][i % V] = load(y + grouped_at(d, T) + i / V * kGroup + i % V * kLanes);
    PPNET_UNROLL
    for (int r = 0; r < kSumRows; ++r)
      PPNET_UNROLL
      for (int v = 0; v < V; ++v) {
        const int64_t left = n - v * kLanes;
        const W* from = rows[r] + d + v * kLanes;
        const vfloat w = left >= kLanes ? load(from) : left > 0 ? load(from, left) : splat(0);
        PPNET_UNROLL
        for (int t = 0; t < T; ++t) acc[t][v] = fma(w, splat(a[r * T + t]), acc[t][v]);
      }
    PPNET_UNROLL
    for (int i = 0; i < T * V; ++i) store(y + grouped_at(d, T) + i / V * kGroup + i % V * kLanes, acc[i / V][i % V]);
  };
  int64_t d = 0;
  for (; d + V * kLanes <= width; d += V * kLanes) {
    PPNET_UNROLL
    for (int i = 0; i < kLines; i += 4) ahead.fetch<kLines < 4 ? kLines : 4>();
    step(d, V * kLanes);
  }
  if (d < width) step(d, width - d);
}

#if defined(__AVX512BF16__)
// bf16 rows two at a time: their elements side by side are the pairs that one instruction multiplies and adds in float.
struct Pairs {
  __m512bh low, high;  // of the first and the last kLanes columns of a group
};
inline Pairs pairs_of(__m512i first, __m512i second) {
  // Element i of `low` is element i / 2 of the first row (i even) or of the second (i odd).
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return {reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, low, second)),
          reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, high, second))};
}

// factors[r / 2 * T + t]: a of rows r and r + 1, rounded to bf16, as it is where an activation is stored.
template <int T>
void pair_factors(const float* a, int count, int32_t* factors) {
  for (int r = 0; r < count; r += 2)
    for (int t = 0; t < T; ++t) {
      bf16_t pair[2] = {};
      narrow(a[r * T + t], pair[0]);
      if (r + 1 < count) narrow(a[(r + 1) * T + t], pair[1]);
      memcpy(&factors[r / 2 * T + t], pair, sizeof pair);
    }
}

template <int T>
void sum_rows(const bf16_t* const* rows, const float* a, float* y, int64_t width, Ahead& ahead) {
  int32_t factors[kSumRows / 2 * T];
  pair_factors<T>(a, kSumRows, factors);
  const auto step = [&](int64_t d, __mmask32 lanes) {
    vfloat acc[T][2];
    PPNET_UNROLL
    for (int i = 0; i < 2 * T; ++i) acc[i / 2][i % 2] = load(y + d * T + i * kLanes);
    PPNET_UNROLL
    for (int r = 0; r < kSumRows; r += 2) {
      const Pairs pairs = pairs_of(_mm512_maskz_loadu_epi16(lanes, rows[r] + d),
                                   _mm512_maskz_loadu_epi16(lanes, rows[r + 1] + d));
      PPNET_UNROLL
      for (int t = 0; t < T; ++t) {
        const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(factors[r / 2 * T + t]));
        acc[t][0] = _mm512_dpbf16_ps(acc[t][0], pairs.low, factor);
        acc[t][1] = _mm512_dpbf16_ps(acc[t][1], pairs.high, factor);
      }
    }
    PPNET_UNROLL
    for (int i = 0; i < 2 * T; ++i) store(y + d * T + i * kLanes, acc[i / 2][i % 2]);
  };
  int64_t d = 0;
  for (; d + kGroup <= width; d += kGroup) {
    PPNET_UNROLL
    for (int i = 0; i < kSumRows; i += 4) ahead.fetch<4>();
    step(d, ~__mmask32{0});
  }
  if (d < width) step(d, _bzhi_u32(~0u, static_cast<unsigned>(width - d)));
}
#endif

// ---- sums: a tile of columns times T tokens is kept in registers while all rows of the block go by ------------------

// Vectors of a tile.
template <int T>
constexpr int kSumVectors = kLanes == 16 ? (T == 1 ? 8 : T == 8 ? 2 : 4) : (T <= 2 ? 4 : T == 4 ? 2 : 1);

// y[t] += sum over r of a[r * T + t] * rows[r], for r < count and t < T, in V vectors of columns
// from d on; the last vector has `last` elements.
template <int T, int V, class W>
inline void sum_tile(const W* const* rows, int count, const float* a, float* y, int64_t d, int64_t last, Ahead& ahead) {
  constexpr int kLines = (V * kLanes * static_cast<int>(sizeof(W)) + kLineBytes - 1) / kLineBytes;
  vfloat acc[T][V];
  y += grouped_at(d, T);
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) acc[i / V][i % V] = load(y + i / V * kGroup + grouped_at(i % V * kLanes, T));
  for (int r = 0; r < count; ++r) {
    ahead.fetch<kLines>();
    vfloat w[V];
    PPNET_UNROLL
    for (int v = 0; v < V; ++v) {
      const W* from = rows[r] + d + v * kLanes;
      w[v] = v == V - 1 && last < kLanes ? load(from, last) : load(from);
    }
    if (T >= 4) soon<kLines>(rows[r] + d + V * kLanes);
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      const vfloat factor = splat(a[r * T + t]);
      PPNET_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] = fma(w[v], factor, acc[t][v]);
    }
  }
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) store(y + i / V * kGroup + grouped_at(i % V * kLanes, T), acc[i / V][i % V]);
}

// The same over all columns.
template <int T, class W>
void sum_tiles(const W* const* rows, int count, const float* a, float* y, int64_t width, Ahead& ahead) {
  constexpr int64_t kTile = kSumVectors<T> * kLanes;
  int64_t d = 0;
  for (; d + kTile <= width; d += kTile) sum_tile<T, kSumVectors<T>>(rows, count, a, y, d, kLanes, ahead);
  for (; d < width; d += kLanes)
    sum_tile<T, 1>(rows, count, a, y, d, width - d < kLanes ? width - d : kLanes, ahead);
}

#if defined(__AVX512BF16__)
// V is even.
template <int T, int V>
inline void pair_tile(const bf16_t* const* rows, int count, const int32_t* factors, float* y, int64_t d, Ahead& ahead) {
  constexpr int kLines = V * kLanes * 2 / kLineBytes;
  vfloat acc[T][V];
  y += d * T;
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) acc[i / V][i % V] = load(y + i / V * kGroup + grouped_at(i % V * kLanes, T));
  for (int r = 0; r < count; r += 2) {
    const bool two = r + 1 < count;
    ahead.fetch<2 * kLines>();
    __m512bh pairs[V];
    PPNET_UNROLL
    for (int v = 0; v < V; v += 2) {
      const __m512i first = _mm512_loadu_si512(rows[r] + d + v * kLanes);
      const __m512i second = two ? _mm512_loadu_si512(rows[r + 1] + d + v * kLanes) : _mm512_setzero_si512();
      const Pairs found = pairs_of(first, second);
      pairs[v] = found.low;
      pairs[v + 1] = found.high;
    }
    if (T >= 4) soon<kLines>(rows[r] + d + V * kLanes);
    if (T >= 4 && two) soon<kLines>(rows[r + 1] + d + V * kLanes);
    PPNET_UNROLL
    for (int t = 0; t < T; ++t) {
      const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(factors[r / 2 * T + t]));
      PPNET_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] = _mm512_dpbf16_ps(acc[t][v], pairs[v], factor);
    }
  }
  PPNET_UNROLL
  for (int i = 0; i < T * V; ++i) store(y + i / V * kGroup + grouped_at(i % V * kLanes, T), acc[i / V][i % V]);
}

template <int T>
void sum_tiles(const bf16_t* const* rows, int count, const float* a, float* y, int64_t width, Ahead& ahead) {
  constexpr int64_t kTile = kSumVectors<T> * kLanes;
  int32_t factors[kBlockRows / 2 * T];
  pair_factors<T>(a, count, factors);
  int64_t d = 0;
  for (; d + kTile <= width; d += kTile) pair_tile<T, kSumVectors<T>>(rows, count, factors, y, d, ahead);
  for (; d < width; d += kLanes)
    sum_tile<T, 1>(rows, count, a, y, d, width - d < kLanes ? width - d : kLanes, ahead);
}
#endif

// y[t] += sum over r of a[r * T + t] * rows[r], for r < count <= kBlockRows.
template <int T, class W>
void sums(const W* const* rows, int count, const float* a, float* y, int64_t width, Ahead& ahead) {
  int r = 0;
  if constexpr (T <= 2)
    for (; r + kSumRows <= count; r += kSumRows) sum_rows<T>(rows + r, a + r * T, y, width, ahead);
  if (r < count) sum_tiles<T>(rows + r, count - r, a + r * T, y, width, ahead);
}

}  // namespace
