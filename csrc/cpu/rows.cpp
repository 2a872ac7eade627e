// gather_rows and scatter_rows: bodies, compiled once per instruction set (PPNET_ISA).
#include "rows.h"

#include "rows_line.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

// --- rows: whole rows are copied, kStreams of them side by side -----------------------------------------------------

template <class T, Scale kScale, bool kDot>
void move_group(const Move<T>* row, arithmetic_t<T>* const* dot, int count, int64_t n, bool stream) {
  if (count == kStreams) return move_rows<T, kScale, kDot, kStreams>(row, dot, n, stream);
  for (int j = 0; j < count; ++j) move_rows<T, kScale, kDot, 1>(row + j, dot + j, n, stream);
}

template <class T>
const T* source_row(const RowsJob& job, int64_t r) {
  return reinterpret_cast<const T*>(job.src + r * job.src_stride);
}

template <class T>
const T* weight_row(const RowsJob& job, int64_t r) {
  return reinterpret_cast<const T*>(job.weight + r * job.weight_stride);
}

template <class T, Scale kScale>
void gather_whole(const RowsJob& job, int64_t begin, int64_t end, bool stream) {
  T* out = reinterpret_cast<T*>(job.out);
  const auto* scale = static_cast<const arithmetic_t<T>*>(job.scale);
  for (int64_t k = begin; k < end; k += kStreams) {
    const int count = static_cast<int>(min(kStreams, end - k));
    Move<T> row[kStreams];
    for (int j = 0; j < count; ++j)
      row[j] = {out + (k + j) * job.cols,
                source_row<T>(job, job.index[k + j]),
                scale ? scale + k + j : nullptr,
                nullptr,
                source_row<T>(job, job.index[min(k + j + kStreams, job.kept - 1)]),
                nullptr};
    move_group<T, kScale, false>(row, nullptr, count, job.cols, stream);
  }
}

// The next kept rows of [f, end), kStreams or fewer at the end; the absent rows before them are zeroed.
struct KeptRows {
  int64_t f[kStreams];
  int count;
};

template <class T>
KeptRows next_kept(const RowsJob& job, int64_t& f, int64_t end, bool stream) {
  KeptRows kept;
  for (kept.count = 0; f < end && kept.count < kStreams; ++f) {
    if (job.index[f] >= 0)
      kept.f[kept.count++] = f;
    else if (job.out)
      zero_row(reinterpret_cast<T*>(job.out) + f * job.cols, job.cols, stream);
  }
  return kept;
}

template <class T, Scale kScale, bool kDot>
void scatter_whole(const RowsJob& job, int64_t begin, int64_t end, bool stream) {
  using C = arithmetic_t<T>;
  int64_t f = begin;
  KeptRows now = next_kept<T>(job, f, end, stream);
  while (now.count > 0) {
    const KeptRows next = next_kept<T>(job, f, end, stream);
    Move<T> row[kStreams];
    C* dot[kStreams] = {};
    for (int j = 0; j < now.count; ++j) {
      const int64_t k = job.index[now.f[j]], after = next.count == kStreams ? next.f[j] : now.f[j];
      row[j] = {job.out ? reinterpret_cast<T*>(job.out) + now.f[j] * job.cols : nullptr, source_row<T>(job, k),
                job.scale ? static_cast<const C*>(job.scale) + k : nullptr, nullptr,
                source_row<T>(job, job.index[after]), nullptr};
      if (!kDot) continue;
      row[j].weight = weight_row<T>(job, now.f[j]);
      row[j].next_weight = weight_row<T>(job, after);
      dot[j] = static_cast<C*>(job.dot) + k;
    }
    move_group<T, kScale, kDot>(row, dot, now.count, job.cols, stream);
    now = next;
  }
}

// --- columns: kStreams rows at a time, block by block through a scratch buffer in the first-level cache --------------

template <class T>
constexpr int64_t kBlock = kColumnBlock / static_cast<int64_t>(sizeof(T));
template <class T>
constexpr int64_t kScratchRow = kColumnScratch / static_cast<int64_t>(sizeof(T));

// Columns [begin, begin + count) of N rows from r on, out of the scratch buffer.
template <class T, int N>
void put_columns(const RowsJob& job, int64_t r, int64_t begin, int64_t count, const T* scratch, bool stream) {
  using C = arithmetic_t<T>;
  const C* scale = job.scale ? static_cast<const C*>(job.scale) + begin : nullptr;
  for (int j = 0; j < N; ++j) {
    const Move<T> row{reinterpret_cast<T*>(job.out) + (r + j) * job.cols + begin, scratch + j * kScratchRow<T>, scale,
                      nullptr, nullptr, nullptr};
    Dot<T> none;
    if (scale)
      move_span<T, Scale::element, false>(row, 0, count, stream, none);
    else
      move_span<T, Scale::none, false>(row, 0, count, stream, none);
  }
}

// Whether columns are compressed and expanded by vector instructions: those of 16 bits need VBMI2.
#if defined(__AVX512VBMI2__)
template <class T>
constexpr bool kCompress = sizeof(T) <= 4;
#elif defined(__AVX512F__)
template <class T>
constexpr bool kCompress = sizeof(T) == 4;
#endif

#if defined(__AVX512F__)
// One line of 16- or 32-bit elements; those whose bit is not set are not touched.
template <class T>
inline __m512i load_masked(const T* from, uint64_t bits) {
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits), from);
  else return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits), from);
}
// The elements whose bits are set, densely.
template <class T>
inline __m512i compress(__m512i line, uint64_t bits) {
  if constexpr (sizeof(T) == 4) return _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), line);
  else return _mm512_maskz_compress_epi16(static_cast<__mmask32>(bits), line);
}
// The first elements of the line where bits are set, zero elsewhere.
template <class T>
inline __m512i expand(__m512i line, uint64_t bits) {
  if constexpr (sizeof(T) == 4) return _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), line);
  else return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), line);
}
template <class T>
constexpr uint64_t kLineBits = (uint64_t{1} << kPerLine<T>) - 1;

template <class T>
inline void prefetch_word(const T* from) {
  for (int64_t i = 0; i < 64; i += kPerLine<T>) prefetch(reinterpret_cast<const char*>(from + i) + kAhead);
}

// 64 columns of N rows: those whose bits are set go to `to`, densely, and up to a vector more is written.
// `whole`: all 64 columns exist, and may be read.
template <class T, int N>
inline void compress_word(T* to, const T* const* from, int64_t f, uint64_t bits, bool whole) {
  for (int j = 0; j < N; ++j) prefetch_word(from[j] + f);
  for (int64_t i = f; i < f + 64; i += kPerLine<T>, bits = bits >> (kPerLine<T> - 1) >> 1) {
    const uint64_t lanes = bits & kLineBits<T>;
    for (int j = 0; j < N; ++j) {
      const __m512i line = whole ? _mm512_loadu_si512(from[j] + i) : load_masked(from[j] + i, lanes);
      _mm512_storeu_si512(to + j * kScratchRow<T>, compress<T>(line, lanes));
    }
    to += __builtin_popcountll(lanes);
  }
}

// The reverse: the next elements of `from` go to the columns of `to` whose bits are set, zero to the others.
template <class T, int N>
inline void expand_word(T* to, const T* const* from, int64_t at, uint64_t bits, bool whole) {
  for (int j = 0; j < N; ++j) prefetch_word(from[j] + at);
  for (int64_t i = 0; i < 64; i += kPerLine<T>, bits = bits >> (kPerLine<T> - 1) >> 1) {
    const uint64_t lanes = bits & kLineBits<T>;
    const int count = __builtin_popcountll(lanes);
    const uint64_t first = _bzhi_u64(~0ull, static_cast<unsigned>(count));
    for (int j = 0; j < N; ++j) {
      const __m512i line = whole ? _mm512_loadu_si512(from[j] + at) : load_masked(from[j] + at, first);
      _mm512_store_si512(to + j * kScratchRow<T> + i, expand<T>(line, lanes));
    }
    at += count;
  }
}

// out[k] = from[idx[k]] for an increasing idx, given as one bit per column: 64 columns at a time.
template <class T, int N>
void gather_compressed(const RowsJob& job, int64_t r, bool stream, T* scratch) {
  const T* from[N];
  for (int j = 0; j < N; ++j) from[j] = source_row<T>(job, r + j);
  int64_t done = 0, fill = 0;
  for (int64_t f = 0; f < job.full; f += 64) {
    const uint64_t bits = job.mask[f / 64];
    compress_word<T, N>(scratch + fill, from, f, bits, f + 64 <= job.full);
    fill += __builtin_popcountll(bits);
    if (fill < kBlock<T>) continue;
    put_columns<T, N>(job, r, done, kBlock<T>, scratch, stream);
    done += kBlock<T>;
    fill -= kBlock<T>;
    for (int j = 0; j < N; ++j)
      memcpy(scratch + j * kScratchRow<T>, scratch + j * kScratchRow<T> + kBlock<T>,
             static_cast<size_t>(fill) * sizeof(T));
  }
  put_columns<T, N>(job, r, done, fill, scratch, stream);
}
#endif

template <class T, int N>
void gather_columns(const RowsJob& job, int64_t r, bool stream, T* scratch) {
#if defined(__AVX512F__)
  if constexpr (kCompress<T>)
    if (job.mask) return gather_compressed<T, N>(job, r, stream, scratch);
#endif
  for (int64_t begin = 0; begin < job.cols; begin += kBlock<T>) {
    const int64_t count = min(kBlock<T>, job.cols - begin);
    for (int64_t k = 0; k < count; ++k)
      for (int j = 0; j < N; ++j)
        scratch[j * kScratchRow<T> + k] = source_row<T>(job, r + j)[job.index[begin + k]];
    put_columns<T, N>(job, r, begin, count, scratch, stream);
  }
}

// Columns [begin, begin + count) of N full rows into the scratch buffer; `at`: the first kept column not yet read.
template <class T, int N>
void expand_block(const RowsJob& job, int64_t r, int64_t begin, int64_t count, int64_t& at, T* scratch) {
#if defined(__AVX512F__)
  if constexpr (kCompress<T>) {
    if (job.mask) {
      const T* from[N];
      for (int j = 0; j < N; ++j) from[j] = source_row<T>(job, r + j);
      for (int64_t f = 0; f < count; f += 64) {
        const uint64_t bits = job.mask[(begin + f) / 64];
        expand_word<T, N>(scratch + f, from, at, bits, at + 64 + kPerLine<T> <= job.kept);
        at += __builtin_popcountll(bits);
      }
      return;
    }
  }
#endif
  for (int j = 0; j < N; ++j) memset(scratch + j * kScratchRow<T>, 0, static_cast<size_t>(count) * sizeof(T));
  for (; at < job.kept && job.index[at] < begin + count; ++at) {
    const int64_t k = job.order ? job.order[at] : at;
    for (int j = 0; j < N; ++j) scratch[j * kScratchRow<T> + job.index[at] - begin] = source_row<T>(job, r + j)[k];
  }
}

// sum[f] += row[f] * weight[f] over N rows, one after the other.
template <class T, int N>
void add_products(const RowsJob& job, int64_t r, int64_t begin, int64_t count, const T* scratch, arithmetic_t<T>* sum) {
  const T* weight[N];
  for (int j = 0; j < N; ++j) weight[j] = weight_row<T>(job, r + j) + begin;
  int64_t i = 0;
  for (; i + kPerLine<T> <= count; i += kPerLine<T>) {
    for (int j = 0; j < N; ++j) prefetch(reinterpret_cast<const char*>(weight[j] + i) + kAhead);
    for (int64_t v = i; v < i + kPerLine<T>; v += kWidth<T>) {
      auto total = load(sum + v);
      for (int j = 0; j < N; ++j) total = fma(load(scratch + j * kScratchRow<T> + v), load(weight[j] + v), total);
      store(sum + v, total);
    }
  }
  for (; i < count; ++i)
    for (int j = 0; j < N; ++j) sum[i] += widen(scratch[j * kScratchRow<T> + i]) * widen(weight[j][i]);
}

template <class T, int N>
void scatter_columns(const RowsJob& job, int64_t r, bool stream, T* scratch, arithmetic_t<T>* partial) {
  int64_t at = 0;
  for (int64_t begin = 0; begin < job.cols; begin += kBlock<T>) {
    const int64_t count = min(kBlock<T>, job.cols - begin);
    expand_block<T, N>(job, r, begin, count, at, scratch);
    if (partial) add_products<T, N>(job, r, begin, count, scratch, partial + begin);
    if (job.out) put_columns<T, N>(job, r, begin, count, scratch, stream);
  }
}

template <class T>
void gather(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch) {
  begin *= unit_rows(job), end = min(end * unit_rows(job), job.rows);
  if (!job.columns)
    return job.scale ? gather_whole<T, Scale::row>(job, begin, end, stream)
                     : gather_whole<T, Scale::none>(job, begin, end, stream);
  int64_t r = begin;
  for (; r + kStreams <= end; r += kStreams) gather_columns<T, kStreams>(job, r, stream, static_cast<T*>(scratch));
  for (; r < end; ++r) gather_columns<T, 1>(job, r, stream, static_cast<T*>(scratch));
}

template <class T>
void scatter(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch) {
  using C = arithmetic_t<T>;
  if (!job.columns) {
    begin *= unit_rows(job), end = min(end * unit_rows(job), job.rows);
    if (job.dot)  // not job.weight, which is null where rows have no width
      return job.scale ? scatter_whole<T, Scale::row, true>(job, begin, end, stream)
                       : scatter_whole<T, Scale::none, true>(job, begin, end, stream);
    return job.scale ? scatter_whole<T, Scale::row, false>(job, begin, end, stream)
                     : scatter_whole<T, Scale::none, false>(job, begin, end, stream);
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    C* partial = job.weight ? static_cast<C*>(job.partial) + unit * job.cols : nullptr;
    if (partial) memset(partial, 0, static_cast<size_t>(job.cols) * sizeof(C));
    int64_t r = unit * kColumnUnit;
    const int64_t last = min(r + kColumnUnit, job.rows);
    for (; r + kStreams <= last; r += kStreams)
      scatter_columns<T, kStreams>(job, r, stream, static_cast<T*>(scratch), partial);
    for (; r < last; ++r) scatter_columns<T, 1>(job, r, stream, static_cast<T*>(scratch), partial);
  }
}

template <class C>
void reduce(const RowsJob& job) {
  const C* partial = static_cast<const C*>(job.partial);
  C* dot = static_cast<C*>(job.dot);
  memset(dot, 0, static_cast<size_t>(job.kept) * sizeof(C));
  for (int64_t unit = 0; unit < units(job); ++unit)
    for (int64_t k = 0; k < job.kept; ++k)
      dot[job.order ? job.order[k] : k] += partial[unit * job.cols + job.index[k]];
}

}  // namespace

void gather_rows(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch) {
  switch (job.dtype) {
    case Dtype::f32: gather<float>(job, begin, end, stream, scratch); break;
    case Dtype::bf16: gather<bf16_t>(job, begin, end, stream, scratch); break;
    case Dtype::f16: gather<f16_t>(job, begin, end, stream, scratch); break;
    case Dtype::f64: gather<double>(job, begin, end, stream, scratch); break;
  }
  finish_stream(stream);
}

void scatter_rows(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch) {
  switch (job.dtype) {
    case Dtype::f32: scatter<float>(job, begin, end, stream, scratch); break;
    case Dtype::bf16: scatter<bf16_t>(job, begin, end, stream, scratch); break;
    case Dtype::f16: scatter<f16_t>(job, begin, end, stream, scratch); break;
    case Dtype::f64: scatter<double>(job, begin, end, stream, scratch); break;
  }
  finish_stream(stream);
}

void reduce_dot(const RowsJob& job) {
  if (job.dtype == Dtype::f64)
    reduce<double>(job);
  else
    reduce<float>(job);
}

}  // namespace PPNET_ISA
}  // namespace ppnet
