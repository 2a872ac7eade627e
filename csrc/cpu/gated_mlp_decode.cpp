// gated_mlp_decode: body, compiled once per instruction set (PPNET_ISA).
//
// Neurons go through in blocks: products with their gate and up rows, activation, sum of their down rows. Meanwhile the
// rows of two phases later are fetched, so memory is read in one steady stream whatever neurons are kept.
#include "gated_mlp_decode.h"

#include "activations.h"
#include "row_products.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

// h = act(gate) * h, or act(h) without a gate.
template <class A, bool kGlu>
void activate(const float* gate, float* h, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    const vfloat u = load(h + i, m);
    store(h + i, kGlu ? A::template value<false>(load(gate + i, m)) * u : A::template value<false>(u), m);
  }
}

template <bool kGlu>
void activate(Act act, const float* gate, float* h, int64_t n) {
  switch (act) {
    case Act::silu: return activate<Silu, kGlu>(gate, h, n);
    case Act::gelu: return activate<Gelu, kGlu>(gate, h, n);
    case Act::gelu_tanh: return activate<GeluTanh, kGlu>(gate, h, n);
    case Act::relu: return activate<Relu, kGlu>(gate, h, n);
    case Act::relu2: return activate<Relu2, kGlu>(gate, h, n);
  }
}

inline int64_t neuron(const MlpDecode& job, int64_t k) {
  k = k < job.kept ? k : job.kept - 1;  // past the end, where rows are only prefetched
  return job.idx ? job.idx[k] : k;
}

// The rows of the neurons of a block from k on, and what is fetched meanwhile: its down rows, as they are read last,
// and the gate and up rows of the next block.
struct Block {
  Block(const MlpDecode& job, int64_t k, int64_t end)
      : count(static_cast<int>(end - k < kBlockRows ? end - k : kBlockRows)), matrices(job.gate ? 3 : 2) {
    for (int b = 0; b < count; ++b) {
      f[b] = neuron(job, k + b);
      up[b] = job.up + f[b] * job.up_stride;
      down[b] = ahead[b] = job.down + f[b] * job.down_stride;
      const int64_t next = neuron(job, k + kBlockRows + b);
      ahead[(matrices - 1) * count + b] = job.up + next * job.up_stride;
      if (job.gate == nullptr) continue;
      gate[b] = job.gate + f[b] * job.gate_stride;
      ahead[count + b] = job.gate + next * job.gate_stride;
    }
  }
  int count, matrices;
  int64_t f[kBlockRows];
  const char *up[kBlockRows], *gate[kBlockRows], *down[kBlockRows], *ahead[3 * kBlockRows];
};

template <class W>
const W* const* typed(const char* const* rows) {
  return reinterpret_cast<const W* const*>(rows);
}

template <int T, class W>
void add_bias(const char* bias, const Block& block, float* h) {
  if (bias == nullptr) return;
  for (int i = 0; i < block.count * T; ++i) h[i] += widen(reinterpret_cast<const W*>(bias)[block.f[i / T]]);
}

// h[b * T + t] of a block's neurons.
template <int T, bool kGlu, class W>
void activations(const MlpDecode& job, const Block& block, int64_t k, Ahead& ahead, float* h) {
  const auto* x = reinterpret_cast<const Factor<W>*>(job.x);
  float gate[kBlockRows * T];
  if (kGlu) dots<T>(typed<W>(block.gate), block.count, x, job.width, ahead, gate);
  dots<T>(typed<W>(block.up), block.count, x, job.width, ahead, h);
  add_bias<T, W>(job.up_bias, block, h);
  if (kGlu) add_bias<T, W>(job.gate_bias, block, gate);
  activate<kGlu>(job.act, gate, h, block.count * T);
  if (job.z)
    for (int i = 0; i < block.count * T; ++i) h[i] *= job.z[k + i / T];
}

template <int T, bool kGlu, class W>
void chunks(const MlpDecode& job, int64_t begin, int64_t end) {
  const int64_t size = chunk_size(T, job.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* y = job.partial + chunk * size;
    memset(y, 0, static_cast<size_t>(size) * sizeof(float));
    const int64_t stop = chunk_start(job.kept, job.chunks, chunk + 1);
    for (int64_t k = chunk_start(job.kept, job.chunks, chunk); k < stop; k += kBlockRows) {
      const Block block(job, k, stop);
      float h[kBlockRows * T];
      Ahead ahead{block.ahead, block.matrices * block.count, job.width * static_cast<int64_t>(sizeof(W))};
      activations<T, kGlu, W>(job, block, k, ahead, h);
      sums<T>(typed<W>(block.down), block.count, h, y, job.width, ahead);
    }
  }
}

}  // namespace

void mlp_chunks(const MlpDecode& job, int64_t begin, int64_t end) {
  with_kind(job.dtype, job.tokens, [&](auto kind) {
    using K = decltype(kind);
    if (job.gate)
      chunks<K::kTokens, true, typename K::Element>(job, begin, end);
    else
      chunks<K::kTokens, false, typename K::Element>(job, begin, end);
  });
}

}  // namespace PPNET_ISA
}  // namespace ppnet
