// The inner loops of gated_attention_decode: a tile of query rows against rows of keys, and weights against rows of
// values. Included once, by gated_attention_decode.cpp: everything has internal linkage.
#pragma once

#include "sum_each.h"
#include "vec.h"

namespace {

// Rows are read two vectors of floats at a time. Which element lies in which lane is the type's choice, as long as
// queries, keys and values agree: bf16 splits 32-bit words into even and odd elements, which costs one instruction per
// vector.
constexpr int64_t kPair = 2 * kLanes;
struct Pair {
  vfloat a, b;
};

template <class T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
inline Pair load_pair(const T* p, int64_t n) {
  if (n <= kLanes) return {load(p, n), splat(0)};
  return {load(p), load(p + kLanes, n - kLanes)};
}
template <class T>
inline void store_pair(T* p, Pair x, int64_t n) {
  store(p, x.a, n < kLanes ? n : kLanes);
  if (n > kLanes) store(p + kLanes, x.b, n - kLanes);
}

#if defined(__AVX512F__)
inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
inline Pair even_odd(__m512i words) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline Pair load_pair(const bf16_t* p) { return even_odd(_mm512_loadu_si512(p)); }
inline Pair load_pair(const bf16_t* p, int64_t n) { return even_odd(_mm512_maskz_loadu_epi16(first_halves(n), p)); }
inline void store_pair(bf16_t* p, Pair x, int64_t n) {
  const __m512i even = _mm512_cvtepu16_epi32(narrow_bf16(x.a)), odd = _mm512_cvtepu16_epi32(narrow_bf16(x.b));
  _mm512_mask_storeu_epi16(p, first_halves(n), _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
#endif

// One pair of a query times one of a key. Queries are held as floats in the order of load_pair.
template <class T>
struct Product {
  using Operand = Pair;
  static Operand query(const float* q) { return {load(q), load(q + kLanes)}; }
  static Operand key(const T* k) { return load_pair(k); }
  static Operand key(const T* k, int64_t n) { return load_pair(k, n); }
  static vfloat add(vfloat sum, Operand q, Operand k) { return fma(q.b, k.b, fma(q.a, k.a, sum)); }
  static void set_query(float* to, const T* from, int64_t n) {
    const Pair x = load_pair(from, n);
    store(to, x.a);
    store(to + kLanes, x.b);
  }
};

#if defined(__AVX512BF16__)
// Queries stay bf16 in the first half of each pair of floats; products are summed in fp32 by the instruction.
template <>
struct Product<bf16_t> {
  using Operand = __m512i;
  static Operand query(const float* q) { return _mm512_load_si512(q); }
  static Operand key(const bf16_t* k) { return _mm512_loadu_si512(k); }
  static Operand key(const bf16_t* k, int64_t n) { return _mm512_maskz_loadu_epi16(first_halves(n), k); }
  static vfloat add(vfloat sum, Operand q, Operand k) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(q), reinterpret_cast<__m512bh>(k));
  }
  static void set_query(float* to, const bf16_t* from, int64_t n) {
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_halves(n), from));
  }
};
#endif

template <class T>
inline void prefetch_pair(const T* p) {
  __builtin_prefetch(p, 0, 2);
  if (kPair * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + 64, 0, 2);
}

// A cache's rows of one KV head, and the positions of them that some query attends to.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, width;
  const T* at(int32_t position) const { return data + position * stride; }
};

// Dot products of kQueries queries with kLanes keys: to[i * to_stride + j]. `ahead`: elements to the row to prefetch,
// or 0.
template <class T, int kQueries>
void score_tile(const float* q, int64_t q_stride, const Rows<T>& keys, const int32_t* position, int64_t ahead,
                float* to, int64_t to_stride) {
  constexpr int kKeys = kLanes / kQueries;
  // Row after row, as the processor's own prefetch expects it, but where loading the queries takes longer than that:
  // there four rows share them.
  constexpr int kSide = kLanes == 16 && kQueries == 4 ? 4 : 1;
  using P = Product<T>;
  for (int first = 0; first < kLanes; first += kKeys) {
    vfloat total[kLanes];
    PPNET_UNROLL
    for (int i = 0; i < kLanes; ++i) total[i] = splat(0);
    const auto add = [&](int k, const typename P::Operand* query, typename P::Operand key) {
      PPNET_UNROLL
      for (int i = 0; i < kQueries; ++i) total[i * kKeys + k] = P::add(total[i * kKeys + k], query[i], key);
    };
    PPNET_UNROLL
    for (int k = 0; k < kKeys; k += kSide) {
      const T* row[kSide];
      PPNET_UNROLL
      for (int i = 0; i < kSide; ++i) row[i] = keys.at(position[first + k + i]);
      for (int64_t d = 0; d < keys.width; d += kPair) {
        typename P::Operand query[kQueries];
        PPNET_UNROLL
        for (int i = 0; i < kQueries; ++i) query[i] = P::query(q + i * q_stride + d);
        const int64_t left = keys.width - d;
        PPNET_UNROLL
        for (int i = 0; i < kSide; ++i) {
          if (ahead) prefetch_pair(row[i] + ahead + d);
          add(k + i, query, left >= kPair ? P::key(row[i] + d) : P::key(row[i] + d, left));
        }
      }
    }
    alignas(64) float sums[kLanes];
    store(sums, sum_each(total));
    PPNET_UNROLL
    for (int i = 0; i < kQueries; ++i) memcpy(to + i * to_stride + first, sums + i * kKeys, kKeys * sizeof(float));
  }
}

// sum[r][:] += weight[r][j] * values[position[j]][:] over n positions, for kRows rows and kPairs pairs of columns from
// column d; `left` < kPair: the one pair is the row's last and holds so many columns.
template <class T, int kRows, int kPairs, bool kPartial>
void value_tile(const float* weight, int64_t weight_stride, const Rows<T>& values, const int32_t* position, int64_t n,
                int64_t d, int64_t ahead, float* sum, int64_t sum_stride) {
  Pair total[kRows][kPairs];
  PPNET_UNROLL
  for (int r = 0; r < kRows; ++r)
    PPNET_UNROLL
    for (int u = 0; u < kPairs; ++u) {
      const float* from = sum + r * sum_stride + d + u * kPair;
      total[r][u] = {load(from), load(from + kLanes)};
    }
  for (int64_t j = 0; j < n; ++j) {
    const T* row = values.at(position[j]) + d;
    vfloat w[kRows];
    PPNET_UNROLL
    for (int r = 0; r < kRows; ++r) w[r] = splat(weight[r * weight_stride + j]);
    PPNET_UNROLL
    for (int u = 0; u < kPairs; ++u) {
      if (ahead) prefetch_pair(row + ahead + u * kPair);
      const Pair x = kPartial ? load_pair(row, values.width - d) : load_pair(row + u * kPair);
      PPNET_UNROLL
      for (int r = 0; r < kRows; ++r) {
        total[r][u].a = fma(w[r], x.a, total[r][u].a);
        total[r][u].b = fma(w[r], x.b, total[r][u].b);
      }
    }
  }
  PPNET_UNROLL
  for (int r = 0; r < kRows; ++r)
    PPNET_UNROLL
    for (int u = 0; u < kPairs; ++u) {
      float* to = sum + r * sum_stride + d + u * kPair;
      store(to, total[r][u].a);
      store(to + kLanes, total[r][u].b);
    }
}

// As value_tile, over all columns.
template <class T, int kRows>
void value_rows(const float* weight, int64_t weight_stride, const Rows<T>& values, const int32_t* position, int64_t n,
                int64_t ahead, float* sum, int64_t sum_stride) {
  constexpr int kPairs = kLanes == 16 ? (kRows == 4 ? 2 : 4) : 4 / kRows;  // as many sums as there are registers
  int64_t d = 0;
  for (; d + kPairs * kPair <= values.width; d += kPairs * kPair)
    value_tile<T, kRows, kPairs, false>(weight, weight_stride, values, position, n, d, ahead, sum, sum_stride);
  if (kPairs > 2 && d + 2 * kPair <= values.width) {
    value_tile<T, kRows, 2, false>(weight, weight_stride, values, position, n, d, ahead, sum, sum_stride);
    d += 2 * kPair;
  }
  for (; d + kPair <= values.width; d += kPair)
    value_tile<T, kRows, 1, false>(weight, weight_stride, values, position, n, d, ahead, sum, sum_stride);
  if (d < values.width)
    value_tile<T, kRows, 1, true>(weight, weight_stride, values, position, n, d, ahead, sum, sum_stride);
}

}  // namespace
