// torch's face of attention over packed sequences on the CPU: each sequence is a problem of its own
// for attention's kernels, and the tasks of all of them are spread over the threads together. The
// contract stands in patchgen_fast/ops/varlen_attention.py.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../counters.h"
#include "attention.h"
#include "boundary.h"
#include "integers.h"
#include "kernels.h"

namespace patchgen_fast {
namespace {

// Sequence s is rows offsets[s] to offsets[s + 1] of a packed tensor. Offsets that do not rise, or
// that leave the tensor, are those of a traced graph that had no values to check: they are clamped.
struct Offsets {
  Offsets(const Tensor& offsets, int64_t rows) : at(static_cast<size_t>(offsets.size(0))) {
    const auto* values = static_cast<const int32_t*>(offsets.const_data_ptr());
    int64_t before = 0;
    for (size_t s = 0; s < at.size(); ++s) {
      before = larger(before, smaller(values[s], rows));
      at[s] = before;
    }
  }

  size_t sequences() const { return at.size() - 1; }
  int64_t length(size_t s) const { return at[s + 1] - at[s]; }

  std::vector<int64_t> at;
};

// Rows [row, ...) of a [tokens, heads, dim] tensor.
AttentionTensor rows_from(const Tensor& tensor, int64_t row) {
  const auto* data = static_cast<const unsigned char*>(tensor.const_data_ptr());
  const int64_t bytes = row * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
  return {data + bytes, 0, tensor.stride(1), tensor.stride(0)};
}

// The same of a contiguous result.
template <class T = void>
T* result_from(Tensor& tensor, int64_t row) {
  auto* data = static_cast<unsigned char*>(tensor.mutable_data_ptr());
  const int64_t columns = tensor.size(1) * tensor.size(2);
  return reinterpret_cast<T*>(data + row * columns * static_cast<int64_t>(tensor.element_size()));
}

// Rows no sequence owns.
template <class T>
void fill_rows(Tensor& tensor, int64_t first, T value) {
  T* data = static_cast<T*>(tensor.mutable_data_ptr());
  const int64_t columns = tensor.size(1) * tensor.size(2);
  std::fill(data + first * columns, data + tensor.size(0) * columns, value);
}

void clear_rows(Tensor& tensor, int64_t first) {
  if (tensor.element_size() == 4) {
    fill_rows<float>(tensor, first, 0.0f);
  } else {
    fill_rows<uint16_t>(tensor, first, 0);
  }
}

// All sequences as attention problems of one batch entry each.
template <class Problem>
struct Sequences {
  Sequences(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_q,
            const Tensor& cu_k, bool is_causal, double scale)
      : queries(cu_q, query.size(0)),
        keys(cu_k, key.size(0)),
        shifts(queries.sequences()),
        problems(queries.sequences()) {
    for (size_t s = 0; s < problems.size(); ++s) {
      Problem& p = problems[s];
      p.dtype = dtype_of(query);
      p.batch = 1;
      p.heads = query.size(1);
      p.kv_heads = key.size(1);
      p.queries = queries.length(s);
      p.keys = keys.length(s);
      p.dim = query.size(2);
      p.query = rows_from(query, queries.at[s]);
      p.key = rows_from(key, keys.at[s]);
      p.value = rows_from(value, keys.at[s]);
      shifts[s] = static_cast<int32_t>(p.keys - p.queries);  // the last query sees the last key
      p.query_offset = &shifts[s];
      p.is_causal = is_causal;
      p.scale = static_cast<float>(scale);
      p.lse_head = query.size(0);
    }
  }

  int64_t products() const {
    int64_t sum = 0;
    for (const Problem& p : problems) {
      sum += p.queries * p.keys;
    }
    return sum;
  }

  Offsets queries, keys;
  std::vector<int32_t> shifts;
  std::vector<Problem> problems;
};

// Runs the tasks of all plans: run(sequence, task of its plan, scratch).
template <class Run>
void for_each_sequence_task(const Parallel& threads, const std::vector<AttentionPlan>& plans,
                            const Run& run) {
  std::vector<int64_t> first(plans.size() + 1, 0);
  size_t scratch_bytes = 0;
  for (size_t s = 0; s < plans.size(); ++s) {
    first[s + 1] = first[s] + plans[s].tasks;
    scratch_bytes = std::max(scratch_bytes, plans[s].scratch_bytes);
  }
  for_each_task(threads, first.back(), scratch_bytes, [&](int64_t task, void* scratch) {
    const auto after = std::upper_bound(first.begin(), first.end(), task);
    const size_t s = static_cast<size_t>(after - first.begin()) - 1;
    run(s, task - first[s], scratch);
  });
}

std::tuple<Tensor, Tensor> varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_q,
                                            Tensor cu_k, int64_t /*max_q*/, int64_t /*max_k*/,
                                            bool is_causal, double scale) {
  static CallCounter calls("varlen_attention.cpu");
  calls.add();
  Sequences<AttentionForward> all(query, key, value, cu_q, cu_k, is_causal, scale);
  const int64_t tokens = query.size(0), heads = query.size(1);
  Tensor out = new_tensor({tokens, heads, query.size(2)}, query.scalar_type());
  Tensor lse = new_tensor({heads, tokens}, ScalarType::Float);
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());

  const Parallel threads = torch_parallel();
  const int64_t products = all.products();
  std::vector<AttentionPlan> plans;
  for (size_t s = 0; s < all.problems.size(); ++s) {
    AttentionForward& p = all.problems[s];
    p.out = result_from(out, all.queries.at[s]);
    p.lse = lse_data + all.queries.at[s];
    // A sequence is cut for as many threads as its share of the work keeps busy.
    const int64_t share = threads.threads * p.queries * p.keys;
    plans.push_back(kernels().attention_plan(p, larger(1, divide_up(share, larger(1, products)))));
  }
  for_each_sequence_task(threads, plans, [&](size_t s, int64_t task, void* scratch) {
    kernels().attention_forward(all.problems[s], plans[s], task, scratch);
  });

  const int64_t owned = all.queries.at.back();
  clear_rows(out, owned);
  for (int64_t head = 0; head < heads; ++head) {
    std::fill(lse_data + head * tokens + owned, lse_data + (head + 1) * tokens,
              -__builtin_huge_valf());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_out,
                                                             OptionalTensor grad_lse, Tensor query,
                                                             Tensor key, Tensor value, Tensor out,
                                                             Tensor lse, Tensor cu_q, Tensor cu_k,
                                                             int64_t /*max_q*/, int64_t /*max_k*/,
                                                             bool is_causal, double scale) {
  static CallCounter calls("varlen_attention_backward.cpu");
  calls.add();
  grad_out = last_stride_one(grad_out);
  out = last_stride_one(out);
  lse = as_contiguous(lse);
  if (grad_lse.has_value()) {
    grad_lse = as_contiguous(*grad_lse);
  }
  Sequences<AttentionBackward> all(query, key, value, cu_q, cu_k, is_causal, scale);
  Tensor grad_query =
      new_tensor({query.size(0), query.size(1), query.size(2)}, query.scalar_type());
  Tensor grad_key = new_tensor({key.size(0), key.size(1), key.size(2)}, key.scalar_type());
  Tensor grad_value = new_tensor({key.size(0), key.size(1), key.size(2)}, key.scalar_type());
  const float* lse_data = static_cast<const float*>(lse.const_data_ptr());
  const float* grad_lse_data = data_or_null<float>(grad_lse);

  std::vector<AttentionPlan> plans;
  int64_t workspace = 0;
  for (size_t s = 0; s < all.problems.size(); ++s) {
    AttentionBackward& p = all.problems[s];
    const int64_t first = all.queries.at[s], first_key = all.keys.at[s];
    p.grad_out = rows_from(grad_out, first);
    p.out = rows_from(out, first);
    p.lse = lse_data + first;
    p.grad_lse = grad_lse_data == nullptr ? nullptr : grad_lse_data + first;
    p.grad_query = result_from(grad_query, first);
    p.grad_key = result_from(grad_key, first_key);
    p.grad_value = result_from(grad_value, first_key);
    plans.push_back(kernels().attention_backward_plan(p));
    workspace += plans.back().workspace;
  }
  Tensor statistics = new_tensor({workspace}, ScalarType::Float);
  float* here = static_cast<float*>(statistics.mutable_data_ptr());
  for (size_t s = 0; s < plans.size(); ++s) {
    all.problems[s].statistics = plans[s].workspace == 0 ? nullptr : here;
    here += plans[s].workspace;
  }
  for_each_sequence_task(torch_parallel(), plans, [&](size_t s, int64_t task, void* scratch) {
    kernels().attention_backward(all.problems[s], task, scratch);
  });
  clear_rows(grad_query, all.queries.at.back());
  clear_rows(grad_key, all.keys.at.back());
  clear_rows(grad_value, all.keys.at.back());
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace patchgen_fast

// The stable ABI has no SymInt: Python registers varlen_attention.cpu and .cuda as calls of these
// raw ops.
STABLE_TORCH_LIBRARY_FRAGMENT(patchgen_fast_native, m) {
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor "
      "cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, bool is_causal, float scale) -> (Tensor, "
      "Tensor)");
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int "
      "max_seqlen_q, int max_seqlen_k, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast_native, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&patchgen_fast::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&patchgen_fast::varlen_attention_backward));
}
