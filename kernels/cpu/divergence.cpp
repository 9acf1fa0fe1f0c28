// Divergences over the whole vocabulary: forward KL, reverse KL, generalized Jensen-Shannon (JSD).
//
// float32, bfloat16 or float16 in (student and teacher may differ) -> float32 arithmetic, double
// sums between blocks -> float32 statistics; the gradient in any of the three, rounded once.
// Formulas: fastsdpo/ops/divergence.py. The first pass takes the exponentials of both rows
// and sums the softmax statistics, and a KL with them. Where the gradient follows in the same call,
// it keeps the exponentials (Exponentials in rows.h): every mode then takes two exponentials for
// each position. JSD's second pass overwrites the teacher's with log2(m / p).
#include "rows.h"

namespace {

enum Mode { FORWARD_KL, REVERSE_KL, JSD };

// In the logarithm of a ratio, JSD takes an exponential below 2^-125 as 2^-125, so that the
// logarithm is never -inf. Half of 2^-125, which log2_ratio may form, is still a normal number.
constexpr float SMALLEST = -125.f, SMALLEST_EXP = 0x1p-125f;

// The reverse KL counts the teacher's logits from its logit at the student's most likely token,
// unless that lies so far below the teacher's maximum that a difference could overflow.
constexpr double FARTHEST_CENTER = 1e30;

// Statistics of both rows and dot = sum of w (x_own - x_other) for the KL: w is the teacher's
// unnormalized probability for the forward KL and the student's for the reverse one, x = (c - max)
// k. For the reverse KL the other's x is (c - center) k: a student that is sure of one token then
// has a dot of small terms only, which its gradient p (x_own - x_other - dot / sum) needs.
template <int MODE>
struct PairStats {
  Stats student, teacher;
  float center = -INF;
  double dot = 0;

  void raise(float to_student, float to_teacher, float to_center, double k) {
    const Stats before_student = student, before_teacher = teacher;
    const float before_center = center;
    student.raise(to_student, k);
    teacher.raise(to_teacher, k);
    center = ((double)teacher.max - to_center) * k < FARTHEST_CENTER ? to_center : teacher.max;
    if (MODE == FORWARD_KL) move(before_teacher, teacher, before_student.max, student.max, k);
    if (MODE == REVERSE_KL) move(before_student, student, before_center, center, k);
  }

  // A larger max scales the weights of `dot`; that and another origin add to its differences.
  void move(const Stats& own, const Stats& own_now, float other, float other_now, double k) {
    if (own.max == own_now.max && other == other_now) return;
    if (own.sum == 0) return;
    double shift_own = ((double)own.max - own_now.max) * k;
    double shift_other = other == -INF ? 0 : ((double)other - other_now) * k;
    double factor = exp2(shift_own);
    dot = factor == 0 ? 0 : factor * (dot + own.sum * (shift_own - shift_other));
  }

  void add(PairStats other, double k) {
    raise(other.student.max, other.teacher.max,
          other.student.max > student.max ? other.center : center, k);
    other.raise(student.max, teacher.max, center, k);
    student.sum += other.student.sum;
    teacher.sum += other.teacher.sum;
    dot += other.dot;
  }

  // Adds a block; stores the exponentials in es and et and returns, for JSD, the sum of et (y - x).
  template <class T>
  INLINE_MEMBER float add_block(const T* s, const T* t, int n, double k, float* es, float* et) {
    const float max_s = block_max(s, n), max_t = block_max(t, n);
    const bool moves = MODE == REVERSE_KL && max_s > student.max;
    raise(max_s, max_t, moves ? max_where(s, max_s, t, n) : center, k);
    const vf scale = all((float)k), s0 = all(student.origin()), t0 = all(teacher.origin());
    const vf center0 = all(center_origin());
    vf sum_s = {}, sum_t = {}, sum_d = {};
    for (int i = 0; i < padded(n); i += 2 * W) {
      prefetch_next(s + i);
      prefetch_next(t + i);
      Lanes<2> x = (load_lanes<2>(s + i) - s0) * scale, y = (load_lanes<2>(t + i) - t0) * scale;
      Lanes<2> p = exp2v(x), q = exp2v(y);
      store_lanes(es + i, p);
      if (MODE != REVERSE_KL) store_lanes(et + i, q);
      sum_s += sum_of(p);
      sum_t += sum_of(q);
      if (MODE == FORWARD_KL) sum_d += sum_of(where_nonzero(q, q * (y - x)));
      if (MODE == REVERSE_KL)
        sum_d += sum_of(where_nonzero(p, p * (x - (load_lanes<2>(t + i) - center0) * scale)));
      if (MODE == JSD) sum_d += sum_of(q * (max_or_b(SMALLEST, y) - max_or_b(SMALLEST, x)));
    }
    student.sum += horizontal_sum(sum_s);
    teacher.sum += horizontal_sum(sum_t);
    if (MODE == JSD) return horizontal_sum(sum_d);
    dot += horizontal_sum(sum_d);
    return 0;
  }

  float center_origin() const { return center == -INF ? 0 : center; }

  // In nats.
  double kl(double k) const {
    const Row s = student.row(), t = teacher.row();
    double log2_kl = MODE == FORWARD_KL ? dot / teacher.sum - t.log2sum + s.log2sum
                                        : dot / student.sum - s.log2sum + t.log2sum +
                                              ((double)t.max - center_origin()) * k;
    return log2_kl * 0.6931471805599453;
  }
};

// The factors of a block's mixture m = (1 - a) p + a q, with p_v = e_v * student.
struct Factors {
  float student, teacher;
  float log_ratio;  // log2(teacher / student)
};

// Where one policy's probabilities of a block are more than 2^100 times the other's, the larger
// ones alone make the mixture.
constexpr double FARTHEST = 100;

INLINE Factors factors(Row student, Row teacher, float student_origin, float teacher_origin,
                       double k) {
  const double s = log2_factor(student, student_origin, k);
  const double t = log2_factor(teacher, teacher_origin, k);
  const double r = t - s;
  return {(float)exp2(s), (float)exp2(t),
          (float)(r < -FARTHEST  ? -FARTHEST
                  : r > FARTHEST ? FARTHEST
                                 : r)};
}

template <int MODE>
struct DivergenceOp {
  enum Phase { STATS, MIXTURE, GRADIENT };
  struct Block {
    float student, teacher;  // origins of the exponentials
    float dot;               // JSD: the sum of e_teacher log2(e_teacher / e_student)
  };
  struct State {
    Row student, teacher;
    float center;      // origin of the teacher's logits in the gradient of the reverse KL
    float divergence;  // what the gradient subtracts, in base 2: dot / sum, or KL(p || m)
    float scale;
    Exponentials es, et;  // et becomes log2(m / p) in JSD's second pass
    Block* blocks;
  };
  struct Part {
    PairStats<MODE> stats;
    double kl_student = 0, kl_teacher = 0;  // to the mixture, in base 2
  };

  const fastsdpo_call& call;
  const Rows student, teacher, grad;
  const float softcap, alpha;
  const double k;
  int phases = 0;
  Phase order[3];

  explicit DivergenceOp(const fastsdpo_call& call)
      : call(call),
        student(call.student, call.L),
        teacher(call.teacher, call.L),
        grad(call.grad, call.L),
        softcap(softcap_of(call)),
        alpha((float)call.alpha),
        k(exponent_scale(call)) {
    if (call.passes & FASTSDPO_FORWARD) {
      order[phases++] = STATS;
      if (MODE == JSD) order[phases++] = MIXTURE;
    }
    if (call.passes & FASTSDPO_GRADIENT) order[phases++] = GRADIENT;
  }

  // Exponentials are kept where a later pass in the same call needs them.
  int64_t kept_columns() const { return phases > 1 ? Exponentials::columns(call.V) : 0; }
  int64_t blocks() const { return (call.V + BLOCK - 1) / BLOCK; }
  size_t scratch_bytes() const {
    return kept_columns() * (MODE == REVERSE_KL ? 1 : 2) * sizeof(float) + blocks() * sizeof(Block);
  }

  void ignore(int64_t row) const {
    if (call.passes & FASTSDPO_FORWARD) {
      call.student_logps[row] = call.teacher_logps[row] = call.per_token[row] = call.coef[row] = 0;
      for (int i = 0; i < 5; i++)
        if (call.stats[i]) call.stats[i][row * call.stats_stride] = 0;
      if (call.class_grads) call.class_grads[2 * row] = call.class_grads[2 * row + 1] = 0;
    }
    if (call.passes & FASTSDPO_GRADIENT) write_zero_row(grad, row, call.V);
  }

  void open(int64_t row, State& state, char* scratch) const {
    const int64_t kept = kept_columns();
    float* exponentials = (float*)scratch;
    state.es = {exponentials, kept};
    if (MODE != REVERSE_KL) exponentials += kept;
    state.et = {exponentials, MODE == REVERSE_KL ? 0 : kept};
    state.blocks = (Block*)(exponentials + kept);
    if (call.passes & FASTSDPO_FORWARD) return;
    auto stat = [&](int i) { return call.stats[i][row * call.stats_stride]; };
    state.student = {stat(0), stat(1)};
    state.teacher = {stat(2), stat(3)};
    if (call.class_grads) {
      state.center = call.class_grads[2 * row];
      state.divergence = call.class_grads[2 * row + 1];
    } else {  // of statistics that another caller put together
      state.center = stat(2);
      state.divergence = (float)(stat(4) * LOG2E);
      if (MODE == REVERSE_KL) state.divergence += stat(1) - stat(3);
    }
    set_scale(state, call.coef[row] * grad_loss(call));
  }

  void set_scale(State& state, float upstream) const {
    state.scale = (float)(upstream / call.temperature);
  }

  // Whether both rows are bfloat16 and a loop may read their blocks in place, in pairs.
  bool pairs_in(int n) const {
    return in_place(student, softcap, n) && student.dtype == FASTSDPO_BFLOAT16 &&
           teacher.dtype == FASTSDPO_BFLOAT16;
  }

  // Calls f(s, t) for a block of both rows, with pointers of one type.
  template <class F>
  INLINE_MEMBER void with_pair(int64_t row, int64_t column, int n, bool pairs, F f) const {
    alignas(64) float student_block[BLOCK], teacher_block[BLOCK];
    if (pairs)
      f((const bf16*)student.at(row, column), (const bf16*)teacher.at(row, column));
    else
      f(read_block(student, softcap, row, column, n, student_block),
        read_block(teacher, softcap, row, column, n, teacher_block));
  }

  __attribute__((noinline)) void visit(int phase, int64_t row, Span span, const State& state,
                                       Part& part) const {
    if (order[phase] == STATS)
      statistics(row, span, state, part.stats);
    else if (order[phase] == MIXTURE)
      mixture_kl(row, span, state, part);
    else
      gradient(row, span, state);
  }

  void statistics(int64_t row, Span span, const State& state, PairStats<MODE>& stats) const {
    alignas(64) float student_block[BLOCK], teacher_block[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      float dot = 0;
      with_pair(row, column, n, pairs_in(n), [&](auto* s, auto* t) {
        dot = stats.add_block(s, t, n, k, state.es.at(column, student_block),
                              state.et.at(column, teacher_block));
      });
      state.blocks[column / BLOCK] = {stats.student.max, stats.teacher.max, dot};
    });
  }

  // Computes the exponentials of a block again, with the bits that the statistics had.
  void again(int64_t row, int64_t column, int n, bool pairs, const Block& block, float* es,
             float* et) const {
    with_pair(row, column, n, pairs, [&](auto* s, auto* t) {
      exponentials(s, n, block.student, k, es);
      if (MODE != REVERSE_KL) exponentials(t, n, block.teacher, k, et);
    });
  }

  // Writes log2(m / p) of a block to `log_m_p` (which may be et) and adds up e_s log2(m / p) and
  // e_t log2(q / m); `dot` is added to the second sum at the end. Where student and teacher agree,
  // m / p is near 1, and log2_ratio is exact there.
  __attribute__((noinline)) void mixture(const float* es, const float* et, int n, Factors f,
                                         float* log_m_p, float* sum_p, float* sum_q) const {
    const vf weight_s = all(1 - alpha), weight_t = all((float)(call.alpha * exp2(f.log_ratio)));
    const vf log_ratio = all(f.log_ratio);
    vf to_p = {}, to_q = {};
    for (int i = 0; i < padded(n); i += 4 * W) {
      Lanes<4> p = load_lanes<4>(es + i), q = load_lanes<4>(et + i);
      Lanes<4> positive = max_or_b(SMALLEST_EXP, p);
      Lanes<4> l = log2_ratio(positive * weight_s + q * weight_t, positive);
      for (int j = 0; j < 4; j++) to_p += p.v[j] * l.v[j];
      for (int j = 0; j < 4; j++) to_q += q.v[j] * (log_ratio - l.v[j]);
      store_lanes(log_m_p + i, l);
    }
    *sum_p = horizontal_sum(to_p);
    *sum_q = horizontal_sum(to_q);
  }

  void mixture_kl(int64_t row, Span span, const State& state, Part& part) const {
    alignas(64) float student_block[BLOCK], teacher_block[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      const Block& block = state.blocks[column / BLOCK];
      float* es = state.es.at(column, student_block);
      float* et = state.et.at(column, teacher_block);
      if (es == student_block) again(row, column, n, pairs_in(n), block, es, et);
      const Factors f = factors(state.student, state.teacher, block.student, block.teacher, k);
      float sum_p, sum_q;
      mixture(es, et, n, f, et, &sum_p, &sum_q);
      part.kl_student -= (double)f.student * sum_p;
      part.kl_teacher += (double)f.teacher * ((double)block.dot + sum_q);
    });
  }

  void gradient(int64_t row, Span span, const State& state) const {
    alignas(64) float student_block[BLOCK], teacher_block[BLOCK], logits_block[BLOCK];
    alignas(64) float grad_block[BLOCK];
    PairStats<JSD> stats;  // the running max where the exponentials are computed again
    for_blocks(span, [&](int64_t column, int n) {
      // bfloat16 is read in pairs, unless the gradient has another dtype.
      const bool pairs = pairs_in(n) && grad.dtype == FASTSDPO_BFLOAT16;
      float* es = state.es.at(column, student_block);
      float* et = state.et.at(column, teacher_block);
      Block& block = state.blocks[column / BLOCK];
      if (!(call.passes & FASTSDPO_FORWARD)) {
        with_pair(row, column, n, pairs,
                  [&](auto* s, auto* t) { stats.raise(block_max(s, n), block_max(t, n), 0, k); });
        block = {stats.student.max, stats.teacher.max, 0};
      }
      const Factors f = factors(state.student, state.teacher, block.student, block.teacher, k);
      if (es == student_block || pairs != pairs_in(n)) {
        es = student_block, et = teacher_block;
        again(row, column, n, pairs, block, es, et);
        float unused[2];
        if (MODE == JSD) mixture(es, et, n, f, et, unused, unused + 1);
      }
      if (pairs)
        return block_gradient(row, column, n, state, f, es, et, nullptr,
                              (bf16*)grad.at(row, column));
      const float* c = softcap == 0 ? nullptr  // read before the gradient may overwrite it
                                    : read_block(student, softcap, row, column, n, logits_block);
      float* g = gradient_block(grad, row, column, n, grad_block);
      block_gradient(row, column, n, state, f, es, et, c, g);
      apply_softcap_slope(softcap, c, g, n);
      write_block(grad, row, column, n, g);
    });
  }

  // `capped`: the student's block after the softcap; null without a softcap.
  template <class G>
  INLINE_MEMBER void block_gradient(int64_t row, int64_t column, int n, const State& state,
                                    Factors f, const float* es, const float* et,
                                    const float* capped, G* g) const {
    constexpr int U = 2;
    if (MODE == FORWARD_KL) {
      const vf student = all(state.scale * f.student), teacher = all(-state.scale * f.teacher);
      for (int i = 0; i < padded(n); i += U * W)
        store_lanes(g + i, load_lanes<U>(es + i) * student + load_lanes<U>(et + i) * teacher);
    } else if (MODE == REVERSE_KL) {
      const vf factor = all(f.student), to_bits = all((float)k), slope = all(state.scale * LN2);
      const vf mean = all(state.divergence);
      const vf s0 = all(state.student.max), t0 = all(state.center);
      auto write = [&](auto* s, auto* t) {
        for (int i = 0; i < padded(n); i += U * W) {
          prefetch_next(s + i);
          prefetch_next(t + i);
          Lanes<U> p = load_lanes<U>(es + i) * factor;
          Lanes<U> difference = (load_lanes<U>(s + i) - s0) - (load_lanes<U>(t + i) - t0);
          store_lanes(g + i, where_nonzero(p, p * ((difference * to_bits - mean) * slope)));
        }
      };
      alignas(64) float teacher_block[BLOCK];
      if (capped)
        write(capped, read_block(teacher, softcap, row, column, n, teacher_block));
      else
        with_pair(row, column, n, __is_same(G, bf16), write);
    } else {
      const vf slope = all(-state.scale * (1 - alpha) * f.student * LN2);
      const vf kl = all(state.divergence);
      for (int i = 0; i < padded(n); i += U * W)
        store_lanes(g + i, load_lanes<U>(es + i) * ((load_lanes<U>(et + i) + kl) * slope));
    }
  }

  void close(int phase, int64_t row, State& state, const Part* parts, int64_t segments) const {
    if (order[phase] == GRADIENT) return;
    if (order[phase] == STATS) {
      PairStats<MODE> stats;
      for (int64_t i = 0; i < segments; i++) stats.add(parts[i].stats, k);
      state.student = stats.student.row();
      state.teacher = stats.teacher.row();
      state.center = stats.center_origin();
      if (MODE == JSD) return;
      call.per_token[row] = (float)stats.kl(k);
      state.divergence = MODE == REVERSE_KL ? (float)(stats.dot / stats.student.sum) : 0;
    } else {
      double kl_student = 0, kl_teacher = 0;
      for (int64_t i = 0; i < segments; i++) {
        kl_student += parts[i].kl_student;
        kl_teacher += parts[i].kl_teacher;
      }
      call.per_token[row] =
          (float)(((1 - call.alpha) * kl_student + call.alpha * kl_teacher) * 0.6931471805599453);
      // log2_ratio loses a NaN in its integer steps, so the gradient takes it from the loss.
      state.divergence =
          call.per_token[row] != call.per_token[row] ? call.per_token[row] : (float)kl_student;
    }
    finish(row, state);
  }

  void finish(int64_t row, State& state) const {
    const int64_t y = call.target_ids[row];
    call.student_logps[row] = log_prob(state.student, read_one(student, softcap, row, y), k);
    call.teacher_logps[row] = log_prob(state.teacher, read_one(teacher, softcap, row, y), k);
    call.coef[row] = coefficient(call, row, call.student_logps[row]);
    set_scale(state, call.coef[row]);
    if (call.class_grads) {
      call.class_grads[2 * row] = state.center;
      call.class_grads[2 * row + 1] = state.divergence;
    }
    if (!call.stats[0]) return;
    const float stats[5] = {state.student.max, state.student.log2sum, state.teacher.max,
                            state.teacher.log2sum,
                            MODE == REVERSE_KL ? call.per_token[row] : state.divergence * LN2};
    for (int i = 0; i < 5; i++) call.stats[i][row * call.stats_stride] = stats[i];
  }
};

}  // namespace

int FASTSDPO_NAME(divergence)(const fastsdpo_call& call) {
  if (call.alpha == 0) return run_rows(DivergenceOp<FORWARD_KL>(call), call);
  if (call.alpha == 1) return run_rows(DivergenceOp<REVERSE_KL>(call), call);
  return run_rows(DivergenceOp<JSD>(call), call);
}
