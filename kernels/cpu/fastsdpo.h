// The C interface of libfastsdpo: raw pointers and sizes, nothing of Python or PyTorch.
//
// Every operation takes one `fastsdpo_call`; the fields an operation does not use stay zero. Row r
// of N = B * L rows of logits starts stride_b * (r / L) + stride_l * (r % L) elements after `data`,
// and its V elements are adjacent. Vectors "[N]" are contiguous. `per_token`, `coef`, ... are
// written by the forward pass and read by the backward pass. Formulas: fastsdpo/ops/token_logps.py
// and fastsdpo/ops/divergence.py.
#pragma once
#include <stdint.h>

#ifdef _WIN32
#define FASTSDPO_EXPORT __declspec(dllexport)
#else
#define FASTSDPO_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised with every change of this file; fastsdpo/_native.py refuses another number.
#define FASTSDPO_ABI 3

enum { FASTSDPO_FLOAT32 = 0, FASTSDPO_BFLOAT16 = 1, FASTSDPO_FLOAT16 = 2 };
enum { FASTSDPO_FORWARD = 1, FASTSDPO_GRADIENT = 2 };  // both: the fused form, grad_loss = 1

typedef struct {
  void* data;  // null: the tensor is absent
  int64_t stride_b, stride_l;
  int64_t dtype;
} fastsdpo_rows;

typedef struct {
  fastsdpo_rows student, teacher, grad;
  int64_t B, L, V, K;
  int64_t ignore_index;
  int64_t passes;   // FASTSDPO_FORWARD | FASTSDPO_GRADIENT
  int64_t threads;  // at most this many; results do not depend on it
  int64_t add_tail;
  double temperature, softcap, alpha, is_clip;
  const int64_t* target_ids;         // [N]
  const int64_t* topk_ids;           // [N, K]
  const float* weights;              // [N]
  const float* old_logps;            // [N] or null
  const float* given_teacher_logps;  // [N] instead of teacher logits
  const float* given_topk_logps;     // [N, K] instead of teacher logits
  const float* upstream;             // [N]: gradient of token_logps' logps
  const float* grad_loss;            // [1]; null is 1
  float* student_logps;              // [N]
  float* teacher_logps;              // [N]
  float* entropy;                    // [N] or null
  float* per_token;                  // [N]
  float* coef;                       // [N]
  float* class_grads;                // [N, K]; divergence: [N, 2] or null, as its `State` says
  int64_t* support;                  // [N, K]
  float* stats[5];                   // statistic i of row r is stats[i][r * stats_stride]
  int64_t stats_stride;
} fastsdpo_call;

// Return 0, or -1: a target id lies outside [0, V); -2: a top-k id lies outside [0, V); -3: out of
// memory; -4: no such instruction set.
FASTSDPO_EXPORT int fastsdpo_token_logps(const fastsdpo_call* call);  // student, upstream -> grad
FASTSDPO_EXPORT int fastsdpo_token_log_ratio(const fastsdpo_call* call);
FASTSDPO_EXPORT int fastsdpo_sampled_token(const fastsdpo_call* call);
FASTSDPO_EXPORT int fastsdpo_divergence(const fastsdpo_call* call);
FASTSDPO_EXPORT int fastsdpo_topk(const fastsdpo_call* call);
// Writes the ids of the K <= V largest logits of each student row to `support`, in ascending order.
// A row whose target is ignored gets 0 to K - 1.
FASTSDPO_EXPORT int fastsdpo_support(const fastsdpo_call* call);

// y[i] = f(x[i]) with the kernels' own functions, for tests of their accuracy: 0 exp2, 1 log2, 2
// tanh, 3 log2(x[i] / y[i]) with the y[i] passed in.
FASTSDPO_EXPORT int fastsdpo_math(int function, const float* x, float* y, int64_t n);
// y[i] = x[i] through the kernels' conversions between dtypes.
FASTSDPO_EXPORT int fastsdpo_convert(const void* x, int64_t x_dtype, void* y, int64_t y_dtype,
                                     int64_t n);

FASTSDPO_EXPORT int fastsdpo_abi(void);
FASTSDPO_EXPORT int fastsdpo_parallel(void);  // 0: built without OpenMP, every call has one thread
FASTSDPO_EXPORT const char* fastsdpo_isa(void);  // the instruction set in use, or ""
FASTSDPO_EXPORT const char* fastsdpo_isas(
    void);  // those this CPU runs, best first, comma-separated
FASTSDPO_EXPORT int fastsdpo_set_isa(const char* name);  // not while another thread is computing

#ifdef __cplusplus
}
#endif
