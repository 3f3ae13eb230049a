// Products of few rows with matrices that were packed once.
//
// A matrix W [N, K] is packed in panels of its rows, [K][kPackedPanel] or for bfloat16 [K / 2][kPackedPanel][2], with zeros after the
// last row. Rows of x are multiplied at the rate at which a panel arrives from memory: while one panel is multiplied, the
// next one is fetched, which the libraries' products leave to the processor. A task is some rows and some panels.
#pragma once

#include "activations.h"
#include "operation.h"
#include "products.h"

namespace moelab {

constexpr int64_t kPackedPanel = 32;  // columns of a panel: half as many as elsewhere, so that twice the rows read it at once
constexpr int64_t kPackedRows = 64;  // rows of a task

inline int64_t panels_of(int64_t N) { return (N + kPackedPanel - 1) / kPackedPanel; }

// Return how many panels a task has, where there are `panels` in all: several tasks for each thread.
inline int64_t panels_of_task(int64_t panels) {
  return std::clamp<int64_t>(panels / (4 * threads()), 1, 16);
}

// Matrices [K, N] side by side ("gates"), in panels.
template <typename T>
struct Packed {
  const T* data;
  int64_t gates, K, N, panels;
  Packed(const T* data, int64_t gates, int64_t K, int64_t N)
      : data(data), gates(gates), K(K), N(N), panels(panels_of(N)) {}
  // The matrices of another expert.
  Packed of(int64_t expert) const { return {data + expert * gates * panels * K * kPackedPanel, gates, K, N}; }
  const T* panel(int64_t gate, int64_t p) const { return data + (gate * panels + p) * K * kPackedPanel; }
  // C [m, kPackedPanel] = x [m, K] @ a panel, while memory reads `next`, a panel or null.
  void multiply(const T* x, int64_t m, const T* b, float* c, const T* next) const {
    constexpr int64_t side = std::min(kSide, kPackedPanel / kLanes), most = kRowsOfBlock<T, side>;
    const auto* first = reinterpret_cast<const char*>(next);
    const int64_t passes = (m + most - 1) / most * (kPackedPanel / (side * kLanes));
    Ahead ahead{first, next ? first + K * kPackedPanel * sizeof(T) : nullptr, int64_t(kPackedPanel * sizeof(float)) / passes};
    const Panels right{reinterpret_cast<const uint32_t*>(b), 0, kPackedPanel};
    product<T>(m, kPackedPanel, K / kWord<T>, rows(x, K), right, nullptr, c, target(c, kPackedPanel), ahead);
  }
};

// act(x @ W + bias) of some rows and panels; `write(row, column, vector)`, at the end of a row with the number of columns.
// `after` is a panel that the thread needs next, or null.
template <typename T, typename Write>
void layer(
    const T* x, int64_t m, const Packed<T>& w, int64_t first, int64_t last, const T* after, const T* bias,
    int64_t activation, const Write& write) {
  alignas(64) float c[kPackedRows * kPackedPanel], up[kPackedRows * kPackedPanel];
  for (int64_t p = first; p < last; ++p) {
    const T* next = p + 1 < last ? w.panel(0, p + 1) : after;
    w.multiply(x, m, w.panel(0, p), c, w.gates > 1 ? w.panel(1, p) : next);
    if (w.gates > 1) w.multiply(x, m, w.panel(1, p), up, next);
    for (int64_t i = 0; i < m; ++i)
      each_vector(std::min(kPackedPanel, w.N - p * kPackedPanel), [&](int64_t j, auto... n) {
        const int64_t column = p * kPackedPanel + j;
        Vec v = load(c + i * kPackedPanel + j), u{};
        if (bias) v = v + load(bias + column, n...);
        if (w.gates > 1) u = load(up + i * kPackedPanel + j);
        if (w.gates > 1 && bias) u = u + load(bias + w.N + column, n...);
        write(i, column, activate(activation, v, u).value, n...);
      });
  }
}

}  // namespace moelab
