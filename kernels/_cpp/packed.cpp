// Matrices that are packed once, and their products; kernels/packed.py describes the operations.
//
// An element is the sum of its products in the order of k, by the same instructions whatever the number of rows, so that
// a row has the same bits in any batch and on any number of threads.
#include "packed.h"

#include "decode.h"

namespace moelab {
namespace {

template <typename T>
void pack_as(const Tensor& weight, const Tensor& packed) {
  const int64_t N = weight.size(1), K = weight.size(2), panels = packed.size(1), deep = kWord<T>;
  const T* from = data<T>(weight);
  T* to = data<T>(packed);
  parallel(weight.size(0) * panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      for (int64_t j = 0; j < kPackedPanel; ++j) {
        const int64_t column = p % panels * kPackedPanel + j;
        const T* row = column < N ? from + (p / panels * N + column) * K : nullptr;
        T* place = to + p * K * kPackedPanel + j * deep;
        for (int64_t k = 0; k < K; ++k) place[k / deep * deep * kPackedPanel + k % deep] = row ? row[k] : T{};
      }
  });
}

Tensor pack(const Tensor& weight) {
  const int64_t N = weight.size(1), K = weight.size(2);
  auto packed = empty(weight, {weight.size(0), panels_of(N), K, kPackedPanel});
  (is_float(weight) ? pack_as<float> : pack_as<BFloat16>)(weight, packed);
  return packed;
}

struct Part {
  int64_t row, rows, first, last;  // panels first to last
};

template <typename T>
void linear_as(
    const Tensor& x, const Tensor& packed, const Optional& bias, int64_t activation, const Optional& add,
    const Tensor& y) {
  const int64_t K = packed.size(2), R = x.numel() / K, N = y.size(-1);
  const Packed<T> w(data<T>(packed), packed.size(0), K, N);
  const auto *X = data<T>(x), *B = data<T>(bias), *A = data<T>(add);
  auto* Y = data<T>(y);
  std::vector<Part> parts;
  const int64_t step = panels_of_task(w.panels);
  for (int64_t p = 0; p < w.panels; p += step)
    for (int64_t r = 0; r < R; r += kPackedRows)
      parts.push_back({r, std::min(kPackedRows, R - r), p, std::min(p + step, w.panels)});
  share(parts, [&](const Part& part, const Part* next) {
    const T* after = next ? w.panel(0, next->first) : nullptr;
    layer(X + part.row * K, part.rows, w, part.first, part.last, after, B, activation,
          [&](int64_t i, int64_t column, Vec v, auto... n) {
            const int64_t at = (part.row + i) * N + column;
            if (A) v = v + load(A + at, n...);
            store(Y + at, v, n...);
          });
  });
}

}  // namespace

Tensor linear(
    const Tensor& x, const Tensor& packed, const Optional& bias, int64_t N, int64_t activation, const Optional& add) {
  const int64_t K = packed.size(2), gates = packed.size(0), dims = x.dim();
  check(dims > 0 && K > 0 && panels_of(N) == packed.size(1), "linear: N = ", N, " in ", packed.size(1), " panels");
  check(
      same_dtype(x, packed, bias, add) && contiguous(x, packed, bias, add),
      "linear: tensors must be contiguous, all float32 or all bfloat16");
  check(x.size(dims - 1) == K, "linear: x [..., ", x.size(dims - 1), "] for a matrix [N, ", K, "]");
  check(gates == (activation == kSwiglu ? 2 : 1), "linear: ", gates, " matrices for activation ", activation);
  check(!bias.has_value() || bias->numel() == gates * N, "linear: bias has another size than [", gates * N, "]");
  auto y = empty_rows(x, N);
  check(!add.has_value() || add->numel() == y.numel(), "linear: add has another shape");
  (is_float(x) ? linear_as<float> : linear_as<BFloat16>)(x, packed, bias, activation, add, y);
  return y;
}

}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def("pack(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("pack", TORCH_BOX(&moelab::pack));
}
