// gated_act and its backward: bodies, compiled once per instruction set (PPNET_ISA).
#include "gated_act.h"

#include "activations.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

// The work on a line must be part of the loop over lines, or its constants are loaded anew for each.
#define PPNET_INLINE __attribute__((always_inline)) inline

// ---- rows -----------------------------------------------------------------------------------------------------------

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Fetches what a row needs next: a core follows a stream of loads only to the end of a page, and computes too much per
// line to look so far ahead itself. Rows of an input usually follow each other; a fetch past its end does nothing.
inline void fetch(const void* p) {
  constexpr int64_t kAhead = 3072;  // bytes
  __builtin_prefetch(static_cast<const char*>(p) + kAhead, 0, 2);
}

// Walks over n elements: step.line(i) for a cache line of the output, step.some(i, m) for the m <= lanes elements at a
// time after them and, with kStream, before the first line of `out`.
template <bool kStream, class T, class Step>
inline void over_row(const T* out, int64_t n, const Step& step) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t i = 0;
  if (kStream) {
    const int64_t head = smaller(n, static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) & 63) / sizeof(T)));
    for (int64_t part; i < head; i += part) step.some(i, part = smaller(lanes, head - i));
  }
  for (; i + kLine<T> <= n; i += kLine<T>) step.line(i);
  for (; i < n; i += lanes) step.some(i, smaller(lanes, n - i));
}

// Stores the vectors of one line.
template <bool kStream, class T, class V>
inline void put_line(T* p, const V* x) {
  if (kStream) {
    stream_line(p, x);
  } else {
    for (int64_t i = 0; i < kLine<T>; i += Vector<T>::lanes, ++x) put(p + i, *x);
  }
}

template <class A, bool kGate, bool kStream, class T>
struct Forward {
  using V = typename Vector<T>::type;
  using C = arithmetic_t<T>;
  static constexpr int64_t lanes = Vector<T>::lanes;
  static constexpr bool kShort = kRoundsShort<T>;
  const T *up, *gate;
  const C* z;
  T* h;

  static V value(V up, V gate) { return kGate ? A::template value<kShort>(gate) * up : A::template value<kShort>(up); }
  PPNET_INLINE void line(int64_t i) const {
    fetch(up + i);
    if (kGate) fetch(gate + i);
    V of_up[kLine<T> / lanes], of_gate[kLine<T> / lanes] = {}, out[kLine<T> / lanes];
    load_line(up + i, of_up);
    if (kGate) load_line(gate + i, of_gate);
    PPNET_UNROLL
    for (int64_t j = 0; j < kLine<T> / lanes; ++j) {
      out[j] = value(of_up[j], of_gate[j]);
      if (z) out[j] = load(z + i + j * lanes) * out[j];
    }
    put_line<kStream>(h + i, out);
  }
  void some(int64_t i, int64_t n) const {
    V x = value(load(up + i, n), kGate ? load(gate + i, n) : V{});
    if (z) x = load(z + i, n) * x;
    put(h + i, x, n);
  }
};

template <class A, bool kGate, bool kStream, class T>
struct Backward {
  using V = typename Vector<T>::type;
  using C = arithmetic_t<T>;
  static constexpr int64_t lanes = Vector<T>::lanes;
  static constexpr bool kShort = kRoundsShort<T>;
  const T *dh, *up, *gate;
  const C* z;
  T *dup, *dgate;
  C* partial;

  struct Result {
    V dup, dgate, dz;
  };
  static Result value(V dh, V up, V gate, V z) {
    V f, slope;
    A::template both<kShort>(kGate ? gate : up, f, slope);
    const V through = dh * z;
    if (!kGate) return {through * slope, V{}, dh * f};
    return {through * f, through * up * slope, dh * f * up};
  }
  PPNET_INLINE void line(int64_t i) const {
    const int64_t start = i;
    fetch(dh + i);
    fetch(up + i);
    if (kGate) fetch(gate + i);
    V of_dh[kLine<T> / lanes], of_up[kLine<T> / lanes], of_gate[kLine<T> / lanes] = {};
    load_line(dh + i, of_dh);
    load_line(up + i, of_up);
    if (kGate) load_line(gate + i, of_gate);
    V to_up[kLine<T> / lanes], to_gate[kLine<T> / lanes];
    PPNET_UNROLL
    for (int64_t j = 0; j < kLine<T> / lanes; ++j, i += lanes) {
      const V factor = z ? load(z + i) : constant<V>(1);
      const Result r = value(of_dh[j], of_up[j], of_gate[j], factor);
      to_up[j] = r.dup;
      to_gate[j] = r.dgate;
      if (partial) store(partial + i, load(partial + i) + r.dz);
    }
    if (dup) put_line<kStream>(dup + start, to_up);
    if (kGate && dgate) put_line<kStream>(dgate + start, to_gate);
  }
  void some(int64_t i, int64_t n) const {
    const V factor = z ? load(z + i, n) : constant<V>(1);
    const Result r = value(load(dh + i, n), load(up + i, n), kGate ? load(gate + i, n) : V{}, factor);
    if (dup) put(dup + i, r.dup, n);
    if (kGate && dgate) put(dgate + i, r.dgate, n);
    if (partial) store(partial + i, load(partial + i, n) + r.dz, n);
  }
};

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class T>
inline T* at(char* base, int64_t row, int64_t col, int64_t stride) {
  return base ? reinterpret_cast<T*>(base + row * stride) + col : nullptr;
}
template <class T>
inline const T* at(const char* base, int64_t row, int64_t col, int64_t stride) {
  return base ? reinterpret_cast<const T*>(base + row * stride) + col : nullptr;
}

struct Tile {
  int64_t block, row, rows, col, cols;
};

inline Tile tile_at(const GatedActJob& job, int64_t index) {
  const int64_t block = index / col_blocks(job), row = block * kActRows, col = index % col_blocks(job) * tile_cols(job);
  return {block, row, smaller(kActRows, job.rows - row), col, smaller(tile_cols(job), job.cols - col)};
}

template <class A, bool kGate, bool kStream, class T>
void forward(const GatedActJob& job, const Tile& tile) {
  using C = arithmetic_t<T>;
  const C* z = job.z ? static_cast<const C*>(job.z) + tile.col : nullptr;
  const int64_t stride = job.cols * static_cast<int64_t>(sizeof(T));
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
    T* h = at<T>(job.h, r, tile.col, stride);
    over_row<kStream>(h, tile.cols,
                      Forward<A, kGate, kStream, T>{at<T>(job.up, r, tile.col, job.up_stride),
                                                    at<T>(job.gate, r, tile.col, job.gate_stride), z, h});
  }
}

template <class A, bool kGate, bool kStream, class T>
void backward(const GatedActJob& job, const Tile& tile) {
  using C = arithmetic_t<T>;
  const C* z = job.z ? static_cast<const C*>(job.z) + tile.col : nullptr;
  C* partial = job.dz ? static_cast<C*>(job.partial) + tile.block * job.cols + tile.col : nullptr;
  if (partial) memset(partial, 0, static_cast<size_t>(tile.cols) * sizeof(C));
  const int64_t stride = job.cols * static_cast<int64_t>(sizeof(T));
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
    T* dup = at<T>(job.dup, r, tile.col, stride);
    T* dgate = at<T>(job.dgate, r, tile.col, stride);
    over_row<kStream>(dup ? dup : dgate, tile.cols,
                      Backward<A, kGate, kStream, T>{at<T>(job.dh, r, tile.col, job.dh_stride),
                                                     at<T>(job.up, r, tile.col, job.up_stride),
                                                     at<T>(job.gate, r, tile.col, job.gate_stride), z, dup, dgate,
                                                     partial});
  }
}

// ---- from run time to compile time ----------------------------------------------------------------------------------

template <class A, bool kGate, class T>
void run(const GatedActJob& job, int64_t begin, int64_t end, bool streamed, bool is_backward) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(job, index);
    if (is_backward)
      streamed ? backward<A, kGate, true, T>(job, tile) : backward<A, kGate, false, T>(job, tile);
    else
      streamed ? forward<A, kGate, true, T>(job, tile) : forward<A, kGate, false, T>(job, tile);
  }
  if (streamed) finish_stream();
}

template <class A, class T>
void run(const GatedActJob& job, int64_t begin, int64_t end, bool streamed, bool is_backward) {
  if (job.gate)
    run<A, true, T>(job, begin, end, streamed, is_backward);
  else
    run<A, false, T>(job, begin, end, streamed, is_backward);
}

template <class T>
void run(const GatedActJob& job, int64_t begin, int64_t end, bool streamed, bool is_backward) {
  switch (job.act) {
    case Act::silu: run<Silu, T>(job, begin, end, streamed, is_backward); break;
    case Act::gelu: run<Gelu, T>(job, begin, end, streamed, is_backward); break;
    case Act::gelu_tanh: run<GeluTanh, T>(job, begin, end, streamed, is_backward); break;
    case Act::relu: run<Relu, T>(job, begin, end, streamed, is_backward); break;
    case Act::relu2: run<Relu2, T>(job, begin, end, streamed, is_backward); break;
  }
}

void run(const GatedActJob& job, int64_t begin, int64_t end, bool streamed, bool is_backward) {
  switch (job.dtype) {
    case Dtype::f32: run<float>(job, begin, end, streamed, is_backward); break;
    case Dtype::bf16: run<bf16_t>(job, begin, end, streamed, is_backward); break;
    case Dtype::f16: run<f16_t>(job, begin, end, streamed, is_backward); break;
    case Dtype::f64: run<double>(job, begin, end, streamed, is_backward); break;
  }
}

// Pairs of blocks, then pairs of pairs: the error grows with the logarithm of the number of blocks.
template <class C>
void reduce(const GatedActJob& job) {
  C* partial = static_cast<C*>(job.partial);
  const int64_t n = row_blocks(job), cols = job.cols;
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t b = 0; b + step < n; b += 2 * step)
      for (int64_t k = 0; k < cols; ++k) partial[b * cols + k] += partial[(b + step) * cols + k];
  if (n > 0)
    memcpy(job.dz, partial, static_cast<size_t>(cols) * sizeof(C));
  else
    memset(job.dz, 0, static_cast<size_t>(cols) * sizeof(C));
}

}  // namespace

void gated_act(const GatedActJob& job, int64_t begin, int64_t end, bool streamed) {
  run(job, begin, end, streamed, false);
}

void gated_act_backward(const GatedActJob& job, int64_t begin, int64_t end, bool streamed) {
  run(job, begin, end, streamed, true);
}

void gated_act_reduce(const GatedActJob& job) {
  if (job.dtype == Dtype::f64)
    reduce<double>(job);
  else
    reduce<float>(job);
}

}  // namespace PPNET_ISA
}  // namespace ppnet
