// Log-probabilities of target tokens, the log-ratio of student and teacher, and the sampled-token
// loss.
//
// float32, bfloat16 or float16 in -> float32 arithmetic, double sums between blocks -> float32
// statistics; the gradient in any of the three, rounded once. Formulas:
// fastsdpo/ops/token_logps.py, fastsdpo/ops/divergence.py.
#include "rows.h"

namespace {

enum Kind { TOKEN_LOGPS, LOG_RATIO, SAMPLED_TOKEN };

struct TokenOp {
  enum Phase { TEACHER_STATS, STUDENT_STATS, GRADIENT };
  struct State {
    Row student, teacher;
    float scale;  // the row's gradient is scale * (1[v = y] - p_v)
    Exponentials exponentials;
    float* origins;  // of the student's blocks
  };
  struct Part {
    Stats stats;
  };

  const fastsdpo_call& call;
  const Kind kind;
  const Rows student, teacher, grad;
  const float softcap;
  const double k;
  int phases = 0;
  Phase order[3];

  TokenOp(const fastsdpo_call& call, Kind kind)
      : call(call),
        kind(kind),
        student(call.student, call.L),
        teacher(call.teacher, call.L),
        grad(call.grad, call.L),
        softcap(softcap_of(call)),
        k(exponent_scale(call)) {
    // The student's row comes last: the gradient finds part of it in the cache.
    if (call.passes & FASTSDPO_FORWARD) {
      if (teacher.data) order[phases++] = TEACHER_STATS;
      order[phases++] = STUDENT_STATS;
    }
    if (call.passes & FASTSDPO_GRADIENT) order[phases++] = GRADIENT;
  }

  // Exponentials are kept only if the gradient follows in the same call.
  int64_t kept_columns() const {
    return phases > 1 && order[phases - 1] == GRADIENT ? Exponentials::columns(call.V) : 0;
  }
  int64_t blocks() const { return (call.V + BLOCK - 1) / BLOCK; }
  size_t scratch_bytes() const { return (kept_columns() + blocks()) * sizeof(float); }

  void ignore(int64_t row) const {
    if (call.passes & FASTSDPO_FORWARD) {
      call.student_logps[row] = 0;
      if (call.entropy) call.entropy[row] = 0;
      if (call.teacher_logps) call.teacher_logps[row] = 0;
      if (call.per_token) call.per_token[row] = call.coef[row] = 0;
      for (int i = 0; i < 2; i++)
        if (call.stats[i]) call.stats[i][row * call.stats_stride] = 0;
    }
    if (call.passes & FASTSDPO_GRADIENT) write_zero_row(grad, row, call.V);
  }

  // A separate backward pass reads the statistics that the forward pass wrote.
  void open(int64_t row, State& state, char* scratch) const {
    state.exponentials = {(float*)scratch, kept_columns()};
    state.origins = (float*)scratch + kept_columns();
    if (call.passes & FASTSDPO_FORWARD) return;
    state.student = {call.stats[0][row * call.stats_stride],
                     call.stats[1][row * call.stats_stride]};
    if (kind == TOKEN_LOGPS)
      set_scale(state, call.upstream[row]);
    else
      set_scale(state, -log_ratio(call.student_logps[row], call.teacher_logps[row]) *
                           call.coef[row] * grad_loss(call));
  }

  void set_scale(State& state, float upstream) const {
    state.scale = (float)(upstream / call.temperature);
  }

  __attribute__((noinline)) void visit(int phase, int64_t row, Span span, const State& state,
                                       Part& part) const {
    if (order[phase] == GRADIENT)
      gradient(row, span, state);
    else if (order[phase] == TEACHER_STATS)
      statistics(teacher, row, span, part.stats);
    else if (kind == SAMPLED_TOKEN)
      student_exponentials(row, span, state, part.stats);
    else
      statistics(student, row, span, part.stats);
  }

  void statistics(const Rows& rows, int64_t row, Span span, Stats& stats) const {
    alignas(64) float block[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      with_block(rows, softcap, row, column, n, block, [&](auto* c) {
        if (call.entropy)
          add_block<true>(stats, c, n, k);
        else
          add_block<false>(stats, c, n, k);
      });
    });
  }

  // Writes the student's statistics if a gradient may follow.
  void student_exponentials(int64_t row, Span span, const State& state, Stats& stats) const {
    alignas(64) float block[BLOCK], unkept[BLOCK];
    for_blocks(span, [&](int64_t column, int n) {
      with_block(student, softcap, row, column, n, block, [&](auto* c) {
        stats.raise(block_max(c, n), k);
        stats.sum += exponentials(c, n, stats.max, k, state.exponentials.at(column, unkept));
      });
      state.origins[column / BLOCK] = stats.max;
    });
  }

  void gradient(int64_t row, Span span, const State& state) const {
    alignas(64) float logits_block[BLOCK], exponentials_block[BLOCK], grad_block[BLOCK];
    const int64_t y = call.target_ids[row];
    Stats stats;  // the running max where the exponentials are computed again
    for_blocks(span, [&](int64_t column, int n) {
      // bfloat16 is read in pairs, unless the gradient has another dtype.
      const bool pairs = in_place(student, softcap, n) && student.dtype == FASTSDPO_BFLOAT16;
      const bool pairs_out = pairs && grad.dtype == FASTSDPO_BFLOAT16;
      float* e = state.exponentials.at(column, exponentials_block);
      float& origin = state.origins[column / BLOCK];
      if (e == exponentials_block || pairs != pairs_out) {
        e = exponentials_block;
        auto again = [&](auto* c) {
          if (!(call.passes & FASTSDPO_FORWARD)) {
            stats.raise(block_max(c, n), k);
            origin = stats.max;
          }
          exponentials(c, n, origin, k, e);
        };
        if (pairs_out)
          again((const bf16*)student.at(row, column));
        else
          again(read_block(student, softcap, row, column, n, logits_block));
      }
      const float factor = (float)(-state.scale * exp2(log2_factor(state.student, origin, k)));
      const bool has_target = y >= column && y < column + n;
      if (pairs_out) {
        scaled(e, n, factor, (bf16*)grad.at(row, column));
        if (has_target)
          write_one(grad, row, y, e[lane_of_pair((int)(y - column))] * factor + state.scale);
        return;
      }
      const float* c = softcap == 0 ? nullptr  // read before the gradient may overwrite it
                                    : read_block(student, softcap, row, column, n, logits_block);
      float* g = gradient_block(grad, row, column, n, grad_block);
      scaled(e, n, factor, g);
      if (has_target) g[y - column] += state.scale;
      apply_softcap_slope(softcap, c, g, n);
      write_block(grad, row, column, n, g);
    });
  }

  template <class T>
  INLINE_MEMBER void scaled(const float* e, int n, float factor, T* g) const {
    for (int i = 0; i < padded(n); i += 4 * W) store_lanes(g + i, load_lanes<4>(e + i) * factor);
  }

  void close(int phase, int64_t row, State& state, const Part* parts, int64_t segments) const {
    if (order[phase] == GRADIENT) return;
    Stats stats;
    for (int64_t i = 0; i < segments; i++) stats.add(parts[i].stats, k);
    if (order[phase] == TEACHER_STATS) {
      state.teacher = stats.row();
      call.teacher_logps[row] = target_logps(teacher, state.teacher, row);
      return;
    }
    state.student = stats.row();
    float student_logps = call.student_logps[row] = target_logps(student, state.student, row);
    if (call.entropy)
      call.entropy[row] =
          (float)((state.student.log2sum - stats.dot / stats.sum) * 0.6931471805599453);
    if (call.stats[0]) {
      call.stats[0][row * call.stats_stride] = state.student.max;
      call.stats[1][row * call.stats_stride] = state.student.log2sum;
    }
    if (kind != SAMPLED_TOKEN) return;
    if (!teacher.data) call.teacher_logps[row] = call.given_teacher_logps[row];
    float ratio = log_ratio(student_logps, call.teacher_logps[row]);
    // 0 * inf = 0, and NaN stays.
    const bool nothing = ratio == 0 || (student_logps == 0 && ratio == ratio);
    call.per_token[row] = nothing ? 0 : -ratio * student_logps;
    call.coef[row] = coefficient(call, row, student_logps);
    set_scale(state, -ratio * call.coef[row]);
  }

  float target_logps(const Rows& rows, Row statistics, int64_t row) const {
    return log_prob(statistics, read_one(rows, softcap, row, call.target_ids[row]), k);
  }
};

}  // namespace

int FASTSDPO_NAME(token_logps)(const fastsdpo_call& call) {
  return run_rows(TokenOp(call, TOKEN_LOGPS), call);
}
int FASTSDPO_NAME(token_log_ratio)(const fastsdpo_call& call) {
  return run_rows(TokenOp(call, LOG_RATIO), call);
}
int FASTSDPO_NAME(sampled_token)(const fastsdpo_call& call) {
  return run_rows(TokenOp(call, SAMPLED_TOKEN), call);
}
