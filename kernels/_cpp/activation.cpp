// Activations of pre-activations in memory, and their slopes; kernels/activations.py describes the operation.
//
// An element has the same bits wherever it stands and on any number of threads.
#include "activations.h"

#include "operation.h"

namespace moelab {
namespace {

constexpr int64_t kGrain = 1 << 14;  // values of a thread

// h = act(p) of n values, or with gates of n gates and n values that follow them, each row by itself.
template <typename T>
void activate_as(const Tensor& pre, int64_t activation, const Tensor& h, const Optional& slope) {
  const auto* P = data<T>(pre);
  auto *H = data<T>(h), *S = data<T>(slope);
  if (activation != kSwiglu)
    return parallel(h.numel(), kGrain, [&](int64_t first, int64_t last) {
      each_vector(last - first, [&](int64_t j, auto... n) {
        const Value found = activate(activation, load(P + first + j, n...), Vec{});
        store(H + first + j, found.value, n...);
        if (S) store(S + first + j, found.slope, n...);
      });
    });
  const int64_t F = h.size(h.dim() - 1);
  parallel(h.numel() / std::max<int64_t>(F, 1), 1 + kGrain / (1 + F), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      each_vector(F, [&](int64_t j, auto... n) {
        const int64_t at = r * 2 * F + j;
        const Vec gate = load(P + at, n...);
        const Value found = activate(activation, gate, load(P + at + F, n...));
        store(H + r * F + j, found.value, n...);
        if (!S) return;
        store(S + at, found.slope, n...);
        store(S + at + F, silu(gate).value, n...);
      });
  });
}

void activate_all(const Tensor& pre, int64_t activation, const Tensor& h, const Optional& slope) {
  (is_float(pre) ? activate_as<float> : activate_as<BFloat16>)(pre, activation, h, slope);
}

}  // namespace
}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def("activate(Tensor pre, int activation, Tensor(a!) h, Tensor(b!)? slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("activate", TORCH_BOX(&moelab::activate_all));
}
