// gated_attention_decode: body, compiled once per instruction set (PPNET_ISA).
#include "gated_attention_decode.h"

#include "gated_attention_decode_tiles.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
// Positions whose values stay in the first-level cache while rows of weights change.
constexpr int64_t kValueBlock = 32;
constexpr int64_t kAheadBytes = 8192;  // distance of the prefetch, into the second-level cache

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// One unit of work: positions [first, last) of the cache, for the query rows of one KV group of one sequence.
struct Unit {
  int64_t b, group, head, first, last;
};

struct Scratch {
  float* query;       // (rows, padded width)
  float* score;       // (kDecodeRows, kDecodeChunk): scores, then weights
  float* bias;        // (mask rows, kDecodeChunk)
  int32_t* position;  // (kDecodeChunk) positions that some row attends to, padded with the last one to whole vectors
  uint8_t* mixed;     // (kDecodeChunk) some rows attend, others do not
};

// What of a chunk is attended.
struct Plan {
  int64_t count;   // positions
  bool biased;     // there is a bias for every (mask row, position)
  bool any_mixed;
  bool per_head;   // mask rows are (head, token) and not tokens
};

Scratch divide(const DecodeJob& job, char* memory) {
  const int64_t rows = decode_rows(job);
  const int64_t mask_rows = job.mask_kind != MaskKind::none && job.mask_stride[1] != 0 ? rows : job.tokens;
  Scratch s;
  s.query = reinterpret_cast<float*>(memory);
  s.score = s.query + rows * decode_padded_width(job);
  s.bias = s.score + kDecodeRows * kDecodeChunk;
  s.position = reinterpret_cast<int32_t*>(s.bias + mask_rows * kDecodeChunk);
  s.mixed = reinterpret_cast<uint8_t*>(s.position + kDecodeChunk);
  return s;
}

// --- which positions are attended ------------------------------------------------------------------------------------

struct bool_t {
  uint8_t value;
};
inline bool is_masked(bool_t x) { return x.value == 0; }
inline bool is_plain(bool_t x) { return x.value != 0; }
inline float bias_of(bool_t) { return 0.0f; }
// The lowest finite value of the mask's dtype masks as -infinity does: it is what transformers fills masks with.
inline bool is_masked(float x) { return x <= -0x1.fffffep127f; }
inline bool is_masked(double x) { return x <= -0x1.fffffep127; }
inline bool is_masked(bf16_t x) { return widen(x) <= -0x1.fep127f; }
inline bool is_masked(f16_t x) { return widen(x) <= -65504.0f; }
template <class M>
inline bool is_plain(M x) { return widen(x) == 0; }
template <class M>
inline float bias_of(M x) { return static_cast<float>(widen(x)); }

// Positions [first, last) that token t may attend to, apart from the mask.
void token_range(const DecodeJob& job, int64_t b, int64_t t, int64_t* first, int64_t* last) {
  const int64_t length = job.lengths ? job.lengths[b] : job.keys, position = length - job.tokens + t;
  *last = max(0, job.mask_kind == MaskKind::none ? position + 1 : length);
  *first = job.window > 0 ? max(0, position + 1 - job.window) : 0;
}

// Mask row r (head in group, token) of positions [first, last).
template <class M>
void read_mask(const DecodeJob& job, const Unit& unit, int64_t r, bool per_head, int64_t first, int64_t last,
               float* bias, bool* all_plain, bool* all_masked) {
  const int64_t t = per_head ? r % job.tokens : r;
  const int64_t head = per_head ? unit.group * job.per_group + r / job.tokens : 0;
  const M* mask = reinterpret_cast<const M*>(job.mask) + unit.b * job.mask_stride[0] + head * job.mask_stride[1] +
                  t * job.mask_stride[2] + first * job.mask_stride[3];
  const int64_t n = last - first, stride = job.mask_stride[3];
  int64_t plain = 0, masked = 0;
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) plain += is_plain(mask[j]), masked += is_masked(mask[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) plain += is_plain(mask[j * stride]), masked += is_masked(mask[j * stride]);
  }
  *all_plain = plain == n;
  *all_masked = masked == n;
  for (int64_t j = 0; j < n; ++j) bias[j] = is_masked(mask[j * stride]) ? -kInfinity : bias_of(mask[j * stride]);
}

void read_mask(const DecodeJob& job, const Unit& unit, int64_t r, bool per_head, int64_t first, int64_t last,
               float* bias, bool* all_plain, bool* all_masked) {
  switch (job.mask_kind) {
    case MaskKind::boolean: return read_mask<bool_t>(job, unit, r, per_head, first, last, bias, all_plain, all_masked);
    case MaskKind::f32: return read_mask<float>(job, unit, r, per_head, first, last, bias, all_plain, all_masked);
    case MaskKind::bf16: return read_mask<bf16_t>(job, unit, r, per_head, first, last, bias, all_plain, all_masked);
    case MaskKind::f16: return read_mask<f16_t>(job, unit, r, per_head, first, last, bias, all_plain, all_masked);
    case MaskKind::f64: return read_mask<double>(job, unit, r, per_head, first, last, bias, all_plain, all_masked);
    case MaskKind::none: break;
  }
  for (int64_t j = 0; j < last - first; ++j) bias[j] = 0;
  *all_plain = true;
  *all_masked = false;
}

// Drops the positions that no row attends to, marks the mixed ones.
void compress(const Scratch& s, int64_t rows, int64_t first, int64_t n, Plan* plan) {
  for (int64_t j = 0; j < n; ++j) {
    int64_t attending = 0;
    for (int64_t r = 0; r < rows; ++r) attending += s.bias[r * kDecodeChunk + j] != -kInfinity;
    if (attending == 0) continue;
    const int64_t k = plan->count++;
    s.position[k] = static_cast<int32_t>(first + j);
    s.mixed[k] = attending != rows;
    plan->any_mixed |= attending != rows;
    for (int64_t r = 0; r < rows; ++r) s.bias[r * kDecodeChunk + k] = s.bias[r * kDecodeChunk + j];
  }
}

Plan make_plan(const DecodeJob& job, const Unit& unit, const Scratch& s) {
  Plan plan{0, false, false, job.mask_kind != MaskKind::none && job.mask_stride[1] != 0};
  int64_t first = unit.last, last = unit.first, common_first = unit.first, common_last = unit.last;
  for (int64_t t = 0; t < job.tokens; ++t) {
    int64_t from, to;
    token_range(job, unit.b, t, &from, &to);
    first = min(first, from), last = max(last, to);
    common_first = max(common_first, from), common_last = min(common_last, to);
  }
  first = max(first, unit.first), last = min(last, unit.last);
  if (first >= last) return plan;
  const int64_t rows = plan.per_head ? decode_rows(job) : job.tokens, n = last - first;
  bool plain = common_first <= first && common_last >= last, masked = job.mask_kind != MaskKind::none;
  for (int64_t r = 0; job.mask_kind != MaskKind::none && r < rows; ++r) {
    bool row_plain, row_masked;
    read_mask(job, unit, r, plan.per_head, first, last, s.bias + r * kDecodeChunk, &row_plain, &row_masked);
    plain &= row_plain, masked &= row_masked;
  }
  if (masked) return plan;
  if (plain) {
    plan.count = n;
    for (int64_t j = 0; j < n; ++j) s.position[j] = static_cast<int32_t>(first + j);
  } else {
    plan.biased = true;
    for (int64_t r = 0; r < rows; ++r) {
      float* bias = s.bias + r * kDecodeChunk;
      int64_t from, to;
      token_range(job, unit.b, r % job.tokens, &from, &to);
      for (int64_t j = 0; j < n; ++j) {
        const bool outside = first + j < from || first + j >= to;
        bias[j] = outside ? -kInfinity : job.mask_kind == MaskKind::none ? 0.0f : bias[j];
      }
    }
    compress(s, rows, first, n, &plan);
  }
  if (plan.count == 0) return plan;
  // The padding repeats the last position, so that it changes no maximum.
  for (int64_t j = plan.count; j % kLanes != 0; ++j) {
    s.position[j] = s.position[plan.count - 1];
    for (int64_t r = 0; plan.biased && r < rows; ++r)
      s.bias[r * kDecodeChunk + j] = s.bias[r * kDecodeChunk + plan.count - 1];
  }
  return plan;
}

// --- scores, weights, values -----------------------------------------------------------------------------------------

template <class T>
void prefetch_rows(const Rows<T>& rows, const int32_t* position, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < rows.width; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(rows.at(position[j]) + d, 0, 2);
}

template <class T>
void score_rows(const float* query, int64_t padded, const Rows<T>& keys, const Scratch& s, const Plan& plan,
                int64_t rows, int64_t ahead) {
  for (int64_t j = 0; j < plan.count; j += kLanes) {
    const int32_t* position = s.position + j;
    float* score = s.score + j;
    // Only the first rows bring keys from memory; the prefetch is exact where positions follow one another.
    int64_t r = 0, distance = ahead * keys.stride;
    for (; r + 4 <= rows; r += 4, distance = 0)
      score_tile<T, 4>(query + r * padded, padded, keys, position, distance, score + r * kDecodeChunk, kDecodeChunk);
    for (; r + 2 <= rows; r += 2, distance = 0)
      score_tile<T, 2>(query + r * padded, padded, keys, position, distance, score + r * kDecodeChunk, kDecodeChunk);
    for (; r < rows; ++r, distance = 0)
      score_tile<T, 1>(query + r * padded, padded, keys, position, distance, score + r * kDecodeChunk, kDecodeChunk);
  }
}

// Scores of one row to weights e^(score - largest); returns their sum and the largest (-infinity: nothing attended).
float weigh(float* score, const float* bias, int64_t n, float scale, float* largest_score) {
  vfloat most = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    vfloat x = load(score + j) * splat(scale);
    if (bias) {
      const vfloat b = load(bias + j);
      // A masked key may hold anything: its score is replaced, not added to.
      x = if_less(b, splat(-0x1.fffffep127f), splat(-kInfinity), x + b);
    }
    store(score + j, x);
    most = ::max(most, x);
  }
  const float top = largest(most);
  const vfloat from = splat(top == -kInfinity ? 0.0f : top);
  vfloat total = splat(0);
  for (int64_t j = 0; j < n; j += kLanes) {
    vfloat w = ::exp(load(score + j) - from);
    store(score + j, w);
    if (j + kLanes > n) {
      for (int64_t pad = n; pad < j + kLanes; ++pad) score[pad] = 0;
      w = load(score + j);
    }
    total = total + w;
  }
  const float weights = sum(total);
  *largest_score = weights == 0 ? -kInfinity : top == -kInfinity ? 0.0f : top;
  return weights;
}

// Positions that only some rows attend to: a masked value may hold anything, so it is skipped and not multiplied by 0.
template <class T>
void add_mixed(const Scratch& s, const Rows<T>& values, int64_t begin, int64_t end, int64_t rows, float* sum,
               int64_t padded) {
  for (int64_t j = begin; j < end; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      const float* weight = s.score + r * kDecodeChunk + j;
      if (*weight != 0) value_rows<T, 1>(weight, kDecodeChunk, values, s.position + j, 1, 0, sum + r * padded, padded);
    }
}

template <class T>
void add_values(const Scratch& s, const Rows<T>& values, const Plan& plan, int64_t rows, int64_t ahead, float* sum,
                int64_t padded) {
  for (int64_t j = 0, end; j < plan.count; j = end) {
    const bool mixed = plan.any_mixed && s.mixed[j];
    end = min(j + kValueBlock, plan.count);
    if (plan.any_mixed)
      for (int64_t i = j + 1; i < end; ++i)
        if (s.mixed[i] != s.mixed[j]) end = i;
    if (mixed) {
      add_mixed(s, values, j, end, rows, sum, padded);
      continue;
    }
    const float* weight = s.score + j;
    const int32_t* position = s.position + j;
    int64_t r = 0, distance = ahead * values.stride;
    for (; values.width <= 2 * kPair && r + 4 <= rows; r += 4, distance = 0)
      value_rows<T, 4>(weight + r * kDecodeChunk, kDecodeChunk, values, position, end - j, distance, sum + r * padded,
                       padded);
    for (; r + 2 <= rows; r += 2, distance = 0)
      value_rows<T, 2>(weight + r * kDecodeChunk, kDecodeChunk, values, position, end - j, distance, sum + r * padded,
                       padded);
    for (; r < rows; ++r, distance = 0)
      value_rows<T, 1>(weight + r * kDecodeChunk, kDecodeChunk, values, position, end - j, distance, sum + r * padded,
                       padded);
  }
}

// --- units -----------------------------------------------------------------------------------------------------------

struct Partial {
  float *sum, *most, *weights;  // (rows, padded), (rows), (rows)
};

Partial partial_of(const DecodeJob& job, int64_t unit) {
  const int64_t rows = decode_rows(job), padded = decode_padded_width(job);
  float* at = job.partial + unit * rows * (padded + 2);
  return {at, at + rows * padded, at + rows * padded + rows};
}

template <class T>
Rows<T> rows_of(const DecodeJob& job, const char* data, const int64_t* stride, const Unit& unit) {
  return {reinterpret_cast<const T*>(data) + unit.b * stride[0] + unit.head * stride[1], stride[2], job.width};
}

template <class T>
void attend(const DecodeJob& job, const Unit& unit, const Partial& partial, const Scratch& s) {
  const int64_t rows = decode_rows(job), padded = decode_padded_width(job);
  const Plan plan = make_plan(job, unit, s);
  if (plan.count == 0) {
    for (int64_t r = 0; r < rows; ++r) partial.most[r] = -kInfinity;
    return;
  }
  const Rows<T> keys = rows_of<T>(job, job.key, job.key_stride, unit);
  const Rows<T> values = rows_of<T>(job, job.value, job.value_stride, unit);
  // One query computes so little that the processor's own prefetch keeps up, and does better alone.
  const int64_t ahead = rows == 1 ? 0 : max(2, kAheadBytes / (job.width * static_cast<int64_t>(sizeof(T))));
  const T* queries = reinterpret_cast<const T*>(job.query) + unit.b * job.query_stride[0];
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = queries + (unit.group * job.per_group + r / job.tokens) * job.query_stride[1] +
                    r % job.tokens * job.query_stride[2];
    for (int64_t d = 0; d < job.width; d += kPair)
      Product<T>::set_query(s.query + r * padded + d, from + d, min(kPair, job.width - d));
  }
  for (int64_t first = 0; first < rows; first += kDecodeRows) {
    const int64_t n = min(kDecodeRows, rows - first);
    score_rows(s.query + first * padded, padded, keys, s, plan, n, ahead);
    prefetch_rows(values, s.position, min(ahead, plan.count));
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      const float* bias = s.bias + (plan.per_head ? row : row % job.tokens) * kDecodeChunk;
      partial.weights[row] = weigh(s.score + r * kDecodeChunk, plan.biased ? bias : nullptr, plan.count, job.scale,
                                   partial.most + row);
    }
    float* sum = partial.sum + first * padded;
    memset(sum, 0, static_cast<size_t>(n * padded) * sizeof(float));
    add_values(s, values, plan, n, ahead, sum, padded);
  }
}

// out = gate * sum over chunks of e^(most - largest most) sum / the same of the weights; chunks in order.
template <class T>
void combine(const DecodeJob& job, int64_t b, int64_t group) {
  const int64_t rows = decode_rows(job), padded = decode_padded_width(job);
  const int64_t first = (b * job.groups + group) * job.chunks;
  for (int64_t r = 0; r < rows; ++r) {
    float top = -kInfinity;
    for (int64_t c = 0; c < job.chunks; ++c) {
      const float most = partial_of(job, first + c).most[r];
      if (!(most <= top)) top = most;
    }
    const int64_t head = group * job.per_group + r / job.tokens, t = r % job.tokens;
    T* out = reinterpret_cast<T*>(job.out) + ((b * job.tokens + t) * job.groups * job.per_group + head) * job.width;
    float* total = partial_of(job, first).sum + r * padded;
    float weights = 0;
    for (int64_t c = 0; c < job.chunks; ++c) {
      const Partial part = partial_of(job, first + c);
      if (part.most[r] == -kInfinity) {
        if (c == 0) memset(total, 0, static_cast<size_t>(padded) * sizeof(float));
        continue;
      }
      float factor[kLanes];
      store(factor, ::exp(splat(part.most[r] - top)));
      weights += factor[0] * part.weights[r];
      const float* sum = part.sum + r * padded;
      for (int64_t d = 0; d < padded; d += kLanes)
        store(total + d, c == 0 ? load(total + d) * splat(factor[0])
                                : fma(splat(factor[0]), load(sum + d), load(total + d)));
    }
    const float gate = job.gate ? job.gate[group] : 1.0f, scale = top == -kInfinity ? 0.0f : gate / weights;
    for (int64_t d = 0; d < job.width; d += kPair)
      store_pair(out + d, Pair{load(total + d) * splat(scale), load(total + d + kLanes) * splat(scale)},
                 min(kPair, job.width - d));
  }
}

template <class T>
void take(const DecodeJob& job, int64_t i, const Scratch& s) {
  const int64_t chunk = i % job.chunks, pair = i / job.chunks, b = pair / job.groups, group = pair % job.groups;
  const Unit unit{b, group, job.group ? job.group[group] : group, chunk * kDecodeChunk,
                  min(job.keys, (chunk + 1) * kDecodeChunk)};
  attend<T>(job, unit, partial_of(job, i), s);
  if (__atomic_add_fetch(job.done + pair, 1, __ATOMIC_ACQ_REL) == job.chunks) combine<T>(job, b, group);
}

// Each thread goes through its own share in order, so that what was fetched ahead at the end of a unit is what the next
// one reads; then it helps the others.
template <class T>
void run(const DecodeJob& job, int64_t thread, const Scratch& s) {
  for (int64_t helped = 0; helped < job.threads; ++helped) {
    const int64_t share = (thread + helped) % job.threads, end = decode_share(job, share + 1);
    for (int64_t i; (i = __atomic_fetch_add(job.next + share, 1, __ATOMIC_RELAXED)) < end;) take<T>(job, i, s);
  }
}

}  // namespace

void gated_attention_decode(const DecodeJob& job, int64_t thread, char* scratch) {
  const Scratch s = divide(job, scratch);
  if (job.dtype == Dtype::bf16) return run<bf16_t>(job, thread, s);
  if (job.dtype == Dtype::f16) return run<f16_t>(job, thread, s);
  run<float>(job, thread, s);
}

}  // namespace PPNET_ISA
}  // namespace ppnet
