// One vector type for every instruction set, with exp2, log2 of a ratio and tanh.
//
// GCC/Clang vector extensions: the width follows the compiler's target, so one source is the SSE,
// AVX2, AVX-512, NEON and scalar version. Intrinsics are used only where the extensions cannot
// express an instruction well. Everything is in an unnamed namespace: the files are compiled once
// per instruction set into one library, and the linker would keep one instruction set's copy of a
// shared function. For the same reason nothing here instantiates a template of the standard
// library.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr float INF = __builtin_inff();
constexpr float LN2 = 0.6931471805599453f;
constexpr double LOG2E = 1.4426950408889634;

INLINE vf all(float x) { return x - vf{}; }
INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// a > b ? a : b, which is b where either is NaN (the order of x86's maxps).
INLINE vf max_or_b(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// U vectors that go through a computation side by side. The operations on one vector depend on each
// other, so a single vector would leave the CPU waiting.
template <int U>
struct Lanes {
  vf v[U];
  static constexpr int SIZE = U * W;
};

#define FASTSDPO_EACH for (int j = 0; j < U; j++)
#define FASTSDPO_OPERATOR(op)                                  \
  template <int U>                                             \
  INLINE Lanes<U> operator op(Lanes<U> a, const Lanes<U>& b) { \
    FASTSDPO_EACH a.v[j] = a.v[j] op b.v[j];                   \
    return a;                                                  \
  }                                                            \
  template <int U>                                             \
  INLINE Lanes<U> operator op(Lanes<U> a, vf b) {              \
    FASTSDPO_EACH a.v[j] = a.v[j] op b;                        \
    return a;                                                  \
  }                                                            \
  template <int U>                                             \
  INLINE Lanes<U> operator op(Lanes<U> a, float b) {           \
    FASTSDPO_EACH a.v[j] = a.v[j] op b;                        \
    return a;                                                  \
  }
FASTSDPO_OPERATOR(+)
FASTSDPO_OPERATOR(-)
FASTSDPO_OPERATOR(*)
#undef FASTSDPO_OPERATOR

template <int U>
INLINE Lanes<U> max_or_b(float a, Lanes<U> b) {
  FASTSDPO_EACH b.v[j] = max_or_b(all(a), b.v[j]);
  return b;
}

// value where mask (a float) is not 0, else 0: 0 * log 0 = 0, and a NaN mask keeps the value.
template <int U>
INLINE Lanes<U> where_nonzero(const Lanes<U>& mask, Lanes<U> value) {
  FASTSDPO_EACH value.v[j] = mask.v[j] == 0.f ? vf{} : value.v[j];
  return value;
}

// The sum of the U vectors as one vector. A loop that accumulates it needs one register, not U.
template <int U>
INLINE vf sum_of(Lanes<U> a) {
  for (int half = U / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) a.v[j] += a.v[j + half];
  return a.v[0];
}
INLINE float horizontal_sum(vf v) {
  float sum = 0;
  for (int i = 0; i < W; i++) sum += v[i];
  return sum;
}
INLINE float horizontal_max(vf v) {
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// 2^t for t < 127.5: relative error at most 1.7e-7, exactly 1 at 0, 0 below 2^-126.5, NaN kept.
// t = n + f with |f| <= 1/2; adding 1.5 * 2^23 + 127 leaves the biased exponent n + 127 in the low
// bits. Minimax polynomial of degree 5 with constant term 1 (error 9.1e-8 before rounding).
template <int U>
INLINE Lanes<U> exp2v(Lanes<U> t) {
  const float magic = 12582912.f + 127.f;
  t = max_or_b(-127.f, t);
  Lanes<U> shifted = t + magic;
  Lanes<U> f = t - (shifted - magic);
  Lanes<U> p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.f;
  FASTSDPO_EACH shifted.v[j] = (vf)((vi)shifted.v[j] << 23);  // 2^n, and 0 for n = -127
  return p * shifted;
}

// log2(a / b) for a, b > 0, b >= 2^-125: error at most 1.9e-7 of max(|log2(a / b)|, |a / b - 1|)
// for a / b in [1/sqrt(2), sqrt(2)], so it is relative near a = b, and 2.8e-7 elsewhere. The
// difference of the bit patterns is nearly log2(a / b); with its integer part e taken off, a * 2^-e
// / b lies in [0.63, 1.42] and z = (a - b) / (a + b) in [-0.227, 0.173]. The logarithm of the
// quotient is an odd function of z, which takes 4 coefficients (error 7.9e-9 before rounding); of
// the first, 2.885, the 2 is added separately, because doubling is exact.
template <int U>
INLINE Lanes<U> log2_ratio(Lanes<U> a, const Lanes<U>& b) {
  Lanes<U> exponent;
  FASTSDPO_EACH {
    vi e = ((vi)a.v[j] - (vi)b.v[j] + 0x4afb0d) >> 23;  // up from sqrt(2) for b = 1
    exponent.v[j] = __builtin_convertvector(e, vf);
    a.v[j] = (vf)((vi)a.v[j] - (e << 23));
  }
  Lanes<U> z;
  FASTSDPO_EACH z.v[j] = (a.v[j] - b.v[j]) / (a.v[j] + b.v[j]);
  Lanes<U> w = z * z;
  Lanes<U> p = w * 0.4458230137825012f + 0.5760546326637268f;
  p = p * w + 0.9618054628372192f;
  p = p * w + 0.8853901028633118f;
  return exponent + ((z + z) + p * z);
}

// tanh(x): relative error at most 4e-7 (2.5e-7 for |x| < 1), always within [-1, 1], NaN kept. x
// P(x^2) / Q(x^2), both of degree 4 with constant term 1 and positive coefficients, by least
// squares reweighted towards the largest error on [-9.02, 9.02] (2.2e-8 before rounding); beyond,
// tanh rounds to -1 or 1.
template <int U>
INLINE Lanes<U> tanhv(const Lanes<U>& x) {
  Lanes<U> a;  // -|x|: max_or_b keeps a NaN that is its second argument
  FASTSDPO_EACH a.v[j] = (vf)((vi)x.v[j] | INT32_MIN);
  a = max_or_b(-9.02f, a);
  Lanes<U> s = a * a;
  Lanes<U> p = s * 1.3384031054e-08f + 2.0635621764e-05f;
  p = p * s + 0.0034974449870f;
  p = p * s + 0.13382676456f;
  p = p * s + 1.f;
  Lanes<U> q = s * 7.7901388481e-07f + 0.00032884969257f;
  q = q * s + 0.025884312237f;
  q = q * s + 0.46715997704f;
  q = q * s + 1.f;
  FASTSDPO_EACH {
    vf negative = max_or_b(all(-1.f), a.v[j] * p.v[j] / q.v[j]);
    a.v[j] = (vf)(((vi)negative & INT32_MAX) | ((vi)x.v[j] & INT32_MIN));
  }
  return a;
}

// ---- bfloat16 and float16. Stores round to nearest, ties to even; NaN stays NaN.

INLINE vu widen(const void* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
}

INLINE vf load(const bf16* p) { return (vf)(widen(p) << 16); }

INLINE vu round_bf16(vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v != v ? (u >> 16) | 0x40u : rounded;  // the carry could turn a NaN into a number
}

INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // Shifted into a float's exponent and mantissa, the value is too small by a factor of 2^112. This
  // also holds for subnormal numbers.
  vu h = widen(p);
  vu magnitude = (h & 0x7fffu) << 13;
  vf v = (vf)magnitude * 5.192296858534828e33f;  // 2^112
  vu special = magnitude | 0x7f800000u;          // infinity and NaN
  vu bits = magnitude >= (0x7c00u << 13) ? special : (vu)v;
  return (vf)(bits | ((h & 0x8000u) << 16));
#endif
}

#if !defined(__AVX2__)
INLINE vu round_f16(vf v) {
  vu sign = (vu)v & 0x80000000u;
  vu a = (vu)v ^ sign;
  vu normal = (a + (0xfffu + ((a >> 13) & 1u) - (112u << 23))) >> 13;
  vu subnormal = (vu)((vf)a + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  vu special = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x3ffu)) : vu{} + 0x7c00u;
  vu h = a < (113u << 23) ? subnormal : normal;
  h = a >= (143u << 23) ? special : h;
  return h | (sign >> 16);
}
#endif

INLINE void narrow(void* p, vu u) {
  vh h = __builtin_convertvector(u, vh);
  memcpy(p, &h, sizeof h);
}

// Two vectors at a time: AVX2 packs 32-bit lanes into 16-bit ones in one instruction for two
// registers.
INLINE void store2(bf16* p, vf a, vf b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i packed = _mm256_packus_epi32((__m256i)round_bf16(a), (__m256i)round_bf16(b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  narrow(p, round_bf16(a));
  narrow(p + W, round_bf16(b));
#endif
}

INLINE void store2(f16* p, vf a, vf b) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256((__m256i*)(p + W), _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + W), _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT));
#else
  narrow(p, round_f16(a));
  narrow(p + W, round_f16(b));
#endif
}

INLINE void store2(float* p, vf a, vf b) {
  store(p, a);
  store(p + W, b);
}

// Loads and stores of groups of vectors. A loop that treats all values alike does not depend on
// their order in the lanes, so bfloat16 is loaded in pairs: a 32-bit lane holds two neighbours, and
// a shift and a mask make two floats of it. The store joins them again.
template <int U, class T>
INLINE Lanes<U> load_lanes(const T* p) {
  Lanes<U> a;
  FASTSDPO_EACH a.v[j] = load(p + j * W);
  return a;
}
template <int U>
INLINE Lanes<U> load_lanes(const bf16* p) {
  static_assert(U % 2 == 0, "bfloat16 goes in pairs");
  Lanes<U> a;
  for (int j = 0; j < U; j += 2) {
    vu pair;
    memcpy(&pair, p + j * W, sizeof pair);
    a.v[j] = (vf)(pair << 16);
    a.v[j + 1] = (vf)(pair & 0xffff0000u);
  }
  return a;
}
template <int U>
INLINE void store_lanes(float* p, const Lanes<U>& a) {
  FASTSDPO_EACH store(p + j * W, a.v[j]);
}
template <int U>
INLINE void store_lanes(bf16* p, const Lanes<U>& a) {
  static_assert(U % 2 == 0, "bfloat16 goes in pairs");
  for (int j = 0; j < U; j += 2) {
    vu pair = round_bf16(a.v[j]) | (round_bf16(a.v[j + 1]) << 16);
    memcpy(p + j * W, &pair, sizeof pair);
  }
}

}  // namespace
