// The kernels' elementary functions and conversions on whole arrays, for tests of their accuracy.
#include "rows.h"

namespace {

template <class F>
void map(const float* x, float* y, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += W) {
    float in[W] = {}, out[W] = {};
    const size_t bytes = (n - i < W ? n - i : W) * sizeof(float);
    memcpy(in, x + i, bytes);
    memcpy(out, y + i, bytes);
    store(out, f(load(in), load(out)));
    memcpy(y + i, out, bytes);
  }
}

}  // namespace

int FASTSDPO_NAME(math)(int function, const float* x, float* y, int64_t n) {
  if (function == 0) map(x, y, n, [](vf v, vf) { return exp2v(Lanes<1>{v}).v[0]; });
  if (function == 1)
    map(x, y, n, [](vf v, vf) { return log2_ratio(Lanes<1>{v}, Lanes<1>{all(1.f)}).v[0]; });
  if (function == 2) map(x, y, n, [](vf v, vf) { return tanhv(Lanes<1>{v}).v[0]; });
  if (function == 3)
    map(x, y, n, [](vf v, vf w) { return log2_ratio(Lanes<1>{v}, Lanes<1>{w}).v[0]; });
  return 0;
}

int FASTSDPO_NAME(convert)(const fastsdpo_rows& x, const fastsdpo_rows& y, int64_t n) {
  const Rows from(x, 1), to(y, 1);
  for_blocks(Span{0, n}, [&](int64_t column, int count) {
    alignas(64) float block[BLOCK];
    const float* values = read_block(from, 0, 0, column, count, block);
    if (to.direct(count)) memcpy(to.at(0, column), values, count * sizeof(float));
    write_block(to, 0, column, count, values);
  });
  return 0;
}
