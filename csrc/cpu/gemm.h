// A matrix product as work for threads: what the boundary needs to know, free of instruction sets.
//
//     C[rows, columns] = A[rows, depth] @ W[columns, depth]^T
//
// W is packed once per call, panel by panel, into memory that all threads then read (`pack` tasks);
// after that each task gathers one block of A and multiplies it with its panels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace patchgen_fast {

struct GemmPlan {
  int64_t rows;
  int64_t columns;
  int64_t depth;          // elements contracted over
  int64_t groups;         // the same in 32-bit words: 1 float or 2 bf16 each
  int64_t stride;         // words from row to row of a block of A
  int64_t panels;         // of packed W; the last one may be narrower
  int64_t last_column;    // with which the last panel begins
  int64_t rows_per_task;  // one block of A
  int64_t panels_per_task;
  int64_t column_tasks;
  int64_t tasks;
  bool limbs;            // W as bytes in limbs: patch_embed_limbs_kernel.h
  bool transposed;       // rows are W's, columns A's: linear_transposed_kernel.h
  int64_t rows_at_once;  // against every panel, before the next rows; 0 for all rows of a block
  int64_t pack_tasks;
  size_t packed_bytes;  // of W, and after it the bias as floats
  size_t pack_scratch_bytes;
  size_t scratch_bytes;  // of a task
};

}  // namespace patchgen_fast
