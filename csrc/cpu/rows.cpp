// gather_rows and scatter_rows: bodies, compiled once per instruction set (PPNET_ISA).
#include "rows.h"

#include "convert.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

constexpr int64_t kBlock = 512;  // elements converted at a time: stays in the first-level cache

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Copy; with `stream` whole cache lines go around the cache, which saves reading the destination first.
void copy_bytes(char* to, const char* from, int64_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    const int64_t head = min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63));
    memcpy(to, from, static_cast<size_t>(head));
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
      for (int64_t j = i; j < i + 64; j += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
#endif
    }
    memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
    return;
  }
#endif
  (void)stream;
  memcpy(to, from, static_cast<size_t>(bytes));
}

void zero_bytes(char* to, int64_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    const int64_t head = min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63));
    memset(to, 0, static_cast<size_t>(head));
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64)
      for (int64_t j = i; j < i + 64; j += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), _mm_setzero_si128());
    memset(to + i, 0, static_cast<size_t>(bytes - i));
    return;
  }
#endif
  (void)stream;
  memset(to, 0, static_cast<size_t>(bytes));
}

// Streamed lines become visible to the thread that reads the output only after a fence.
void finish_stream(bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
  (void)stream;
}

// to[i] = from[i] * scale (kVector: * scale[i]), computed in C and rounded once.
template <bool kVector, class T, class C>
void scale_row(T* to, const T* from, const C* scale, int64_t n, bool stream) {
  C wide[kBlock];
  alignas(64) T rounded[kBlock];
  // The first block ends on a cache line of the destination, so that all later ones are whole lines.
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) & 63) / static_cast<int64_t>(sizeof(T));
  int64_t block = kBlock - misaligned;
  for (int64_t i = 0; i < n; i += block, block = kBlock) {
    block = min(block, n - i);
    widen(from + i, wide, block);
    for (int64_t j = 0; j < block; ++j) wide[j] *= kVector ? scale[i + j] : scale[0];
    if (stream) {
      narrow(wide, rounded, block);
      copy_bytes(reinterpret_cast<char*>(to + i), reinterpret_cast<const char*>(rounded),
                 block * static_cast<int64_t>(sizeof(T)), true);
    } else {
      narrow(wide, to + i, block);
    }
  }
}

// Sum of a[i] * b[i]: independent sums over lanes, then a tree, so the error grows with n / kLanes.
template <class T, class C>
C dot_row(const T* a, const T* b, int64_t n) {
  constexpr int64_t kLanes = 32;
  C sum[kLanes] = {}, wide_a[kBlock], wide_b[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t block = min(kBlock, n - i);
    widen(a + i, wide_a, block);
    widen(b + i, wide_b, block);
    int64_t j = 0;
    for (; j + kLanes <= block; j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += wide_a[j + lane] * wide_b[j + lane];
    for (int64_t lane = 0; j + lane < block; ++lane) sum[lane] += wide_a[j + lane] * wide_b[j + lane];
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
  return sum[0];
}

// sum[i] += a[i] * b[i].
template <class T, class C>
void add_products(C* sum, const T* a, const T* b, int64_t n) {
  C wide_a[kBlock], wide_b[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t block = min(kBlock, n - i);
    widen(a + i, wide_a, block);
    widen(b + i, wide_b, block);
    for (int64_t j = 0; j < block; ++j) sum[i + j] += wide_a[j] * wide_b[j];
  }
}

// to[k] = from[idx[k]]. Where idx is increasing that is a compression of the row, 32 to 64 bytes at a time.
template <class T>
void select(T* to, const T* from, const RowsJob& job) {
#if defined(__AVX512VBMI2__)
  if (job.mask && sizeof(T) <= 4) {
    for (int64_t f = 0; f < job.full; f += 64) {
      uint64_t bits = job.mask[f / 64];
      for (const T* in = from + f; bits != 0;) {
        if constexpr (sizeof(T) == 4) {
          const auto lanes = static_cast<__mmask16>(bits);
          _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(lanes, _mm512_maskz_loadu_epi32(lanes, in)));
          to += __builtin_popcount(lanes), in += 16, bits >>= 16;
        } else {
          const auto lanes = static_cast<__mmask32>(bits);
          _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(lanes, _mm512_maskz_loadu_epi16(lanes, in)));
          to += __builtin_popcount(lanes), in += 32, bits >>= 32;
        }
      }
    }
    return;
  }
#endif
  for (int64_t k = 0; k < job.kept; ++k) to[k] = from[job.index[k]];
}

// to[idx[k]] = from[k]. The other elements of `to` are zero when this is called, and stay so.
template <class T>
void expand(T* to, const T* from, const RowsJob& job) {
#if defined(__AVX512VBMI2__)
  if (job.mask && sizeof(T) <= 4) {
    for (int64_t f = 0; f < job.cols; f += 64) {
      uint64_t bits = job.mask[f / 64];
      for (T* out = to + f; bits != 0;) {
        if constexpr (sizeof(T) == 4) {
          const auto lanes = static_cast<__mmask16>(bits);
          const int count = __builtin_popcount(lanes);
          const auto in = static_cast<__mmask16>(_bzhi_u32(~0u, static_cast<unsigned>(count)));
          _mm512_mask_storeu_epi32(out, lanes, _mm512_maskz_expand_epi32(lanes, _mm512_maskz_loadu_epi32(in, from)));
          from += count, out += 16, bits >>= 16;
        } else {
          const auto lanes = static_cast<__mmask32>(bits);
          const int count = __builtin_popcount(lanes);
          const auto in = static_cast<__mmask32>(_bzhi_u64(~0ull, static_cast<unsigned>(count)));
          _mm512_mask_storeu_epi16(out, lanes, _mm512_maskz_expand_epi16(lanes, _mm512_maskz_loadu_epi16(in, from)));
          from += count, out += 32, bits >>= 32;
        }
      }
    }
    return;
  }
#endif
  for (int64_t k = 0; k < job.kept; ++k) to[job.index[k]] = from[k];
}

template <bool kVector, class T>
void write_row(T* to, const T* from, const void* scale, int64_t n, bool stream) {
  if (scale == nullptr)
    copy_bytes(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), n * static_cast<int64_t>(sizeof(T)),
               stream);
  else
    scale_row<kVector>(to, from, static_cast<const arithmetic_t<T>*>(scale), n, stream);
}

template <class T>
void gather(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch) {
  using C = arithmetic_t<T>;
  const C* scale = static_cast<const C*>(job.scale);
  if (!job.columns) {
    for (int64_t k = begin; k < end; ++k) {
      const T* from = reinterpret_cast<const T*>(job.src + job.index[k] * job.src_stride);
      write_row<false>(reinterpret_cast<T*>(job.out) + k * job.cols, from, scale ? scale + k : nullptr, job.cols, stream);
    }
    return;
  }
  T* row = static_cast<T*>(scratch);
  for (int64_t r = begin * kColumnUnit; r < min(end * kColumnUnit, job.rows); ++r) {
    select(row, reinterpret_cast<const T*>(job.src + r * job.src_stride), job);
    write_row<true>(reinterpret_cast<T*>(job.out) + r * job.cols, row, scale, job.cols, stream);
  }
}

template <class T>
void scatter(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch) {
  using C = arithmetic_t<T>;
  const C* scale = static_cast<const C*>(job.scale);
  T* out = reinterpret_cast<T*>(job.out);
  if (!job.columns) {
    for (int64_t f = begin; f < end; ++f) {
      const int32_t k = job.index[f];
      if (k < 0) {
        if (out) zero_bytes(job.out + f * job.cols * static_cast<int64_t>(sizeof(T)), job.cols * static_cast<int64_t>(sizeof(T)), stream);
        continue;
      }
      const T* from = reinterpret_cast<const T*>(job.src + k * job.src_stride);
      if (job.weight)
        static_cast<C*>(job.dot)[k] =
            dot_row<T, C>(from, reinterpret_cast<const T*>(job.weight + f * job.weight_stride), job.cols);
      if (out) write_row<false>(out + f * job.cols, from, scale ? scale + k : nullptr, job.cols, stream);
    }
    return;
  }
  T* row = static_cast<T*>(scratch);
  memset(scratch, 0, static_cast<size_t>(job.cols) * sizeof(T));
  for (int64_t unit = begin; unit < end; ++unit) {
    C* partial = job.weight ? static_cast<C*>(job.partial) + unit * job.cols : nullptr;
    if (partial) memset(partial, 0, static_cast<size_t>(job.cols) * sizeof(C));
    for (int64_t r = unit * kColumnUnit; r < min((unit + 1) * kColumnUnit, job.rows); ++r) {
      expand(row, reinterpret_cast<const T*>(job.src + r * job.src_stride), job);
      if (partial) add_products(partial, row, reinterpret_cast<const T*>(job.weight + r * job.weight_stride), job.cols);
      if (out) write_row<true>(out + r * job.cols, row, scale, job.cols, stream);
    }
  }
}

template <class C>
void reduce(const RowsJob& job) {
  const C* partial = static_cast<const C*>(job.partial);
  C* dot = static_cast<C*>(job.dot);
  memset(dot, 0, static_cast<size_t>(job.kept) * sizeof(C));
  for (int64_t unit = 0; unit < units(job); ++unit)
    for (int64_t k = 0; k < job.kept; ++k) dot[k] += partial[unit * job.cols + job.index[k]];
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
