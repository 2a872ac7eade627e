// row_norms and its gradient: bodies, compiled once per instruction set (PPNET_ISA).
#include "row_norms.h"

#include "rows_line.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

template <class T>
using C = arithmetic_t<T>;

// Rows [r, r + N), or columns [begin, end) of them.
template <class T, int N>
struct Rows {
  const T *row[N], *next[N];
  T* out[N];
  C<T> factor[N];
  const C<T>* col_factor;

  Rows(const RowNormsJob& job, int64_t r, int64_t begin) {
    const auto* factors = static_cast<const C<T>*>(job.row_factor);
    col_factor = job.col_factor ? static_cast<const C<T>*>(job.col_factor) + begin : nullptr;
    for (int j = 0; j < N; ++j) {
      row[j] = reinterpret_cast<const T*>(job.weight + (r + j) * job.stride) + begin;
      next[j] = reinterpret_cast<const T*>(job.weight + min(r + j + N, job.rows - 1) * job.stride) + begin;
      out[j] = job.dweight ? reinterpret_cast<T*>(job.dweight) + (r + j) * job.cols + begin : nullptr;
      factor[j] = factors ? factors[r + j] : C<T>(1);
    }
  }
  void prefetch_line(int64_t i, int64_t n) const {
    constexpr int64_t kElements = kAhead / static_cast<int64_t>(sizeof(T));
    for (int j = 0; j < N; ++j) prefetch_ahead(row[j], next[j], i, min(kElements, n), n);
  }
};

// sums[j] = sum over i < n of (row[j][i] * col_factor[i])^2.
template <class T, bool kScaled, int N>
void square_rows(const Rows<T, N>& rows, int64_t n, C<T>* sums) {
  constexpr int64_t kRun = 64 * kPerLine<T>;  // summed apart, so that the error does not grow with the whole row
  C<T> total[N] = {};
  int64_t i = 0;
  for (int64_t run = 0; run < n; run += kRun) {
    const int64_t end = min(run + kRun, n);
    vector_t<T> sum_of[N][kVectors<T>] = {};
    for (; i + kPerLine<T> <= end; i += kPerLine<T>) {
      rows.prefetch_line(i, n);
      for (int j = 0; j < N; ++j) {
        vector_t<T> x[kVectors<T>];
        load_line(rows.row[j] + i, x);
        for (int v = 0; v < kVectors<T>; ++v) {
          if (kScaled) x[v] = x[v] * load(rows.col_factor + i + v * kWidth<T>);
          sum_of[j][v] = fma(x[v], x[v], sum_of[j][v]);
        }
      }
    }
    for (int j = 0; j < N; ++j) {
      C<T> ends = 0;
      for (int64_t k = i; k < end; ++k) {
        const C<T> x = widen(rows.row[j][k]) * (kScaled ? rows.col_factor[k] : C<T>(1));
        ends += x * x;
      }
      for (int v = 0; v < kVectors<T>; ++v) ends += sum(sum_of[j][v]);
      total[j] += ends;
    }
  }
  for (int j = 0; j < N; ++j) sums[j] = total[j];
}

// sums[i] += sum over j of (row[j][i] * factor[j])^2: summed apart first, so that fewer roundings are of the large sum.
template <class T, int N>
void square_columns(const Rows<T, N>& rows, int64_t n, C<T>* sums) {
  int64_t i = 0;
  for (; i + kPerLine<T> <= n; i += kPerLine<T>) {
    rows.prefetch_line(i, n);
    vector_t<T> total[kVectors<T>] = {};
    for (int j = 0; j < N; ++j) {
      vector_t<T> x[kVectors<T>];
      load_line(rows.row[j] + i, x);
      for (int v = 0; v < kVectors<T>; ++v) {
        x[v] = x[v] * splat(rows.factor[j]);
        total[v] = fma(x[v], x[v], total[v]);
      }
    }
    for (int v = 0; v < kVectors<T>; ++v) store(sums + i + v * kWidth<T>, load(sums + i + v * kWidth<T>) + total[v]);
  }
  for (; i < n; ++i)
    for (int j = 0; j < N; ++j) {
      const C<T> x = widen(rows.row[j][i]) * rows.factor[j];
      sums[i] += x * x;
    }
}

// out[j][i] = row[j][i] * factor[j] * col_factor[i], where there is an output; and, over i < n:
// kByRow: sums[j] = sum of row[j][i]^2 * col_factor[i]; otherwise sums[i] += row[j][i]^2 * factor[j], where there are
// sums.
template <class T, bool kByRow, int N>
void differentiate(const Rows<T, N>& rows, int64_t n, C<T>* sums, bool stream) {
  vector_t<T> sum_of[N][kVectors<T>] = {};
  int64_t i = 0;
  for (; i + kPerLine<T> <= n; i += kPerLine<T>) {
    rows.prefetch_line(i, n);
    vector_t<T> factor[kVectors<T>], total[kVectors<T>] = {};
    for (int v = 0; v < kVectors<T>; ++v) {
      const int64_t at = i + v * kWidth<T>;
      factor[v] = rows.col_factor ? load(rows.col_factor + at) : splat(C<T>(1));
    }
    for (int j = 0; j < N; ++j) {
      vector_t<T> y[kVectors<T>];
      for (int v = 0; v < kVectors<T>; ++v) {
        const vector_t<T> x = load(rows.row[j] + i + v * kWidth<T>);
        if (kByRow)
          sum_of[j][v] = fma(x * x, factor[v], sum_of[j][v]);
        else if (sums)
          total[v] = fma(x * x, splat(rows.factor[j]), total[v]);
        y[v] = x * (splat(rows.factor[j]) * factor[v]);
      }
      if (rows.out[j]) put_rounded(rows.out[j] + i, y, stream);
    }
    for (int v = 0; !kByRow && sums && v < kVectors<T>; ++v) {
      C<T>* at = sums + i + v * kWidth<T>;
      store(at, load(at) + total[v]);
    }
  }
  for (int j = 0; j < N; ++j) {
    C<T> ends = 0;
    for (int64_t k = i; k < n; ++k) {
      const C<T> x = widen(rows.row[j][k]), factor = rows.col_factor ? rows.col_factor[k] : C<T>(1);
      if (kByRow)
        ends += x * x * factor;
      else if (sums)
        sums[k] += x * x * rows.factor[j];
      if (rows.out[j]) narrow(x * (rows.factor[j] * factor), rows.out[j][k]);
    }
    if (!kByRow || sums == nullptr) continue;
    for (int v = 0; v < kVectors<T>; ++v) ends += sum(sum_of[j][v]);
    sums[j] = ends;
  }
}

template <class T, int N>
void forward_rows(const RowNormsJob& job, int64_t r) {
  const Rows<T, N> rows(job, r, 0);
  C<T>* sums = static_cast<C<T>*>(job.sums) + r;
  job.col_factor ? square_rows<T, true>(rows, job.cols, sums) : square_rows<T, false>(rows, job.cols, sums);
}

// body(rows, n, sums) for the rows and columns of one block and strip.
template <class T, class Body>
void for_block(const RowNormsJob& job, int64_t unit, const Body& body) {
  const int64_t block = unit / norm_strips(job), begin = unit % norm_strips(job) * kStripCols;
  const int64_t n = min(kStripCols, job.cols - begin), last = min((block + 1) * kBlockRows, job.rows);
  C<T>* sums = static_cast<C<T>*>(job.partial) + block * job.cols + begin;
  memset(sums, 0, static_cast<size_t>(n) * sizeof(C<T>));
  int64_t r = block * kBlockRows;
  for (; r + kStreams <= last; r += kStreams) body(Rows<T, kStreams>(job, r, begin), n, sums);
  for (; r < last; ++r) body(Rows<T, 1>(job, r, begin), n, sums);
}

template <class T>
void forward(const RowNormsJob& job, int64_t begin, int64_t end) {
  if (is_absolute(job)) {
    const T* from = reinterpret_cast<const T*>(job.weight);
    C<T>* to = static_cast<C<T>*>(job.partial);
    for (int64_t i = begin * kStripCols; i < min(end * kStripCols, job.cols); ++i) {
      const C<T> x = widen(from[i]);
      to[i] = x < 0 ? -x : x + C<T>(0);  // + 0: of -0 as well
    }
    return;
  }
  if (job.partial) {
    for (int64_t unit = begin; unit < end; ++unit)
      for_block<T>(job, unit, [](const auto& rows, int64_t n, C<T>* sums) { square_columns(rows, n, sums); });
    return;
  }
  int64_t r = begin * kNormRows;
  end = min(end * kNormRows, job.rows);
  for (; r + kStreams <= end; r += kStreams) forward_rows<T, kStreams>(job, r);
  for (; r < end; ++r) forward_rows<T, 1>(job, r);
}

template <class T>
void backward(const RowNormsJob& job, int64_t begin, int64_t end, bool stream) {
  // Lines of the output are whole where every row starts on one.
  stream = stream && to_boundary(reinterpret_cast<const T*>(job.dweight)) == 0 && job.cols % kPerLine<T> == 0;
  if (job.partial) {
    for (int64_t unit = begin; unit < end; ++unit)
      for_block<T>(job, unit, [stream](const auto& rows, int64_t n, C<T>* sums) {
        differentiate<T, false>(rows, n, sums, stream);
      });
    return finish_stream(stream);
  }
  C<T>* sums = static_cast<C<T>*>(job.sums);
  int64_t r = begin * kNormRows;
  end = min(end * kNormRows, job.rows);
  for (; r + kStreams <= end; r += kStreams)
    differentiate<T, true>(Rows<T, kStreams>(job, r, 0), job.cols, sums ? sums + r : nullptr, stream);
  for (; r < end; ++r) differentiate<T, true>(Rows<T, 1>(job, r, 0), job.cols, sums ? sums + r : nullptr, stream);
  finish_stream(stream);
}

}  // namespace

void row_norms(const RowNormsJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::f32: forward<float>(job, begin, end); break;
    case Dtype::bf16: forward<bf16_t>(job, begin, end); break;
    case Dtype::f16: forward<f16_t>(job, begin, end); break;
    case Dtype::f64: forward<double>(job, begin, end); break;
  }
}

void row_norms_backward(const RowNormsJob& job, int64_t begin, int64_t end, bool stream) {
  switch (job.dtype) {
    case Dtype::f32: backward<float>(job, begin, end, stream); break;
    case Dtype::bf16: backward<bf16_t>(job, begin, end, stream); break;
    case Dtype::f16: backward<f16_t>(job, begin, end, stream); break;
    case Dtype::f64: backward<double>(job, begin, end, stream); break;
  }
}

}  // namespace PPNET_ISA
}  // namespace ppnet
