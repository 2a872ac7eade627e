// Rows on their way from one place to another, a cache line at a time: copied, scaled, multiplied with a weight.
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
#pragma once

#include "vec.h"

namespace {

constexpr int64_t kLine = 64;  // bytes
template <class T>
constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(T));

// How many rows are read side by side, and how far ahead (bytes). One stream of loads leaves the memory idle: a core
// follows it only to the end of a page, and waits there. Four streams, prefetched into the second-level cache, read at
// the bandwidth of a plain copy; into the first level they would wait for its few miss buffers.
constexpr int kStreams = 4;
constexpr int64_t kAhead = 2048;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// Copies a line. With `stream` it goes around the cache, which saves reading the destination first; it must be aligned.
inline void put_line(void* to, const void* from, bool stream) {
#if defined(__AVX512F__)
  const __m512i line = _mm512_loadu_si512(from);
  if (stream)
    _mm512_stream_si512(static_cast<__m512i*>(to), line);
  else
    _mm512_storeu_si512(to, line);
#elif defined(__x86_64__)
  for (int i = 0; i < 4; ++i) {
    const __m128i part = _mm_loadu_si128(static_cast<const __m128i*>(from) + i);
    if (stream)
      _mm_stream_si128(static_cast<__m128i*>(to) + i, part);
    else
      _mm_storeu_si128(static_cast<__m128i*>(to) + i, part);
  }
#else
  (void)stream;
  memcpy(to, from, kLine);
#endif
}

// Streamed lines become visible to the thread that reads the output only after a fence.
inline void finish_stream(bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
  (void)stream;
}

// Elements up to the next line of `to`.
template <class T>
inline int64_t to_boundary(const T* to) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & (kLine - 1)) / static_cast<int64_t>(sizeof(T));
}

// The vector of the arithmetic: vfloat, or two doubles.
typedef double vdouble __attribute__((vector_size(16)));
inline vdouble load(const double* p) {
  vdouble out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline void load_line(const double* p, vdouble* x) { memcpy(x, p, kLine); }
inline void store(double* p, vdouble x) { memcpy(p, &x, sizeof x); }
inline vdouble splat(double x) { return vdouble{x, x}; }
inline vdouble fma(vdouble a, vdouble b, vdouble c) { return a * b + c; }
inline double sum(vdouble a) { return a[0] + a[1]; }

template <class T>
struct Vector {
  using type = vfloat;
};
template <>
struct Vector<double> {
  using type = vdouble;
};
template <class T>
using vector_t = typename Vector<T>::type;
template <class T>
constexpr int kWidth = sizeof(vector_t<T>) / sizeof(arithmetic_t<T>);
template <class T>
constexpr int kVectors = kPerLine<T> / kWidth<T>;  // of a line

// Rounds a line and puts it.
template <class T>
inline void put_rounded(T* to, const vector_t<T>* x, bool stream) {
  alignas(kLine) T rounded[kPerLine<T>];
  for (int v = 0; v < kVectors<T>; ++v) store(rounded + v * kWidth<T>, x[v]);
  put_line(to, rounded, stream);
}
#if defined(__AVX512F__)
// Not through memory: a load of two stores waits until both have left the core.
inline void put_halves(void* to, __m256i low, __m256i high, bool stream) {
  const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  if (stream)
    _mm512_stream_si512(static_cast<__m512i*>(to), line);
  else
    _mm512_storeu_si512(to, line);
}
inline void put_rounded(bf16_t* to, const vfloat* x, bool stream) {
#if defined(__AVX512BF16__)
  // The instruction takes denormals for zero, and keeps the bits of a NaN that narrow_bf16 drops.
  constexpr int kNanOrDenormal = 0x01 | 0x80 | 0x20;
  if ((_mm512_fpclass_ps_mask(x[0], kNanOrDenormal) | _mm512_fpclass_ps_mask(x[1], kNanOrDenormal)) == 0) {
    const __m512i line = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0]));
    if (stream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    else
      _mm512_storeu_si512(to, line);
    return;
  }
#endif
  put_halves(to, narrow_bf16(x[0]), narrow_bf16(x[1]), stream);
}
inline void put_rounded(f16_t* to, const vfloat* x, bool stream) {
  put_halves(to, narrow_f16(x[0]), narrow_f16(x[1]), stream);
}
#endif

enum class Scale { none, row, element };

// to[i] = from[i] * scale (Scale::element: * scale[i]), computed in the type of the arithmetic and rounded once.
template <class T>
struct Move {
  T* to;  // null: only the dot
  const T* from;
  const arithmetic_t<T>* scale;
  const T* weight;              // null: no dot
  const T *next, *next_weight;  // what the same stream reads afterwards
};

// The sum of from[i] * weight[i]: lane by lane over whole lines, and over what is less than a line at either end.
template <class T>
struct Dot {
  vector_t<T> lines[kVectors<T>] = {};
  arithmetic_t<T> ends = 0;
  arithmetic_t<T> total() const {
    arithmetic_t<T> all = ends;
    for (int v = 0; v < kVectors<T>; ++v) all += sum(lines[v]);
    return all;
  }
};

// Elements [begin, end), less than a line of them.
template <class T, Scale kScale, bool kDot>
inline void move_part(const Move<T>& row, int64_t begin, int64_t end, Dot<T>& dot) {
  for (int64_t i = begin; i < end; ++i) {
    const arithmetic_t<T> x = widen(row.from[i]);
    if (kDot) dot.ends += x * widen(row.weight[i]);
    if (row.to == nullptr) continue;
    if (kScale == Scale::none)
      row.to[i] = row.from[i];
    else
      narrow(x * row.scale[kScale == Scale::element ? i : 0], row.to[i]);
  }
}

template <class T, Scale kScale, bool kDot>
inline void move_line(const Move<T>& row, int64_t i, bool stream, Dot<T>& dot) {
  vector_t<T> x[kVectors<T>];
  if (kDot || kScale != Scale::none)
    for (int v = 0; v < kVectors<T>; ++v) x[v] = load(row.from + i + v * kWidth<T>);
  if (kDot) {
    for (int v = 0; v < kVectors<T>; ++v) dot.lines[v] = fma(x[v], load(row.weight + i + v * kWidth<T>), dot.lines[v]);
    if (row.to == nullptr) return;
  }
  if (kScale == Scale::none) return put_line(row.to + i, row.from + i, stream);
  for (int v = 0; v < kVectors<T>; ++v)
    x[v] = x[v] * (kScale == Scale::row ? splat(*row.scale) : load(row.scale + i + v * kWidth<T>));
  put_rounded(row.to + i, x, stream);
}

template <class T, Scale kScale, bool kDot>
inline void move_span(const Move<T>& row, int64_t begin, int64_t end, bool stream, Dot<T>& dot) {
  int64_t i = stream ? min(end, begin + to_boundary(row.to + begin)) : begin;
  move_part<T, kScale, kDot>(row, begin, i, dot);
  for (; i + kPerLine<T> <= end; i += kPerLine<T>) move_line<T, kScale, kDot>(row, i, stream, dot);
  move_part<T, kScale, kDot>(row, i, end, dot);
}

template <class T>
inline void prefetch_ahead(const T* from, const T* next, int64_t i, int64_t ahead, int64_t n) {
  prefetch(i + ahead < n ? from + i + ahead : next + (i + ahead - n));
}

// N rows of n elements side by side. dot[j]: where the sum of row j goes.
template <class T, Scale kScale, bool kDot, int N>
void move_rows(const Move<T>* row, arithmetic_t<T>* const* dot, int64_t n, bool stream) {
  Dot<T> sum[N];
  int64_t first[N], lines = n / kPerLine<T>;
  for (int j = 0; j < N; ++j) {
    first[j] = stream ? min(n, to_boundary(row[j].to)) : 0;
    move_part<T, kScale, kDot>(row[j], 0, first[j], sum[j]);
    lines = min(lines, (n - first[j]) / kPerLine<T>);
  }
  const int64_t ahead = min(kAhead / static_cast<int64_t>(sizeof(T)), n);
  for (int64_t i = 0; i < lines * kPerLine<T>; i += kPerLine<T>) {
    for (int j = 0; j < N; ++j) {
      prefetch_ahead(row[j].from, row[j].next, i, ahead, n);
      if (kDot) prefetch_ahead(row[j].weight, row[j].next_weight, i, ahead, n);
    }
    for (int j = 0; j < N; ++j) move_line<T, kScale, kDot>(row[j], first[j] + i, stream, sum[j]);
  }
  for (int j = 0; j < N; ++j) {
    move_span<T, kScale, kDot>(row[j], first[j] + lines * kPerLine<T>, n, stream, sum[j]);
    if (kDot) *dot[j] = sum[j].total();
  }
}

template <class T>
void zero_row(T* to, int64_t n, bool stream) {
  alignas(kLine) const T zero[kPerLine<T>] = {};
  int64_t i = stream ? min(n, to_boundary(to)) : 0;
  memset(to, 0, static_cast<size_t>(i) * sizeof(T));
  for (; i + kPerLine<T> <= n; i += kPerLine<T>) put_line(to + i, zero, stream);
  memset(to + i, 0, static_cast<size_t>(n - i) * sizeof(T));
}

}  // namespace
