// Row tables, dispatch and combine, for the operations that contain them.
#pragma once

#include "operation.h"

namespace moelab {

struct Table { Tensor row, entry, offsets; };  // as RowTable in kernels/permute.py

Table make_table(const Tensor& expert, const Tensor& slot, const Tensor& kept, std::optional<int64_t> rows);

// Copy tokens to rows; empty rows are zero.
void dispatch(const Tensor& x, const Tensor& entry, int64_t K, const Tensor& rows);

// Write y_s = add_s + sum_k weight_sk * rows[row_sk] over the rows that exist; without weights, these are 1.
void sum_rows(const Tensor& rows, const Tensor& row, const Optional& weight, const Optional& add, const Tensor& y);

}  // namespace moelab
