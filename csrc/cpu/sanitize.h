// Intrinsics whose memory accesses AddressSanitizer does not see, because GCC has them as built-ins and not as loads
// and stores: masked ones, and stores around the cache. In a build with AddressSanitizer they first read every element
// that they are about to touch, which it does see; in any other this file is empty. Included only by convert.h. An
// intrinsic of this kind that the kernels begin to use belongs here too.
#pragma once

#if defined(__SANITIZE_ADDRESS__) && defined(__x86_64__)

#include <cstdint>
#include <immintrin.h>

namespace {

template <class T>
inline void touch(const void* p, uint64_t lanes) {
  for (const volatile T* element = static_cast<const volatile T*>(p); lanes; lanes >>= 1, ++element)
    if (lanes & 1) (void)*element;
}

inline void touch_line(const void* p, int bytes) { touch<uint32_t>(p, (uint64_t{1} << bytes / 4) - 1); }

#if defined(__AVX512F__)
inline __m512 touching_maskz_loadu_ps(__mmask16 lanes, const void* p) {
  touch<uint32_t>(p, lanes);
  return _mm512_maskz_loadu_ps(lanes, p);
}
inline __m512i touching_maskz_loadu_epi32(__mmask16 lanes, const void* p) {
  touch<uint32_t>(p, lanes);
  return _mm512_maskz_loadu_epi32(lanes, p);
}
inline __m512i touching_maskz_loadu_epi16(__mmask32 lanes, const void* p) {
  touch<uint16_t>(p, lanes);
  return _mm512_maskz_loadu_epi16(lanes, p);
}
inline __m256i touching_maskz_loadu_epi16_half(__mmask16 lanes, const void* p) {
  touch<uint16_t>(p, lanes);
  return _mm256_maskz_loadu_epi16(lanes, p);
}
inline void touching_mask_storeu_ps(void* p, __mmask16 lanes, __m512 x) {
  touch<uint32_t>(p, lanes);
  _mm512_mask_storeu_ps(p, lanes, x);
}
inline void touching_mask_storeu_epi16(void* p, __mmask32 lanes, __m512i x) {
  touch<uint16_t>(p, lanes);
  _mm512_mask_storeu_epi16(p, lanes, x);
}
inline void touching_mask_storeu_epi16_half(void* p, __mmask16 lanes, __m256i x) {
  touch<uint16_t>(p, lanes);
  _mm256_mask_storeu_epi16(p, lanes, x);
}
inline void touching_stream_ps(void* p, __m512 x) {
  touch_line(p, 64);
  _mm512_stream_ps(static_cast<float*>(p), x);
}
inline void touching_stream_si512(void* p, __m512i x) {
  touch_line(p, 64);
  _mm512_stream_si512(static_cast<__m512i*>(p), x);
}
#define _mm512_maskz_loadu_ps touching_maskz_loadu_ps
#define _mm512_maskz_loadu_epi32 touching_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi16 touching_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 touching_maskz_loadu_epi16_half
#define _mm512_mask_storeu_ps touching_mask_storeu_ps
#define _mm512_mask_storeu_epi16 touching_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 touching_mask_storeu_epi16_half
#define _mm512_stream_ps touching_stream_ps
#define _mm512_stream_si512 touching_stream_si512
#endif

#if defined(__AVX2__)
inline void touching_stream_ps_half(float* p, __m256 x) {
  touch_line(p, 32);
  _mm256_stream_ps(p, x);
}
#define _mm256_stream_ps touching_stream_ps_half
#endif
inline void touching_stream_ps_quarter(float* p, __m128 x) {
  touch_line(p, 16);
  _mm_stream_ps(p, x);
}
inline void touching_stream_si128(__m128i* p, __m128i x) {
  touch_line(p, 16);
  _mm_stream_si128(p, x);
}
#define _mm_stream_ps touching_stream_ps_quarter
#define _mm_stream_si128 touching_stream_si128

}  // namespace

#endif
