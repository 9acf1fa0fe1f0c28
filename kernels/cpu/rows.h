// Rows of logits: reading and writing them block by block as float32, the softmax statistics of a
// row, and the loop that spreads rows over threads.
//
// A row is cut into segments of fixed length and a segment into blocks that fit the L1 cache.
// Statistics are always summed in that order, so a row's result depends neither on the number of
// threads nor on the other rows.
//
// Memory: a block per tensor on the stack, a few numbers per block and segment of a row, and, where
// loss and gradient are formed in one call, the exponentials of up to KEPT columns of the row that
// a thread works on (Exponentials below). Nothing grows with the number of rows, and beyond KEPT
// columns the exponentials are computed again.
#pragma once
#include <stdlib.h>

#include "fastsdpo.h"
#include "simd.h"

#define FASTSDPO_CONCAT_(a, b) a##_##b
#define FASTSDPO_CONCAT(a, b) FASTSDPO_CONCAT_(a, b)
#define FASTSDPO_NAME(name) FASTSDPO_CONCAT(name, FASTSDPO_ISA)

namespace {

constexpr int BLOCK = 1024;  // floats: 4 KiB a tensor, two inputs and an output fit L1
constexpr int STEP = 64;     // a block is padded to it: loops have no scalar tail
constexpr int64_t SEGMENT = 16 * BLOCK;
// Columns of a row whose exponentials a thread keeps: 1 MiB of floats, which holds every vocabulary
// in use today (the largest has 262144 words) and stays in a cache. Reading them back takes a tenth
// of the time that computing them takes.
constexpr int64_t KEPT = 256 * BLOCK;

constexpr int padded(int n) { return (n + STEP - 1) & ~(STEP - 1); }

struct Rows {
  char* data;
  int64_t stride_b, stride_l, L;
  int dtype, size;  // size: bytes of an element

  Rows(const fastsdpo_rows& rows, int64_t L)
      : data((char*)rows.data),
        stride_b(rows.stride_b),
        stride_l(rows.stride_l),
        L(L),
        dtype((int)rows.dtype),
        size(rows.dtype == FASTSDPO_FLOAT32 ? 4 : 2) {}

  char* at(int64_t row, int64_t column) const {
    return data + (row / L * stride_b + row % L * stride_l + column) * size;
  }
  // Whole blocks of float32 are used where they lie.
  bool direct(int n) const { return dtype == FASTSDPO_FLOAT32 && n % STEP == 0; }
};

template <class T>
INLINE void read_as(const T* x, int n, float* block) {
  int i = 0;
  for (; i + W <= n; i += W) store(block + i, load(x + i));
  if (i < n) {
    T rest[W] = {};
    memcpy((void*)rest, x + i, (n - i) * sizeof(T));
    store(block + i, load(rest));
  }
}

template <class T>
INLINE void write_as(T* x, int n, const float* block) {
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) store2(x + i, load(block + i), load(block + i + W));
  if (i < n) {
    T rest[2 * W];
    store2(rest, load(block + i), load(block + i + W));
    memcpy((void*)(x + i), rest, (n - i) * sizeof(T));
  }
}

__attribute__((noinline, unused)) void fill_block(const Rows& rows, float softcap, const char* x,
                                                  int n, float* block) {
  if (rows.dtype == FASTSDPO_FLOAT32)
    read_as((const float*)x, n, block);
  else if (rows.dtype == FASTSDPO_BFLOAT16)
    read_as((const bf16*)x, n, block);
  else
    read_as((const f16*)x, n, block);
  for (int i = n; i < padded(n); i++) block[i] = -INF;
  if (softcap == 0) return;
  const float inverse = 1 / softcap;
  for (int i = 0; i < padded(n); i += 4 * W) {
    Lanes<4> z = load_lanes<4>(block + i), capped = tanhv(z * inverse) * softcap;
    for (int j = 0; j < 4; j++)
      store(block + i + j * W, z.v[j] == -INF ? z.v[j] : capped.v[j]);  // masked stays masked
  }
}

// Prefetches the block after the group of at most 32 values at p, while that group is computed on.
template <class T>
INLINE void prefetch_next(const T* p) {
  __builtin_prefetch((const char*)(p + BLOCK));
  __builtin_prefetch((const char*)(p + BLOCK + 16));
}

// Whole blocks without a softcap are used where they lie, in their own dtype.
INLINE bool in_place(const Rows& rows, float softcap, int n) {
  return softcap == 0 && n % STEP == 0 && rows.data;
}

// n values of a row from `column` on as floats, padded, where they lie or in `block`.
INLINE const float* read_block(const Rows& rows, float softcap, int64_t row, int64_t column, int n,
                               float* block) {
  const char* x = rows.at(row, column);
  if (in_place(rows, softcap, n) && rows.dtype == FASTSDPO_FLOAT32) return (const float*)x;
  fill_block(rows, softcap, x, n, block);
  return block;
}

// Calls f with a pointer to the values in place if the dtype allows, else to them as floats in
// `block`.
template <class F>
INLINE void with_block(const Rows& rows, float softcap, int64_t row, int64_t column, int n,
                       float* block, F f) {
  const char* x = rows.at(row, column);
  if (!in_place(rows, softcap, n)) {
    fill_block(rows, softcap, x, n, block);
    f((const float*)block);
  } else if (rows.dtype == FASTSDPO_FLOAT32) {
    f((const float*)x);
  } else if (rows.dtype == FASTSDPO_BFLOAT16) {
    f((const bf16*)x);
  } else {
    f((const f16*)x);
  }
}

INLINE float read_one(const Rows& rows, float softcap, int64_t row, int64_t column) {
  float block[STEP];
  return *read_block(rows, softcap, row, column, 1, block);
}

// Where to compute a block of the gradient: its final place, or `block` until write_block.
INLINE float* gradient_block(const Rows& rows, int64_t row, int64_t column, int n, float* block) {
  return rows.direct(n) ? (float*)rows.at(row, column) : block;
}

__attribute__((noinline, unused)) void store_block(const Rows& rows, char* x, int n,
                                                   const float* block) {
  if (rows.dtype == FASTSDPO_FLOAT32)
    memcpy(x, block, n * sizeof(float));
  else if (rows.dtype == FASTSDPO_BFLOAT16)
    write_as((bf16*)x, n, block);
  else
    write_as((f16*)x, n, block);
}

INLINE void write_block(const Rows& rows, int64_t row, int64_t column, int n, const float* block) {
  if (!rows.direct(n)) store_block(rows, rows.at(row, column), n, block);
}

// The place of value i in a block that was written by a loop over bfloat16 pairs (simd.h).
INLINE int lane_of_pair(int i) { return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2; }

INLINE void write_one(const Rows& rows, int64_t row, int64_t column, float value) {
  float block[STEP] = {value};
  store_block(rows, rows.at(row, column), 1, block);
}

INLINE void write_zero_row(const Rows& rows, int64_t row, int64_t V) {
  if (rows.data) memset(rows.at(row, 0), 0, V * rows.size);
}

// Gradients with respect to c become gradients with respect to the logits: dc/dz = 1 - (c /
// softcap)^2.
INLINE void apply_softcap_slope(float softcap, const float* c, float* gradient, int n) {
  if (softcap == 0) return;
  const float inverse = 1 / softcap;
  for (int i = 0; i < padded(n); i += W) {
    vf ratio = load(c + i) * inverse;
    vf slope = load(c + i) == -INF ? vf{} : 1.f - ratio * ratio;
    store(gradient + i, load(gradient + i) * slope);
  }
}

template <class T>
INLINE float block_max(const T* c, int n) {
  Lanes<4> m = Lanes<4>{} - INF;
  for (int i = 0; i < padded(n); i += m.SIZE) {
    Lanes<4> x = load_lanes<4>(c + i);
    for (int j = 0; j < 4; j++)
      m.v[j] = max_or_b(x.v[j], m.v[j]);  // a NaN is never the max; the sums carry it
  }
  return horizontal_max(max_or_b(max_or_b(m.v[0], m.v[1]), max_or_b(m.v[2], m.v[3])));
}

// The largest c where x equals max, its own largest value.
template <class T>
INLINE float max_where(const T* x, float max, const T* c, int n) {
  Lanes<2> m = Lanes<2>{} - INF;
  for (int i = 0; i < padded(n); i += m.SIZE) {
    Lanes<2> at = load_lanes<2>(x + i), value = load_lanes<2>(c + i);
    for (int j = 0; j < 2; j++) m.v[j] = at.v[j] == max ? max_or_b(value.v[j], m.v[j]) : m.v[j];
  }
  return horizontal_max(max_or_b(m.v[0], m.v[1]));
}

// A row's two statistics: log2 p_v = (c_v - max) * k - log2sum, with k = log2(e) / temperature.
// They stay apart: one merged log-sum-exp would lose the low digits where logits are large.
struct Row {
  float max, log2sum;
};

// Running softmax statistics: the max so far, the sum of e = 2^((c - max) k), and of e * (c - max)
// k.
struct Stats {
  float max = -INF;
  double sum = 0, dot = 0;

  // Moves to a larger max.
  void raise(float to, double k) {
    if (!(to > max)) return;
    double shift = max == -INF ? 0 : ((double)max - to) * k;
    double factor = exp2(shift);
    dot = factor * (dot + sum * shift);
    sum *= factor;
    max = to;
  }
  void add(Stats other, double k) {
    raise(other.max, k);
    other.raise(max, k);
    sum += other.sum;
    dot += other.dot;
  }
  float origin() const { return max == -INF ? 0 : max; }
  Row row() const { return {max, (float)log2(sum)}; }
};

template <bool WITH_DOT, class T>
INLINE void add_block(Stats& stats, const T* c, int n, double k) {
  stats.raise(block_max(c, n), k);
  const vf scale = all((float)k), origin = all(stats.origin());
  vf sum = {}, dot = {};
  for (int i = 0; i < padded(n); i += 4 * W) {
    prefetch_next(c + i);
    Lanes<4> x = (load_lanes<4>(c + i) - origin) * scale;
    Lanes<4> e = exp2v(x);
    sum += sum_of(e);
    if (WITH_DOT) dot += sum_of(where_nonzero(e, e * x));
  }
  stats.sum += horizontal_sum(sum);
  if (WITH_DOT) stats.dot += horizontal_sum(dot);
}

// The exponentials of a row, e_v = 2^((c_v - origin) k). A block's origin is the largest value of
// its segment up to and including the block. The statistics are sums of these exponentials. Later
// p_v = e_v * 2^log2_factor takes one exponential for a whole block. The exponentials of the first
// `count` columns are kept. Those of other columns, and all of them in a separate backward pass,
// are computed again in the caller's block, with the same bits.
struct Exponentials {
  float* kept;
  int64_t count;  // a multiple of BLOCK

  static int64_t columns(int64_t V) {
    const int64_t whole = (V + BLOCK - 1) / BLOCK * BLOCK;
    return whole < KEPT ? whole : KEPT;
  }
  // The place where the block at `column` is kept; `block` if it is not kept.
  float* at(int64_t column, float* block) const { return column < count ? kept + column : block; }
};

// The exponentials of a block and their sum.
template <class T>
INLINE float exponentials(const T* c, int n, float origin, double k, float* e) {
  const vf scale = all((float)k), shift = all(origin == -INF ? 0 : origin);
  vf sum = {};
  for (int i = 0; i < padded(n); i += 4 * W) {
    prefetch_next(c + i);
    Lanes<4> values = exp2v((load_lanes<4>(c + i) - shift) * scale);
    store_lanes(e + i, values);
    sum += sum_of(values);
  }
  return horizontal_sum(sum);
}

// log2(p_v / e_v) of a block. For a block of probability 0 it is very small but not -inf, so that
// the difference of two such factors is never NaN.
INLINE double log2_factor(Row row, float origin, double k) {
  if (origin == -INF && row.max != -INF) return -1e30;
  return ((double)origin - row.max) * k - row.log2sum;
}

// log p of one value, in nats.
INLINE float log_prob(Row row, float c, double k) {
  return (float)((((double)c - row.max) * k - row.log2sum) * 0.6931471805599453);
}

// A = teacher - student, 0 where both give the token probability 0.
INLINE float log_ratio(float student_logps, float teacher_logps) {
  return student_logps == -INF && teacher_logps == -INF ? 0 : teacher_logps - student_logps;
}

// weights * r with the clipped importance ratio r = min(exp(clamp(student - old, -20, 20)),
// is_clip); 0 for any r of a weight of 0.
INLINE float coefficient(const fastsdpo_call& call, int64_t row, float student_logps) {
  if (!call.old_logps || call.weights[row] == 0) return call.weights[row];
  double d = (double)student_logps - call.old_logps[row];
  double r = exp(d < -20 ? -20 : d > 20 ? 20 : d);
  return (float)(call.weights[row] * (r > call.is_clip ? call.is_clip : r));
}

INLINE float grad_loss(const fastsdpo_call& call) { return call.grad_loss ? *call.grad_loss : 1.f; }

// The part of a row [begin, end) that one visit works on.
struct Span {
  int64_t begin, end;
};

// Runs an operation over all rows. Each row goes through `op.phases` phases. A phase visits every
// segment (op.visit fills a Part) and is then closed (op.close merges the parts into the State).
// With few rows, the threads share the segments of a row, phase by phase. Otherwise a thread keeps
// a row through all phases, and every other phase goes backwards: it starts with the values that
// the phase before read last, which are still in the cache.
template <class Op>
int run_rows(const Op& op, const fastsdpo_call& call) {
  typedef typename Op::State State;
  typedef typename Op::Part Part;
  const int64_t N = call.B * call.L, segments = (call.V + SEGMENT - 1) / SEGMENT;
  // One allocation holds a row's State, its Parts and the operation's scratch memory. Each starts a
  // cache line.
  auto aligned = [](size_t bytes) { return (bytes + 63) & ~(size_t)63; };
  const size_t parts_offset = aligned(sizeof(State));
  const size_t extra_offset = parts_offset + aligned(segments * sizeof(Part));
  const size_t scratch = extra_offset + aligned(op.scratch_bytes());
  auto on_line = [&](char* memory) { return (char*)aligned((size_t)memory); };
  const int threads = call.threads < 1 ? 1 : (int)(call.threads < 1024 ? call.threads : 1024);
  int status = 0;

  auto state_at = [&](char* memory) { return (State*)memory; };
  auto parts_at = [&](char* memory) { return (Part*)(memory + parts_offset); };
  auto extra_at = [&](char* memory) { return memory + extra_offset; };
  auto visit = [&](int phase, int64_t row, int64_t segment, char* memory) {
    int64_t begin = segment * SEGMENT, end = begin + SEGMENT < call.V ? begin + SEGMENT : call.V;
    parts_at(memory)[segment] = Part();
    op.visit(phase, row, Span{begin, end}, *state_at(memory), parts_at(memory)[segment]);
  };

  if (threads == 1 || segments == 1 || N >= 2 * threads) {
#pragma omp parallel num_threads(threads < N ? threads : (int)N)
    {
      char* allocated = (char*)malloc(scratch + 64);
      char* memory = on_line(allocated);
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = 0; row < N; row++) {
        if (!allocated) {
#pragma omp atomic write
          status = -3;
          continue;
        }
        if (call.target_ids[row] == call.ignore_index) {
          op.ignore(row);
          continue;
        }
        op.open(row, *state_at(memory), extra_at(memory));
        for (int phase = 0; phase < op.phases; phase++) {
          for (int64_t i = 0; i < segments; i++)
            visit(phase, row, phase % 2 ? segments - 1 - i : i, memory);
          op.close(phase, row, *state_at(memory), parts_at(memory), segments);
        }
      }
      free(allocated);
    }
    return status;
  }

  char* allocated = (char*)malloc(N * scratch + 64);
  if (!allocated) return -3;
  char* memory = on_line(allocated);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < N; row++)
      if (call.target_ids[row] == call.ignore_index)
        op.ignore(row);
      else
        op.open(row, *state_at(memory + row * scratch), extra_at(memory + row * scratch));
    for (int phase = 0; phase < op.phases; phase++) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < N * segments; i++)
        if (call.target_ids[i / segments] != call.ignore_index)
          visit(phase, i / segments, i % segments, memory + i / segments * scratch);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < N; row++)
        if (call.target_ids[row] != call.ignore_index) {
          char* mine = memory + row * scratch;
          op.close(phase, row, *state_at(mine), parts_at(mine), segments);
        }
    }
  }
  free(allocated);
  return status;
}

// Calls f(column, n) for the blocks of a span.
template <class F>
INLINE void for_blocks(Span span, F f) {
  for (int64_t column = span.begin; column < span.end; column += BLOCK)
    f(column, (int)(span.end - column < BLOCK ? span.end - column : BLOCK));
}

INLINE float softcap_of(const fastsdpo_call& call) { return (float)call.softcap; }
INLINE double exponent_scale(const fastsdpo_call& call) { return LOG2E / call.temperature; }

}  // namespace
