// Divergences over the whole vocabulary: forward KL, reverse KL, generalized Jensen-Shannon (JSD).
//
// float32, bfloat16 or float16 in (student and teacher may differ) -> float32 arithmetic, double
// sums between blocks -> float32 statistics; the gradient in any of the three, rounded once.
// Formulas: fastsdpo/ops/divergence/__init__.py. A KL is summed together with the softmax
// statistics, so KL goes over the logits once and JSD twice before the gradient; exponentials are
// computed again, never stored.
#include "rows.h"

namespace {

enum Mode { FORWARD_KL, REVERSE_KL, JSD };

// Statistics of both rows and dot = sum of w (x_own - x_other) for the KL: w is the teacher's
// unnormalized probability for the forward KL and the student's for the reverse one, x = (c - max)
// k.
template <int MODE>
struct PairStats {
  Stats student, teacher;
  double dot = 0;

  void raise(float to_student, float to_teacher, double k) {
    const Stats before_student = student, before_teacher = teacher;
    student.raise(to_student, k);
    teacher.raise(to_teacher, k);
    if (MODE == FORWARD_KL) move(before_teacher, teacher, before_student, student, k);
    if (MODE == REVERSE_KL) move(before_student, student, before_teacher, teacher, k);
  }

  // A raised max changes the weights of `dot` by a factor and its differences by a constant.
  void move(const Stats& own, const Stats& own_now, const Stats& other, const Stats& other_now,
            double k) {
    if (own.max == own_now.max && other.max == other_now.max) return;
    if (own.sum == 0) return;
    double shift_own = ((double)own.max - own_now.max) * k;
    double shift_other = other.max == -INF ? 0 : ((double)other.max - other_now.max) * k;
    double factor = exp2(shift_own);
    dot = factor == 0 ? 0 : factor * (dot + own.sum * (shift_own - shift_other));
  }

  void add(PairStats other, double k) {
    raise(other.student.max, other.teacher.max, k);
    other.raise(student.max, teacher.max, k);
    student.sum += other.student.sum;
    teacher.sum += other.teacher.sum;
    dot += other.dot;
  }

  template <class T>
  INLINE_MEMBER void add_block(const T* s, const T* t, int n, double k) {
    raise(block_max(s, n), block_max(t, n), k);
    const vf scale = all((float)k), s0 = all(student.origin()), t0 = all(teacher.origin());
    Lanes<2> sum_s = {}, sum_t = {}, sum_d = {};
    for (int i = 0; i < padded(n); i += sum_s.SIZE) {
      prefetch_next(s + i);
      prefetch_next(t + i);
      Lanes<2> x = (load_lanes<2>(s + i) - s0) * scale, y = (load_lanes<2>(t + i) - t0) * scale;
      Lanes<2> es = exp2v(x), et = exp2v(y);
      sum_s = sum_s + es;
      sum_t = sum_t + et;
      if (MODE == FORWARD_KL) sum_d = sum_d + where_nonzero(et, et * (y - x));
      if (MODE == REVERSE_KL) sum_d = sum_d + where_nonzero(es, es * (x - y));
    }
    student.sum += horizontal_sum(sum_s);
    teacher.sum += horizontal_sum(sum_t);
    if (MODE != JSD) dot += horizontal_sum(sum_d);
  }

  // In nats.
  double kl() const {
    const Row s = student.row(), t = teacher.row();
    double log2_kl = MODE == FORWARD_KL ? dot / teacher.sum - t.log2sum + s.log2sum
                                        : dot / student.sum - s.log2sum + t.log2sum;
    return log2_kl * 0.6931471805599453;
  }
};

// With d = t - s, the ratio of the mixture m = (1 - a) p + a q to p is m / p = (1 - a) + a 2^d,
// near 1 where student and teacher agree, which is where the difference of their logs counts: no
// digits are lost there. From 2^-126 down a probability counts as 2^-126 in d, so that -inf stays
// out of it.
constexpr float SMALLEST = -126.f;

template <int U>
struct Mixture {
  Lanes<U> student, difference, ratio, log_m_p;  // max(s, -126), d, 2^d = q / p, log2(m / p)
};

template <int U>
INLINE Mixture<U> mixture(Lanes<U> s, Lanes<U> t, vf weight_s, vf weight_t) {
  Mixture<U> m;
  m.student = max_or_b(SMALLEST, s);
  m.difference = max_or_b(SMALLEST, t) - m.student;
  m.ratio = exp2v(m.difference);
  m.log_m_p = log2v(m.ratio * weight_t + weight_s);
  return m;
}

template <int MODE>
struct DivergenceOp {
  enum Phase { STATS, MIXTURE, GRADIENT };
  struct State {
    Row student, teacher;
    float divergence;  // what the gradient subtracts, in nats: KL(p || q) or KL(p || m)
    float scale;
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

  size_t scratch_bytes() const { return 0; }

  void ignore(int64_t row) const {
    if (call.passes & FASTSDPO_FORWARD) {
      call.student_logps[row] = call.teacher_logps[row] = call.per_token[row] = call.coef[row] = 0;
      for (int i = 0; i < 5; i++)
        if (call.stats[i]) call.stats[i][row * call.stats_stride] = 0;
    }
    if (call.passes & FASTSDPO_GRADIENT) write_zero_row(grad, row, call.V);
  }

  void open(int64_t row, State& state, char*) const {
    if (call.passes & FASTSDPO_FORWARD) return;
    auto stat = [&](int i) { return call.stats[i][row * call.stats_stride]; };
    state.student = {stat(0), stat(1)};
    state.teacher = {stat(2), stat(3)};
    state.divergence = stat(4);
    set_scale(state, call.coef[row] * grad_loss(call));
  }

  void set_scale(State& state, float upstream) const {
    state.scale = (float)(upstream / call.temperature);
  }

  // Both rows' blocks lie in place in bfloat16, and a loop reads them as they are.
  bool both_bf16(int n) const {
    return in_place(student, softcap, n) && student.dtype == FASTSDPO_BFLOAT16 &&
           teacher.dtype == FASTSDPO_BFLOAT16;
  }

  // Calls f(s, t, n, column) for every block of both rows, with pointers of one type.
  template <class F>
  INLINE_MEMBER void for_pairs(int64_t row, Span span, F f) const {
    alignas(64) float student_block[BLOCK], teacher_block[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      if (both_bf16(n))
        f((const bf16*)student.at(row, column), (const bf16*)teacher.at(row, column), n, column);
      else
        f(read_block(student, softcap, row, column, n, student_block),
          read_block(teacher, softcap, row, column, n, teacher_block), n, column);
    });
  }

  __attribute__((noinline)) void visit(int phase, int64_t row, Span span, const State& state,
                                       Part& part) const {
    if (order[phase] == STATS)
      for_pairs(row, span,
                [&](auto* s, auto* t, int n, int64_t) { part.stats.add_block(s, t, n, k); });
    else if (order[phase] == MIXTURE)
      mixture_kl(row, span, state, part);
    else
      gradient(row, span, state);
  }

  void mixture_kl(int64_t row, Span span, const State& state, Part& part) const {
    const vf scale = all((float)k), weight_t = all(alpha), weight_s = all(1 - alpha);
    const vf s0 = all(state.student.max), s1 = all(state.student.log2sum);
    const vf t0 = all(state.teacher.max), t1 = all(state.teacher.log2sum);
    for_pairs(row, span, [&](auto* s, auto* t, int n, int64_t) {
      Lanes<2> sum_p = {}, sum_q = {};
      for (int i = 0; i < padded(n); i += sum_p.SIZE) {
        prefetch_next(s + i);
        prefetch_next(t + i);
        Mixture<2> m = mixture((load_lanes<2>(s + i) - s0) * scale - s1,
                               (load_lanes<2>(t + i) - t0) * scale - t1, weight_s, weight_t);
        Lanes<2> p = exp2v(m.student);
        sum_p = sum_p - p * m.log_m_p;
        sum_q = sum_q + p * m.ratio * (m.difference - m.log_m_p);
      }
      part.kl_student += horizontal_sum(sum_p);
      part.kl_teacher += horizontal_sum(sum_q);
    });
  }

  void gradient(int64_t row, Span span, const State& state) const {
    alignas(64) float grad_block[BLOCK];
    const vf scale = all((float)k), weight_t = all(alpha), weight_s = all(1 - alpha);
    const vf s0 = all(state.student.max), s1 = all(state.student.log2sum);
    const vf t0 = all(state.teacher.max), t1 = all(state.teacher.log2sum);
    const vf difference = all(state.student.log2sum - state.teacher.log2sum);
    const vf factor = all(MODE == JSD ? state.scale * (1 - alpha) : state.scale);
    const vf minus_factor = -factor, divergence = all(state.divergence);
    auto compute = [&](auto* s, auto* t, auto* g, int n) {
      constexpr int U = 2;
      for (int i = 0; i < padded(n); i += U * W) {
        prefetch_next(s + i);
        prefetch_next(t + i);
        Lanes<U> x = (load_lanes<U>(s + i) - s0) * scale, y = (load_lanes<U>(t + i) - t0) * scale;
        if (MODE == FORWARD_KL) {
          store_lanes(g + i, (exp2v(x - s1) - exp2v(y - t1)) * factor);
        } else if (MODE == REVERSE_KL) {
          Lanes<U> p = exp2v(x - s1);
          Lanes<U> inner = ((x - y) - difference) * LN2 - divergence;
          store_lanes(g + i, where_nonzero(p, p * inner * factor));
        } else {
          Mixture<U> m = mixture(x - s1, y - t1, weight_s, weight_t);
          store_lanes(g + i, exp2v(x - s1) * (m.log_m_p * LN2 + divergence) * minus_factor);
        }
      }
    };
    alignas(64) float student_block[BLOCK], teacher_block[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      if (both_bf16(n) && grad.dtype == FASTSDPO_BFLOAT16)
        return compute((const bf16*)student.at(row, column), (const bf16*)teacher.at(row, column),
                       (bf16*)grad.at(row, column), n);
      const float* s = read_block(student, softcap, row, column, n, student_block);
      const float* t = read_block(teacher, softcap, row, column, n, teacher_block);
      float* g = gradient_block(grad, row, column, n, grad_block);
      compute(s, t, g, n);
      apply_softcap_slope(softcap, s, g, n);
      write_block(grad, row, column, n, g);
    });
  }

  void close(int phase, int64_t row, State& state, const Part* parts, int64_t segments) const {
    if (order[phase] == GRADIENT) return;
    if (order[phase] == STATS) {
      PairStats<MODE> stats;
      for (int64_t i = 0; i < segments; i++) stats.add(parts[i].stats, k);
      state.student = stats.student.row();
      state.teacher = stats.teacher.row();
      if (MODE == JSD) return;
      call.per_token[row] = (float)stats.kl();
      state.divergence = MODE == REVERSE_KL ? call.per_token[row] : 0;
    } else {
      double kl_student = 0, kl_teacher = 0;
      for (int64_t i = 0; i < segments; i++) {
        kl_student += parts[i].kl_student;
        kl_teacher += parts[i].kl_teacher;
      }
      call.per_token[row] =
          (float)(((1 - call.alpha) * kl_student + call.alpha * kl_teacher) * 0.6931471805599453);
      state.divergence = (float)(kl_student * 0.6931471805599453);
    }
    finish(row, state);
  }

  void finish(int64_t row, State& state) const {
    const int64_t y = call.target_ids[row];
    call.student_logps[row] = log_prob(state.student, read_one(student, softcap, row, y), k);
    call.teacher_logps[row] = log_prob(state.teacher, read_one(teacher, softcap, row, y), k);
    call.coef[row] = coefficient(call, row, call.student_logps[row]);
    set_scale(state, call.coef[row]);
    if (!call.stats[0]) return;
    const float stats[5] = {state.student.max, state.student.log2sum, state.teacher.max,
                            state.teacher.log2sum, state.divergence};
    for (int i = 0; i < 5; i++) call.stats[i][row * call.stats_stride] = stats[i];
  }
};

}  // namespace

int FASTSDPO_NAME(divergence)(const fastsdpo_call& call) {
  if (call.alpha == 0) return run_rows(DivergenceOp<FORWARD_KL>(call), call);
  if (call.alpha == 1) return run_rows(DivergenceOp<REVERSE_KL>(call), call);
  return run_rows(DivergenceOp<JSD>(call), call);
}
