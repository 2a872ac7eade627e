// Sums of the lanes of many vectors at once: fewer instructions than one sum after the other.
// Included only by files of csrc/cpu: internal linkage throughout.
#pragma once

#include "vec.h"

namespace {

// Lane i of the result is the sum of the lanes of x[i], i < kLanes.
inline vfloat sum_each(const vfloat* x) {
#if defined(__AVX512F__)
  const auto shuffle_add = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 *y = x + 4 * i, ab = _mm512_add_ps(_mm512_unpacklo_ps(y[0], y[1]), _mm512_unpackhi_ps(y[0], y[1])),
                 cd = _mm512_add_ps(_mm512_unpacklo_ps(y[2], y[3]), _mm512_unpackhi_ps(y[2], y[3]));
    const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  return shuffle_add(shuffle_add(four[0], four[1]), shuffle_add(four[2], four[3]));
#else
  float each[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) each[i] = sum(x[i]);
  return load(each);
#endif
}

}  // namespace
