// Row tables, dispatch and combine; kernels/permute.py describes the operations.
//
// A task is some tokens or some rows, whose results do not depend on the others, so that they have the same bits with
// any number of threads. Sums over a token's rows are float32, in the order of its choices.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <cstring>

#include "products.h"

namespace moelab {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values that are worth a thread
constexpr int64_t kAhead = 8;  // rows from one that is read to one that memory starts to fetch

std::vector<at::Tensor> row_table(
    const at::Tensor& expert, const at::Tensor& slot, const at::Tensor& kept, std::optional<int64_t> rows) {
  const int64_t N = slot.numel(), E = kept.numel();
  const auto *chosen = expert.data_ptr<int32_t>(), *slots = slot.data_ptr<int32_t>(), *count = kept.data_ptr<int32_t>();
  auto offsets = at::empty({E + 1}, kept.options()), row = at::empty(slot.sizes(), slot.options());
  auto* first = offsets.data_ptr<int32_t>();
  first[0] = 0;
  for (int64_t e = 0; e < E; ++e) first[e + 1] = first[e] + count[e];
  const int64_t R = rows.value_or(first[E]);
  auto entry = at::full({R}, -1, slot.options());
  auto *to_row = row.data_ptr<int32_t>(), *to_entry = entry.data_ptr<int32_t>();
  for (int64_t i = 0; i < N; ++i) {
    if (slots[i] < 0) {
      to_row[i] = -1;
      continue;
    }
    TORCH_CHECK(0 <= chosen[i] && chosen[i] < E, "row_table: no expert ", chosen[i], " of ", E);
    const int64_t r = int64_t(first[chosen[i]]) + slots[i];
    TORCH_CHECK(r < R, "row_table: an entry has row ", r, " of ", R);
    to_row[i] = r;
    to_entry[r] = i;
  }
  return {row, entry, offsets};
}

// Return an entry or a row of a table, -1 for none.
inline int64_t in_table(const char* op, int32_t i, int64_t n) {
  TORCH_CHECK(i < n, op, ": the table names ", i, " of ", n);
  return i;
}

// Have memory fetch a row of `n` values, unless it is negative.
template <typename T>
inline void fetch(const T* rows, int64_t row, int64_t n) {
  if (row < 0) return;
  for (int64_t j = 0; j < n; j += 64 / sizeof(T)) _mm_prefetch(rows + row * n + j, _MM_HINT_T0);
}

// Copy to each of `n` rows of `to` the one that the table names for it, divided by `each`; zeros where it names none.
void copy_rows(const char* op, const at::Tensor& from, const at::Tensor& table, int64_t each, const at::Tensor& to) {
  const int64_t M = from.size(1), bytes = M * from.element_size(), n = table.numel(), most = from.size(0) * each;
  const auto* rows = static_cast<const char*>(from.data_ptr());
  const auto* named = table.data_ptr<int32_t>();
  auto* copies = static_cast<char*>(to.data_ptr());
  at::parallel_for(0, n, 1 + kGrain / (1 + M), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (r + kAhead < last) fetch(rows, named[r + kAhead] / each, bytes);  // of none: row 0
      const int64_t i = in_table(op, named[r], most);
      auto* copy = copies + r * bytes;
      i < 0 ? std::memset(copy, 0, bytes) : std::memcpy(copy, rows + i / each * bytes, bytes);
    }
  });
}

// Copy tokens to rows; empty rows are zero.
void dispatch(const at::Tensor& x, const at::Tensor& entry, int64_t K, const at::Tensor& rows) {
  copy_rows("dispatch", x, entry, K, rows);
}

// Call work(j, ...) for each 16 of n columns from j on; of the last ones, which may be fewer, also with their mask: masked
// stores take several times as long as others.
template <typename Work>
inline void each_vector(int64_t n, const Work& work) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) work(j);
  if (j < n) work(j, inside(j, n));
}

// Write y_s = sum_k weight_sk * rows[row_sk] over the rows that exist; without weights, their sum.
template <typename T>
void sum_rows_as(
    const at::Tensor& rows, const at::Tensor& row, const std::optional<at::Tensor>& weight, const at::Tensor& y) {
  const int64_t S = row.size(0), K = row.size(1), R = rows.size(0), M = rows.size(1);
  const auto* from = rows.data_ptr<T>();
  const auto* rows_SK = row.data_ptr<int32_t>();
  const auto* W = weight.has_value() ? weight->data_ptr<float>() : nullptr;
  auto* Y = y.data_ptr<T>();
  at::parallel_for(0, S, 1 + kGrain / (1 + M * K), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      for (int64_t k = 0; k < K; ++k) {
        in_table("combine", rows_SK[s * K + k], R);
        if (s + kAhead < last) fetch(from, rows_SK[(s + kAhead) * K + k], M);
      }
      each_vector(M, [&](int64_t j, auto... mask) {
        Vec sum(0.f);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t r = rows_SK[s * K + k];
          if (r >= 0) sum = at::vec::fmadd(load(from + r * M + j, mask...), Vec(W ? W[s * K + k] : 1.f), sum);
        }
        store(Y + s * M + j, sum, mask...);
      });
    }
  });
}

// Write the gradients of the rows, weight * dy of the token, and of the weights, <row, dy>; both are zero where an
// entry has no row and a row no entry.
template <typename T>
void combine_backward_as(
    const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& entry,
    const std::optional<at::Tensor>& d_rows, const std::optional<at::Tensor>& d_weight) {
  const int64_t R = rows.size(0), M = rows.size(1), N = weight.numel(), K = weight.size(1);
  const auto *DY = dy.data_ptr<T>(), *from = rows.data_ptr<T>();
  const auto* W = weight.data_ptr<float>();
  const auto* entries = entry.data_ptr<int32_t>();
  auto* DR = d_rows.has_value() ? d_rows->data_ptr<T>() : nullptr;
  auto* DW = d_weight.has_value() ? d_weight->data_ptr<float>() : nullptr;
  if (DW) std::fill_n(DW, N, 0.f);
  at::parallel_for(0, R, 1 + kGrain / (1 + M), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t i = in_table("combine", entries[r], N);
      if (r + kAhead < last) fetch(DY, entries[r + kAhead] / K, M);  // of no entry: token 0
      if (i < 0) {
        if (DR) std::fill_n(DR + r * M, M, T(0));
        continue;
      }
      Vec dot(0.f);
      each_vector(M, [&](int64_t j, auto... mask) {
        const Vec d = load(DY + i / K * M + j, mask...);
        if (DW) dot = at::vec::fmadd(d, load(from + r * M + j, mask...), dot);
        if (DR) store(DR + r * M + j, d * Vec(W[i]), mask...);
      });
      if (DW) DW[i] = _mm512_reduce_add_ps(dot);
    }
  });
}

void sum_rows(
    const at::Tensor& rows, const at::Tensor& row, const std::optional<at::Tensor>& weight, const at::Tensor& y) {
  if (!weight.has_value() && row.size(1) == 1) return copy_rows("dispatch", rows, row, 1, y);
  (rows.scalar_type() == at::kFloat ? sum_rows_as<float> : sum_rows_as<BFloat16>)(rows, row, weight, y);
}

void combine_backward(
    const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& entry,
    const std::optional<at::Tensor>& d_rows, const std::optional<at::Tensor>& d_weight) {
  const auto call = rows.scalar_type() == at::kFloat ? combine_backward_as<float> : combine_backward_as<BFloat16>;
  call(dy, rows, weight, entry, d_rows, d_weight);
}

}  // namespace
}  // namespace moelab

TORCH_LIBRARY_FRAGMENT(moelab, library) {
  library.def("row_table(Tensor expert, Tensor slot, Tensor kept, int? rows) -> Tensor[]");
  library.def("dispatch(Tensor x, Tensor entry, int top_k, Tensor(a!) rows) -> ()");
  library.def("sum_rows(Tensor rows, Tensor row, Tensor? weight, Tensor(a!) y) -> ()");
  library.def(
      "combine_backward(Tensor dy, Tensor rows, Tensor weight, Tensor entry, Tensor(a!)? d_rows, Tensor(b!)? d_weight) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(moelab, CPU, library) {
  library.impl("row_table", moelab::row_table);
  library.impl("dispatch", moelab::dispatch);
  library.impl("sum_rows", moelab::sum_rows);
  library.impl("combine_backward", moelab::combine_backward);
}
