// rms_norm: bodies, compiled once per instruction set (PPNET_ISA).
#include "rms_norm.h"

#include "vec.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

// Four sums at a time: one alone would wait for its own last addition.
template <class T>
float sum_of_squares(const T* x, int64_t n) {
  vfloat sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int64_t j = 0; j < 4; ++j) {
      const vfloat v = load(x + i + j * kLanes);
      sums[j] = fma(v, v, sums[j]);
    }
  for (; i < n; i += kLanes) {
    const vfloat v = load(x + i, n - i < kLanes ? n - i : kLanes);
    sums[0] = fma(v, v, sums[0]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline vfloat rounded(vfloat x, const float*) { return x; }
template <class T>
inline vfloat rounded(vfloat x, const T*) {
  T narrowed[kLanes];
  store(narrowed, x);
  return load(narrowed);
}

template <class T>
void rows(const RmsNorm& job, int64_t begin, int64_t end) {
  const T* weight = reinterpret_cast<const T*>(job.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(job.x) + r * job.width;
    T* y = reinterpret_cast<T*>(job.y) + r * job.width;
    const float mean = sum_of_squares(x, job.width) / static_cast<float>(job.width);
    const vfloat factor = splat(1.0f / __builtin_sqrtf(mean + job.eps));
    int64_t i = 0;
    for (; i + kLanes <= job.width; i += kLanes) store(y + i, load(weight + i) * rounded(load(x + i) * factor, y));
    if (const int64_t n = job.width - i) store(y + i, load(weight + i, n) * rounded(load(x + i, n) * factor, y), n);
  }
}

}  // namespace

void rms_norm(const RmsNorm& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::bf16: return rows<bf16_t>(job, begin, end);
    case Dtype::f16: return rows<f16_t>(job, begin, end);
    default: return rows<float>(job, begin, end);
  }
}

}  // namespace PPNET_ISA
}  // namespace ppnet
