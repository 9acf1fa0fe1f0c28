// The exported functions: checks of the ids, and the choice of the instruction set at run time.
#include <string.h>

#include "fastsdpo.h"

// Every operation is compiled once per instruction set; the function's name ends in the set's name
// (CMakeLists.txt).
#define DECLARE(isa)                                  \
  int token_logps_##isa(const fastsdpo_call&);        \
  int token_log_ratio_##isa(const fastsdpo_call&);    \
  int sampled_token_##isa(const fastsdpo_call&);      \
  int divergence_##isa(const fastsdpo_call&);         \
  int topk_##isa(const fastsdpo_call&);               \
  int support_##isa(const fastsdpo_call&);            \
  int math_##isa(int, const float*, float*, int64_t); \
  int convert_##isa(const fastsdpo_rows&, const fastsdpo_rows&, int64_t);
#define TABLE(isa, name, supported) \
  {name,                            \
   supported,                       \
   token_logps_##isa,               \
   token_log_ratio_##isa,           \
   sampled_token_##isa,             \
   divergence_##isa,                \
   topk_##isa,                      \
   support_##isa,                   \
   math_##isa,                      \
   convert_##isa}

#ifdef FASTSDPO_X86
DECLARE(v4)
DECLARE(v3)
DECLARE(v2)
#else
DECLARE(native)
#endif

namespace {

typedef int (*operation)(const fastsdpo_call&);

struct Table {
  const char* name;
  bool (*supported)();
  operation token_logps, token_log_ratio, sampled_token, divergence, topk, support;
  int (*math)(int, const float*, float*, int64_t);
  int (*convert)(const fastsdpo_rows&, const fastsdpo_rows&, int64_t);
};

#ifdef FASTSDPO_X86
// The levels of the x86-64 psABI, told apart by the features that the kernels use. The
// compiler's runtime also checks that the operating system saves the registers. Every CPU with AVX2
// and FMA has F16C.
bool has_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
bool has_v3() {
  return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
const Table tables[] = {TABLE(v4, "x86-64-v4", has_v4), TABLE(v3, "x86-64-v3", has_v3),
                        TABLE(v2, "x86-64-v2", has_v2)};
#else
bool always() { return true; }
const Table tables[] = {TABLE(native, FASTSDPO_ISA_NAME, always)};
#endif

const Table* choose(const char* name) {
  for (const Table& table : tables)
    if ((!name || !strcmp(name, table.name)) && table.supported()) return &table;
  return nullptr;
}

const Table*& current() {
  static const Table* table = choose(nullptr);
  return table;
}

bool outside(const int64_t* ids, int64_t count, int64_t V, const int64_t* ignore_index) {
  for (int64_t i = 0; i < count; i++)
    if ((ids[i] < 0 || ids[i] >= V) && !(ignore_index && ids[i] == *ignore_index)) return true;
  return false;
}

int run(operation Table::* member, const fastsdpo_call* call) {
  if (!current()) return -4;
  const int64_t N = call->B * call->L;
  if (N == 0) return 0;
  if (outside(call->target_ids, N, call->V, &call->ignore_index)) return -1;
  if (call->topk_ids && outside(call->topk_ids, N * call->K, call->V, nullptr)) return -2;
  return (current()->*member)(*call);
}

}  // namespace

int fastsdpo_token_logps(const fastsdpo_call* call) { return run(&Table::token_logps, call); }
int fastsdpo_token_log_ratio(const fastsdpo_call* call) {
  return run(&Table::token_log_ratio, call);
}
int fastsdpo_sampled_token(const fastsdpo_call* call) { return run(&Table::sampled_token, call); }
int fastsdpo_divergence(const fastsdpo_call* call) { return run(&Table::divergence, call); }
int fastsdpo_topk(const fastsdpo_call* call) { return run(&Table::topk, call); }
int fastsdpo_support(const fastsdpo_call* call) { return run(&Table::support, call); }

int fastsdpo_math(int function, const float* x, float* y, int64_t n) {
  return current() ? current()->math(function, x, y, n) : -4;
}

int fastsdpo_convert(const void* x, int64_t x_dtype, void* y, int64_t y_dtype, int64_t n) {
  if (!current()) return -4;
  const fastsdpo_rows from = {(void*)x, 0, 0, x_dtype}, to = {y, 0, 0, y_dtype};
  return current()->convert(from, to, n);
}

int fastsdpo_abi(void) { return FASTSDPO_ABI; }

int fastsdpo_parallel(void) {
#ifdef FASTSDPO_OPENMP
  return 1;
#else
  return 0;
#endif
}

const char* fastsdpo_isa(void) { return current() ? current()->name : ""; }

const char* fastsdpo_isas(void) {
  static char names[64];
  if (!names[0])
    for (const Table& table : tables)
      if (table.supported()) {
        if (names[0]) strcat(names, ",");
        strcat(names, table.name);
      }
  return names;
}

int fastsdpo_set_isa(const char* name) {
  const Table* table = choose(name);
  if (!table) return -4;
  current() = table;
  return 0;
}
