// The instructions of cuda/prim.h, which says what each lane holds.
#pragma once

#include "block.h"
#include "half.h"

namespace ppnet::emulator {

struct Product {
  const uint32_t *a, *b;
  float* d;
};

template <class T>
float half_of(uint32_t bits, int which) {
  const auto x = static_cast<uint16_t>(bits >> 16 * which);
  return std::is_same_v<T, __half> ? half_value(x) : bf16_value(x);
}

// Puts the matrices together from the registers of all lanes, multiplies, and hands back. Products are exact and summed
// in double, then rounded once: tensor cores, whose order of summation is not documented, come close to it.
template <class T>
void multiply(const Posted& posted, uint32_t) {
  double a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<const Product*>(posted.in[lane]);
    const int g = lane / 4, i = lane % 4;
    for (int which = 0; which < 2; ++which) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * i + r / 2 * 8 + which] = half_of<T>(p.a[r], which);
      for (int r = 0; r < 2; ++r) b[2 * i + r * 8 + which][g] = half_of<T>(p.b[r], which);
      for (int r = 0; r < 2; ++r) d[g + r * 8][2 * i + which] = p.d[2 * r + which];
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<const Product*>(posted.in[lane]);
    for (int r = 0; r < 4; ++r) p.d[r] = static_cast<float>(d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
  }
}

template <class T>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Where where = Where::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  const Product product{a, b, d};
  together(multiply<T>, 0xffffffffu, &product, nullptr, "mma_m16n8k16", where);
}

template <int kMatrices, bool kTrans>
void load_matrices(const Posted& posted, uint32_t) {
  for (int m = 0; m < kMatrices; ++m) {
    const uint16_t* rows[8];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      const Thread& t = block.thread[current->warp * 32 + lane];
      const void* row = posted.in[lane];
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fail(t, current->where, "ldmatrix of a row that is not aligned to 16 bytes");
      if (!in_shared(row, 16)) fail(t, current->where, "ldmatrix of a row outside of shared memory");
      rows[r] = static_cast<const uint16_t*>(row);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, i = lane % 4;
      const uint32_t low = kTrans ? rows[2 * i][g] : rows[g][2 * i];
      const uint32_t high = kTrans ? rows[2 * i + 1][g] : rows[g][2 * i + 1];
      static_cast<uint32_t*>(posted.out[lane])[m] = high << 16 | low;
    }
  }
}

template <int kMatrices, bool kTrans>
void ldmatrix(uint32_t* r, const void* row, Where where) {
  together(load_matrices<kMatrices, kTrans>, 0xffffffffu, row, r, "ldmatrix", where);
}

#define PPNET_LDMATRIX(name, matrices, trans)                                       \
  inline void name(uint32_t* r, const void* row, Where where = Where::here()) { \
    ldmatrix<matrices, trans>(r, row, where);                                       \
  }
PPNET_LDMATRIX(ldmatrix_x1, 1, false)
PPNET_LDMATRIX(ldmatrix_x2, 2, false)
PPNET_LDMATRIX(ldmatrix_x4, 4, false)
PPNET_LDMATRIX(ldmatrix_x1_trans, 1, true)
PPNET_LDMATRIX(ldmatrix_x2_trans, 2, true)
PPNET_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef PPNET_LDMATRIX

inline void carry_out(const Copy& copy) {
  if (copy.source_bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.source_bytes));
  std::memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, static_cast<size_t>(copy.bytes - copy.source_bytes));
}

// A copy happens as late as it may, at the wait; under a seed some happen at once.
template <int kBytes>
void cp_async(void* to, const void* from, int source_bytes = kBytes, Where where = Where::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (source_bytes < 0 || source_bytes > kBytes)
    fail(*current, where, "cp_async of %d bytes, of which %d are to be read", kBytes, source_bytes);
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0)
    fail(*current, where, "cp_async of %d bytes from %p to %p, which must be aligned to them", kBytes, from, to);
  if (!in_shared(to, kBytes)) fail(*current, where, "cp_async to an address outside of shared memory");
  const Copy copy{to, from, kBytes, source_bytes};
#ifdef __SANITIZE_ADDRESS__
  // Read here too, so that its report shows the line of a bad address.
  for (int i = 0; i < source_bytes; ++i) (void)static_cast<const volatile char*>(from)[i];
#endif
  if (random_bits() % 2) carry_out(copy);
  else current->copies.push_back(copy);
}

inline void cp_async_commit() {
  size_t closed = 0;
  for (size_t n : current->groups) closed += n;
  current->groups.push_back(current->copies.size() - closed);
}

inline void finish_copies(size_t n) {
  std::vector<Copy>& copies = current->copies;
  for (size_t i = 0; i < n; ++i) carry_out(copies[i]);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(n));
}

template <int kPending>
void cp_async_wait() {
  std::vector<size_t>& groups = current->groups;
  while (groups.size() > kPending) {
    finish_copies(groups.front());
    groups.erase(groups.begin());
  }
}

inline void cp_async_wait_all() {
  finish_copies(current->copies.size());
  current->groups.clear();
}

}  // namespace ppnet::emulator
