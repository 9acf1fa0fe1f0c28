// The ids of the K largest logits of each row: the support of a top-k divergence.
//
// float32, bfloat16 or float16 in. One pass over a row keeps the logits that are larger than the
// K-th largest so far; of equal ones the first are kept. NaN counts as the largest value, as in
// torch.topk. A softcap does not change the order, so there is no such argument.
#include "rows.h"

namespace {

// Maps floats to integers of the same order; -0 and 0 are equal, NaN of either sign is the largest.
INLINE int32_t key_of(float x) {
  int32_t bits;
  x += 0.f;
  memcpy(&bits, &x, sizeof bits);
  return x != x ? INT32_MAX : bits < 0 ? bits ^ INT32_MAX : bits;
}
INLINE float float_of(int32_t key) {
  if (key == INT32_MAX) return INF;  // of NaN: nothing is above it
  int32_t bits = key < 0 ? key ^ INT32_MAX : key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Sets a bit for each lane that is larger than the limit, or where one of the two is NaN.
INLINE uint32_t above(vf x, vf limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)limit, _CMP_NLE_UQ));
#else
  const vi below = x <= limit;
  uint64_t halves[2];
  memcpy(halves, &below, sizeof halves);
  if ((halves[0] & halves[1]) == ~(uint64_t)0) return 0;
  uint32_t bits = 0;
  for (int j = 0; j < W; j++) bits |= (uint32_t)(below[j] == 0) << j;
  return bits;
#endif
}

struct Candidates {
  int64_t K, capacity, count;
  float limit;    // NaN until there are K: everything is above it
  int32_t* keys;  // in the order of ids
  int64_t* ids;

  // Room for a few times K candidates, so that `choose` seldom runs.
  static int64_t capacity_for(int64_t K) { return (4 * K < 512 ? 512 : 4 * K + STEP - 1) & -STEP; }
  static size_t bytes(int64_t K) { return capacity_for(K) * (sizeof(int32_t) + sizeof(int64_t)); }

  Candidates(int64_t K, char* memory)
      : K(K),
        capacity(capacity_for(K)),
        count(0),
        limit(__builtin_nanf("")),
        keys((int32_t*)(memory + capacity * sizeof(int64_t))),
        ids((int64_t*)memory) {}

  int64_t at_least(int32_t key) const {
    vi sum = {};
    for (int64_t i = 0; i < (count + W - 1) / W * W; i += W) {
      vi v;
      memcpy(&v, keys + i, sizeof v);
      sum -= v >= key;
    }
    int64_t total = 0;
    for (int j = 0; j < W; j++) total += sum[j];
    return total;
  }

  // Keeps the K largest. Finds the K-th largest key by halving the range of integers.
  __attribute__((noinline)) void choose() {
    if (count <= K) return;
    for (int64_t i = count; i < (count + W - 1) / W * W; i++) keys[i] = INT32_MIN;
    int64_t low = INT32_MIN, high = INT32_MAX;  // the key lies in [low, high]
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (at_least((int32_t)middle) >= K)
        low = middle;
      else
        high = middle - 1;
    }
    const int32_t last = (int32_t)low;
    int64_t equal = K - (last == INT32_MAX ? 0 : at_least(last + 1)), kept = 0;
    for (int64_t i = 0; i < count; i++)
      if (keys[i] > last || (keys[i] == last && equal-- > 0)) {
        keys[kept] = keys[i];
        ids[kept++] = ids[i];
      }
    count = kept;
    limit = float_of(last);
  }

  void scan(const float* c, int64_t column, int n) {
    for (int i = 0; i < padded(n); i += 4 * W) {
      prefetch_next(c + i);
      Lanes<4> x = load_lanes<4>(c + i);
      const vf bound = all(limit);
      uint64_t bits = 0;
      for (int j = 0; j < 4; j++) bits |= (uint64_t)above(x.v[j], bound) << (j * W);
      if (!bits) continue;
      if (count + 4 * W > capacity) choose();
      for (; bits; bits &= bits - 1) {
        const int at = i + __builtin_ctzll(bits);
        if (at >= n) break;  // padding
        keys[count] = key_of(c[at]);
        ids[count++] = column + at;
      }
    }
  }
};

}  // namespace

int FASTSDPO_NAME(support)(const fastsdpo_call& call) {
  const int64_t N = call.B * call.L, K = call.K;
  const Rows logits(call.student, call.L);
  [[maybe_unused]] const int threads =
      call.threads < 1 ? 1 : (int)(call.threads < 1024 ? call.threads : 1024);
  int status = 0;
#pragma omp parallel num_threads(threads < N ? threads : (int)N)
  {
    char* memory = (char*)malloc(Candidates::bytes(K));
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < N; row++) {
      int64_t* out = call.support + row * K;
      if (!memory) {
#pragma omp atomic write
        status = -3;
        continue;
      }
      if (call.target_ids[row] == call.ignore_index) {
        for (int64_t j = 0; j < K; j++) out[j] = j;
        continue;
      }
      Candidates candidates(K, memory);
      alignas(64) float block[BLOCK];
      for_blocks({0, call.V}, [&](int64_t column, int n) {
        candidates.scan(read_block(logits, 0, row, column, n, block), column, n);
      });
      candidates.choose();
      memcpy(out, candidates.ids, K * sizeof(int64_t));
    }
    free(memory);
  }
  return status;
}
