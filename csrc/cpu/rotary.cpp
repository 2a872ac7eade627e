// rotary: bodies, compiled once per instruction set (PPNET_ISA).
#include "rotary.h"

#include "vec.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

template <class T>
void turn(const T* x, const T* cos, const T* sin, int64_t width, T* y) {
  const int64_t half = width / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t n = half - d < kLanes ? half - d : kLanes;
    const vfloat low = load(x + d, n), high = load(x + half + d, n);
    store(y + d, low * load(cos + d, n) - high * load(sin + d, n), n);
    store(y + half + d, high * load(cos + half + d, n) + low * load(sin + half + d, n), n);
  }
}

template <class T>
void heads(const RotaryHeads& of, const T* cos, const T* sin, int64_t b, int64_t t, const Rotary& job) {
  T* y = reinterpret_cast<T*>(of.y) + (b * job.tokens + t) * of.heads * job.width;
  const char* x = of.x + b * of.batch_stride + t * of.token_stride;
  for (int64_t h = 0; h < of.heads; ++h)
    turn(reinterpret_cast<const T*>(x + h * of.head_stride), cos, sin, job.width, y + h * job.width);
}

template <class T>
void tokens(const Rotary& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / job.tokens, t = i % job.tokens;
    const int64_t angle = b * job.angle_batch_stride + t * job.angle_token_stride;
    const T* cos = reinterpret_cast<const T*>(job.cos + angle);
    const T* sin = reinterpret_cast<const T*>(job.sin + angle);
    heads(job.query, cos, sin, b, t, job);
    heads(job.key, cos, sin, b, t, job);
  }
}

}  // namespace

void rotary(const Rotary& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::bf16: return tokens<bf16_t>(job, begin, end);
    case Dtype::f16: return tokens<f16_t>(job, begin, end);
    default: return tokens<float>(job, begin, end);
  }
}

}  // namespace PPNET_ISA
}  // namespace ppnet
