// Row tables, dispatch and combine; kernels/permute.py describes the operations.
//
// A task is some tokens or some rows, whose results do not depend on the others, so that they have the same bits with
// any number of threads. Sums over a token's rows are float32, in the order of its choices.
#include "permute.h"

namespace moelab {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values that are worth a thread
constexpr int64_t kAhead = 8;  // rows from one that is read to one that memory starts to fetch

// Refuse a table that names an entry or a row past the last one; negative ones stand for none.
void check_table(const char* op, const Tensor& table, int64_t n) {
  check(is_int(table) && table.is_contiguous(), op, ": the table must be contiguous int32");
  const auto* named = data<int32_t>(table);
  const int64_t size = table.numel(), most = size ? *std::max_element(named, named + size) : -1;
  check(most < n, op, ": the table names ", most, " of ", n);
}

// Have memory fetch a row of `n` values, unless it is negative.
template <typename T>
inline void fetch(const T* rows, int64_t row, int64_t n) {
  if (row < 0) return;
  for (int64_t j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(rows + row * n + j);
}

// Copy to each row of `to` the one that the table names for it, divided by `each`; zeros where it names none.
void copy_rows(const char* op, const Tensor& from, const Tensor& table, int64_t each, const Tensor& to) {
  const int64_t M = from.size(1), bytes = M * from.element_size(), n = table.numel();
  check_table(op, table, from.size(0) * each);
  const auto* rows = data<const char>(from);
  const auto* named = data<int32_t>(table);
  auto* copies = data<char>(to);
  parallel(n, 1 + kGrain / (1 + M), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (r + kAhead < last) fetch(rows, named[r + kAhead] / each, bytes);  // of none: row 0
      const int64_t i = named[r];
      auto* copy = copies + r * bytes;
      i < 0 ? std::memset(copy, 0, bytes) : std::memcpy(copy, rows + i / each * bytes, bytes);
    }
  });
}

template <typename T>
void sum_rows_as(
    const Tensor& rows, const Tensor& row, const Optional& weight, const Optional& add, const Tensor& y) {
  const int64_t S = row.size(0), K = row.size(1), M = rows.size(1);
  const auto* from = data<T>(rows);
  const auto* rows_SK = data<int32_t>(row);
  const auto* W = data<float>(weight);
  const auto* A = data<T>(add);
  auto* Y = data<T>(y);
  parallel(S, 1 + kGrain / (1 + M * K), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      if (s + kAhead < last)
        for (int64_t k = 0; k < K; ++k) fetch(from, rows_SK[(s + kAhead) * K + k], M);
      const auto* own = rows_SK + s * K;
      const auto* a = A ? A + s * M : nullptr;
      const auto* w = W ? W + s * K : nullptr;
      auto* y_s = Y + s * M;
      each_vector(M, [&](int64_t j, auto... n) {
        Vec sum = a ? load(a + j, n...) : Vec{};
        for (int64_t k = 0; k < K; ++k)
          if (own[k] >= 0) sum = fma(load(from + own[k] * M + j, n...), all(w ? w[k] : 1.f), sum);
        store(y_s + j, sum, n...);
      });
    }
  });
}

// Write the gradients of the rows, weight * dy of the token, and of the weights, <row, dy>; both are zero where an
// entry has no row and a row no entry.
template <typename T>
void combine_backward_as(
    const Tensor& dy, const Tensor& rows, const Tensor& weight, const Tensor& entry, const Optional& d_rows,
    const Optional& d_weight) {
  const int64_t R = rows.size(0), M = rows.size(1), N = weight.numel(), K = weight.size(1);
  const auto *DY = data<T>(dy), *from = data<T>(rows);
  const auto* W = data<float>(weight);
  const auto* entries = data<int32_t>(entry);
  auto* DR = data<T>(d_rows);
  auto* DW = data<float>(d_weight);
  check_table("combine", entry, N);
  if (DW) std::fill_n(DW, N, 0.f);
  parallel(R, 1 + kGrain / (1 + M), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t i = entries[r];
      if (r + kAhead < last) fetch(DY, entries[r + kAhead] / K, M);  // of no entry: token 0
      if (i < 0) {
        if (DR) std::memset(DR + r * M, 0, M * sizeof(T));
        continue;
      }
      Vec dot{};
      each_vector(M, [&](int64_t j, auto... n) {
        const Vec d = load(DY + i / K * M + j, n...);
        if (DW) dot = fma(d, load(from + r * M + j, n...), dot);
        if (DR) store(DR + r * M + j, d * W[i], n...);
      });
      if (DW) DW[i] = sum(dot);
    }
  });
}

void combine_backward(
    const Tensor& dy, const Tensor& rows, const Tensor& weight, const Tensor& entry, const Optional& d_rows,
    const Optional& d_weight) {
  const auto call = is_float(rows) ? combine_backward_as<float> : combine_backward_as<BFloat16>;
  call(dy, rows, weight, entry, d_rows, d_weight);
}

std::tuple<Tensor, Tensor, Tensor> row_table(
    const Tensor& expert, const Tensor& slot, const Tensor& kept, std::optional<int64_t> rows) {
  const auto table = make_table(expert, slot, kept, rows);
  return {table.row, table.entry, table.offsets};
}

void combine(const Tensor& rows, const Tensor& row, const Optional& weight, const Tensor& y) {
  sum_rows(rows, row, weight, std::nullopt, y);
}

}  // namespace

Table make_table(const Tensor& expert, const Tensor& slot, const Tensor& kept, std::optional<int64_t> rows) {
  const int64_t N = slot.numel(), E = kept.numel();
  check(
      is_int(expert) && is_int(slot) && is_int(kept) && contiguous(expert, slot, kept) && expert.numel() == N,
      "row_table: experts and slots of the same shape and kept entries must be contiguous int32");
  const auto *chosen = data<int32_t>(expert), *slots = data<int32_t>(slot), *count = data<int32_t>(kept);
  auto offsets = ints({E + 1}), row = ints({slot.size(0), slot.size(1)});
  auto* first = data<int32_t>(offsets);
  first[0] = 0;
  for (int64_t e = 0; e < E; ++e) first[e + 1] = first[e] + count[e];
  const int64_t R = rows.value_or(first[E]);
  auto entry = ints({R});
  auto *to_row = data<int32_t>(row), *to_entry = data<int32_t>(entry);
  std::fill_n(to_entry, R, -1);
  for (int64_t i = 0; i < N; ++i) {
    if (slots[i] < 0) {
      to_row[i] = -1;
      continue;
    }
    check(0 <= chosen[i] && chosen[i] < E, "row_table: no expert ", chosen[i], " of ", E);
    const int64_t r = int64_t(first[chosen[i]]) + slots[i];
    check(r < R, "row_table: an entry has row ", r, " of ", R);
    to_row[i] = r;
    to_entry[r] = i;
  }
  return {row, entry, offsets};
}

void dispatch(const Tensor& x, const Tensor& entry, int64_t K, const Tensor& rows) {
  copy_rows("dispatch", x, entry, K, rows);
}

void sum_rows(const Tensor& rows, const Tensor& row, const Optional& weight, const Optional& add, const Tensor& y) {
  if (!weight.has_value() && !add.has_value() && row.size(1) == 1) return copy_rows("dispatch", rows, row, 1, y);
  check_table("combine", row, rows.size(0));
  (is_float(rows) ? sum_rows_as<float> : sum_rows_as<BFloat16>)(rows, row, weight, add, y);
}

}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def("row_table(Tensor expert, Tensor slot, Tensor kept, int? rows) -> (Tensor, Tensor, Tensor)");
  library.def("dispatch(Tensor x, Tensor entry, int top_k, Tensor(a!) rows) -> ()");
  library.def("combine(Tensor rows, Tensor row, Tensor? weight, Tensor(a!) y) -> ()");
  library.def(
      "combine_backward(Tensor dy, Tensor rows, Tensor weight, Tensor entry, Tensor(a!)? d_rows, Tensor(b!)? d_weight) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("row_table", TORCH_BOX(&moelab::row_table));
  library.impl("dispatch", TORCH_BOX(&moelab::dispatch));
  library.impl("combine", TORCH_BOX(&moelab::combine));
  library.impl("combine_backward", TORCH_BOX(&moelab::combine_backward));
}
