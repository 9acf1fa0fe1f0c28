// Runs every operation over sizes, dtypes, thread counts and layouts on buffers of exactly the size
// that an operation may touch; built with AddressSanitizer and UBSan by -DFASTSDPO_SANITIZE=ON.
// Values are checked by tests/ops; here only that fused and separate passes agree, that nothing is
// out of bounds and that no behaviour is undefined.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "fastsdpo.h"

namespace {

uint32_t seed = 1;
float uniform() {
  seed = seed * 1664525u + 1013904223u;
  return (float)(seed >> 8) / 16777216.f;
}

// Rows of logits with a gap between them that belongs to nobody.
struct Logits {
  std::vector<char> memory;
  fastsdpo_rows rows;

  Logits(int64_t B, int64_t L, int64_t V, int64_t dtype, bool masked) {
    const int64_t size = dtype == FASTSDPO_FLOAT32 ? 4 : 2;
    const int64_t stride_l = V + 3, stride_b = stride_l * L + 5;
    memory.resize((B ? (B - 1) * stride_b + (L ? (L - 1) * stride_l + V : 0) : 0) * size);
    rows = {memory.data(), stride_b, stride_l, dtype};
    std::vector<float> row(V);
    for (int64_t r = 0; r < B * L; r++) {
      for (float& x : row) x = masked && uniform() < 0.3f ? -INFINITY : 20 * uniform() - 10;
      row[0] = 1;
      fastsdpo_convert(row.data(), FASTSDPO_FLOAT32,
                       memory.data() + (r / L * stride_b + r % L * stride_l) * size, dtype, V);
    }
  }
};

int failures = 0;

void expect(bool ok, const char* what, const fastsdpo_call& call) {
  if (ok) return;
  failures++;
  printf("%s: %s fails: L=%lld V=%lld K=%lld dtype=%lld threads=%lld\n", fastsdpo_isa(), what,
         (long long)call.L, (long long)call.V, (long long)call.K, (long long)call.student.dtype,
         (long long)call.threads);
}

typedef int (*operation)(const fastsdpo_call*);

void check(int64_t B, int64_t L, int64_t V, int64_t dtype, int64_t teacher_dtype, int64_t threads,
           double softcap, bool masked) {
  const int64_t N = B * L, K = V < 7 ? V : 7;
  Logits student(B, L, V, dtype, masked), teacher(B, L, V, teacher_dtype, false);
  Logits grad(B, L, V, dtype, false), fused_grad(B, L, V, dtype, false);
  std::vector<int64_t> target_ids(N), topk_ids(N * K);
  std::vector<float> weights(N, 0.5f), old_logps(N, -3.f), upstream(N, 2.f);
  for (int64_t r = 0; r < N; r++) {
    target_ids[r] = r % 4 == 3 ? -100 : (int64_t)(uniform() * V);
    for (int64_t j = 0; j < K; j++) topk_ids[r * K + j] = (j * (V / K) + r) % V;
  }
  std::vector<float> out[5], stats(N * 5), class_grads(N * K), entropy(N);
  for (auto& vector : out) vector.resize(N);

  fastsdpo_call call = {};
  call.student = student.rows;
  call.teacher = teacher.rows;
  call.B = B, call.L = L, call.V = V, call.K = K;
  call.ignore_index = -100;
  call.threads = threads;
  call.temperature = 0.8;
  call.softcap = softcap;
  call.is_clip = 2;
  call.target_ids = target_ids.data();
  call.weights = weights.data();
  call.old_logps = old_logps.data();
  call.student_logps = out[0].data();
  call.teacher_logps = out[1].data();
  call.per_token = out[2].data();
  call.coef = out[3].data();
  call.class_grads = class_grads.data();
  for (int i = 0; i < 5; i++) call.stats[i] = stats.data() + i;
  call.stats_stride = 5;

  auto both_ways = [&](const char* name, operation run) {
    call.passes = FASTSDPO_FORWARD;
    expect(run(&call) == 0, name, call);
    call.passes = FASTSDPO_GRADIENT;
    call.grad = grad.rows;
    expect(run(&call) == 0, name, call);
    call.passes = FASTSDPO_FORWARD | FASTSDPO_GRADIENT;
    call.grad = fused_grad.rows;
    expect(run(&call) == 0, name, call);
    call.grad = {};
    expect(grad.memory == fused_grad.memory, name, call);
  };

  both_ways("sampled_token", fastsdpo_sampled_token);
  for (double alpha : {0.0, 1.0, 0.3}) {
    call.alpha = alpha;
    both_ways("divergence", fastsdpo_divergence);
    call.topk_ids = topk_ids.data();
    for (call.add_tail = 0; call.add_tail < 2; call.add_tail++) both_ways("topk", fastsdpo_topk);
    call.topk_ids = nullptr;
  }

  call.passes = FASTSDPO_FORWARD;
  std::vector<int64_t> support(N * K, -1);
  call.support = support.data();
  bool found = fastsdpo_support(&call) == 0;
  for (int64_t i = 0; i < N * K; i++)
    found =
        found && support[i] >= 0 && support[i] < V && (i % K == 0 || support[i - 1] < support[i]);
  expect(found, "support", call);
  expect(fastsdpo_token_log_ratio(&call) == 0, "token_log_ratio", call);
  call.teacher = {};
  call.entropy = entropy.data();
  expect(fastsdpo_token_logps(&call) == 0, "token_logps", call);
  call.passes = FASTSDPO_GRADIENT;
  call.upstream = upstream.data();
  call.grad = student.rows;  // in place
  expect(fastsdpo_token_logps(&call) == 0, "token_logps gradient", call);
}

}  // namespace

int main() {
  char names[64];
  strncpy(names, fastsdpo_isas(), sizeof names - 1);
  for (char* name = strtok(names, ","); name; name = strtok(nullptr, ",")) {
    fastsdpo_set_isa(name);
    for (int64_t V : {1, 2, 63, 64, 127, 128, 129, 1000, 1024, 4097, 33000})
      for (int64_t dtype = 0; dtype < 3; dtype++)
        for (int64_t threads : {1, 3, 9}) {
          check(2, 3, V, dtype, (dtype + V) % 3, threads, 0, false);
          check(1, 2, V, dtype, dtype, threads, V % 2 ? 15 : 0, V > 2);
        }
    for (int64_t dtype = 0; dtype < 3;
         dtype++)  // more columns than those whose exponentials are kept
      check(1, 4, 256 * 1024 + 1061, dtype, dtype, 1, 0, true);
    check(1, 2, 256 * 1024 + 1061, 0, 1, 9, 0, false);
    check(0, 3, 10, 0, 0, 2, 0, false);
    check(3, 0, 10, 0, 0, 2, 0, false);
    printf("%s: done\n", name);
  }
  printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
