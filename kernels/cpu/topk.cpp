// Divergences over a top-k support of the vocabulary, with one more class for all that lies outside
// it (the tail), or renormalized over the support.
//
// float32, bfloat16 or float16 in -> float32 arithmetic on the vocabulary, double on the K + 1
// classes -> float32 results; the gradient in any of the three, rounded once. Formulas:
// fastsdpo/ops/divergence.py. One pass sums the tokens outside the support: 1 - sum would lose
// the digits of a small tail. The support's classes are then added for the statistics of the whole
// row.
#include "rows.h"

namespace {

struct TopkOp {
  enum Phase { STATS, GRADIENT };
  struct Entry {
    int64_t id, position;  // position in the caller's order
  };
  struct State {
    Row student;
    Row outside;      // statistics of what lies outside the support
    float tail_grad;  // gradient of the tail class; a token's share is its part of the tail
    float scale;
    Entry* support;         // sorted by id
    double *log_p, *log_q;  // [K + 1] in nats, in the order of `support`, the tail last
  };
  struct Part {
    Stats student, teacher;  // outside the support
  };

  const fastsdpo_call& call;
  const Rows student, teacher, grad;
  const float softcap;
  const double k;
  const int64_t K;
  int phases = 0;
  Phase order[2];

  explicit TopkOp(const fastsdpo_call& call)
      : call(call),
        student(call.student, call.L),
        teacher(call.teacher, call.L),
        grad(call.grad, call.L),
        softcap(softcap_of(call)),
        k(exponent_scale(call)),
        K(call.K) {
    if (call.passes & FASTSDPO_FORWARD) order[phases++] = STATS;
    if (call.passes & FASTSDPO_GRADIENT) order[phases++] = GRADIENT;
  }

  size_t scratch_bytes() const { return K * sizeof(Entry) + 2 * (K + 1) * sizeof(double); }

  void ignore(int64_t row) const {
    if (call.passes & FASTSDPO_FORWARD) {
      call.student_logps[row] = call.teacher_logps[row] = call.per_token[row] = call.coef[row] = 0;
      for (int i = 0; i < 4; i++)
        if (call.stats[i]) call.stats[i][row * call.stats_stride] = 0;
      for (int64_t j = 0; j < K; j++) call.class_grads[row * K + j] = 0;
    }
    if (call.passes & FASTSDPO_GRADIENT) write_zero_row(grad, row, call.V);
  }

  static int by_id(const void* a, const void* b) {
    int64_t x = ((const Entry*)a)->id, y = ((const Entry*)b)->id;
    return (x > y) - (x < y);
  }

  void open(int64_t row, State& state, char* scratch) const {
    state.support = (Entry*)scratch;
    state.log_p = (double*)(scratch + K * sizeof(Entry));
    state.log_q = state.log_p + K + 1;
    for (int64_t j = 0; j < K; j++) state.support[j] = {call.topk_ids[row * K + j], j};
    qsort(state.support, K, sizeof(Entry), by_id);
    if (call.passes & FASTSDPO_FORWARD) return;
    auto stat = [&](int i) { return call.stats[i][row * call.stats_stride]; };
    state.outside = {stat(0), stat(1)};
    state.tail_grad = stat(2);
    set_scale(state, call.coef[row] * grad_loss(call));
  }

  void set_scale(State& state, float upstream) const {
    state.scale = (float)(upstream / call.temperature);
  }

  // The support's entries with id in [begin, end).
  const Entry* first_at_least(const State& state, int64_t id) const {
    int64_t low = 0, high = K;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (state.support[middle].id < id)
        low = middle + 1;
      else
        high = middle;
    }
    return state.support + low;
  }

  __attribute__((noinline)) void visit(int phase, int64_t row, Span span, const State& state,
                                       Part& part) const {
    if (order[phase] == GRADIENT) return gradient(row, span, state);
    outside_support(student, row, span, state, part.student);
    if (teacher.data) outside_support(teacher, row, span, state, part.teacher);
  }

  void outside_support(const Rows& rows, int64_t row, Span span, const State& state,
                       Stats& stats) const {
    alignas(64) float block[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      const Entry* entry = first_at_least(state, column);
      const Entry* end = first_at_least(state, column + n);
      if (entry == end) {
        with_block(rows, softcap, row, column, n, block,
                   [&](auto* c) { add_block<false>(stats, c, n, k); });
        return;
      }
      fill_block(rows, softcap, rows.at(row, column), n, block);
      for (; entry != end; entry++) block[entry->id - column] = -INF;
      add_block<false>(stats, block, n, k);
    });
  }

  void gradient(int64_t row, Span span, const State& state) const {
    alignas(64) float logits_block[BLOCK], grad_block[BLOCK];
    const vf max = all(state.outside.max), log2sum = all(state.outside.log2sum);
    const vf scale_k = all((float)k), factor = all(state.tail_grad), scale = all(state.scale);
    const float* class_grads = call.class_grads + row * K;
    for_blocks(span, [&](int64_t column, int n) {
      const float* c = nullptr;
      if (call.add_tail || softcap != 0)
        c = read_block(student, softcap, row, column, n, logits_block);
      float* g = gradient_block(grad, row, column, n, grad_block);
      if (call.add_tail)
        for (int i = 0; i < padded(n); i += 4 * W) {
          prefetch_next(c + i);
          Lanes<4> p = exp2v((load_lanes<4>(c + i) - max) * scale_k - log2sum);
          store_lanes(g + i, where_nonzero(p, p * factor * scale));
        }
      else
        memset(g, 0, padded(n) * sizeof(float));
      const Entry* end = first_at_least(state, column + n);
      for (const Entry* entry = first_at_least(state, column); entry != end; entry++)
        g[entry->id - column] = class_grads[entry->position] * state.scale;
      apply_softcap_slope(softcap, c, g, n);
      write_block(grad, row, column, n, g);
    });
  }

  // Adds the support to the statistics outside of it, and computes the log-probs of the classes.
  Row classes(const Rows& rows, int64_t row, const State& state, const Stats& outside,
              double* log_p) const {
    Stats all_classes = outside;
    for (int64_t j = 0; j < K; j++) {
      float c = read_one(rows, softcap, row, state.support[j].id);
      log_p[j] = c;
      Stats one;
      one.max = c;
      one.sum = c == -INF ? 0 : c == c ? 1 : c;  // keep NaN
      all_classes.add(one, k);
    }
    const double log2sum = log2(all_classes.sum), max = all_classes.max;
    for (int64_t j = 0; j < K; j++)
      log_p[j] = ((log_p[j] - max) * k - log2sum) * 0.6931471805599453;
    log_p[K] = outside.sum == 0
                   ? -INF
                   : ((outside.max - max) * k + log2(outside.sum) - log2sum) * 0.6931471805599453;
    if (!call.add_tail) renormalize(log_p);
    return all_classes.row();
  }

  double log_sum_exp(const double* x) const {
    double max = -INF, sum = 0;
    for (int64_t j = 0; j < K; j++) max = x[j] > max ? x[j] : max;
    for (int64_t j = 0; j < K; j++) sum += exp(x[j] - max);
    return max + log(sum);
  }

  void renormalize(double* log_p) const {
    const double total = log_sum_exp(log_p);
    for (int64_t j = 0; j < K; j++) log_p[j] -= total;
  }

  void close(int phase, int64_t row, State& state, const Part* parts, int64_t segments) const {
    if (order[phase] == GRADIENT) return;
    Stats outside, outside_teacher;
    for (int64_t i = 0; i < segments; i++) {
      outside.add(parts[i].student, k);
      outside_teacher.add(parts[i].teacher, k);
    }
    const int64_t y = call.target_ids[row];
    state.student = classes(student, row, state, outside, state.log_p);
    state.outside = outside.row();
    if (outside.sum == 0) state.outside = {0, 0};  // an empty tail: every logit in it is -inf
    const float student_logps = log_prob(state.student, read_one(student, softcap, row, y), k);
    float teacher_logps =
        NAN;  // unknown where only the teacher's top k is given and y is not in it
    if (teacher.data) {
      Row statistics = classes(teacher, row, state, outside_teacher, state.log_q);
      teacher_logps = log_prob(statistics, read_one(teacher, softcap, row, y), k);
    } else {
      const float* given = call.given_topk_logps + row * K;
      for (int64_t j = 0; j < K; j++) {
        state.log_q[j] = given[state.support[j].position];
        if (state.support[j].id == y) teacher_logps = given[state.support[j].position];
      }
      const double total = log_sum_exp(state.log_q);
      state.log_q[K] = log(-expm1(total > 0 ? 0 : total));
      if (!call.add_tail) renormalize(state.log_q);
    }
    call.student_logps[row] = student_logps;
    call.teacher_logps[row] = teacher_logps;
    call.coef[row] = coefficient(call, row, student_logps);
    set_scale(state, call.coef[row]);
    divergence(row, state);
  }

  static double weighted(double p, double value) { return p == 0 ? 0 : p * value; }

  void divergence(int64_t row, State& state) const {
    const double alpha = call.alpha, *s = state.log_p, *t = state.log_q;
    const int64_t count = K + (call.add_tail ? 1 : 0);
    auto log_mixture = [&](int64_t j) {
      double m = (1 - alpha) * exp(s[j]) + alpha * exp(t[j]);
      return m == 0 ? 0 : log(m);
    };
    double loss = 0, divergence = 0;  // divergence: what the gradient subtracts
    if (alpha == 0) {
      for (int64_t j = 0; j < count; j++) loss += weighted(exp(t[j]), t[j] - s[j]);
    } else if (alpha == 1) {
      for (int64_t j = 0; j < count; j++) loss += weighted(exp(s[j]), s[j] - t[j]);
      divergence = loss;
    } else {
      double kl_teacher = 0;
      for (int64_t j = 0; j < count; j++) {
        double log_m = log_mixture(j);
        divergence += weighted(exp(s[j]), s[j] - log_m);
        kl_teacher += weighted(exp(t[j]), t[j] - log_m);
      }
      loss = (1 - alpha) * divergence + alpha * kl_teacher;
    }
    state.tail_grad = 0;
    for (int64_t j = 0; j < count; j++) {
      double p = exp(s[j]), class_grad;
      if (alpha == 0)
        class_grad = p - exp(t[j]);
      else if (alpha == 1)
        class_grad = weighted(p, s[j] - t[j] - divergence);
      else
        class_grad = (1 - alpha) * weighted(p, s[j] - log_mixture(j) - divergence);
      if (j < K)
        call.class_grads[row * K + state.support[j].position] = (float)class_grad;
      else
        state.tail_grad = (float)class_grad;
    }
    call.per_token[row] = (float)loss;
    if (!call.stats[0]) return;
    const float stats[4] = {state.outside.max, state.outside.log2sum, state.tail_grad,
                            (float)divergence};
    for (int i = 0; i < 4; i++) call.stats[i][row * call.stats_stride] = stats[i];
  }
};

}  // namespace

int FASTSDPO_NAME(topk)(const fastsdpo_call& call) { return run_rows(TopkOp(call), call); }
