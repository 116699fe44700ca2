#include "gemm_run.h"

#include <cstring>

#include "kernels.h"

namespace patchgen_fast {
namespace {

// Where a call packs its weights, for all its threads; what is in it is gone with the call.
using PackedMemory = ThreadMemory<struct ForPacking, size_t{32} << 20>;

// Images too small for a patch still have their prefix tokens.
void write_prefix_only(const PatchEmbedForward& f) {
  const size_t bytes = static_cast<size_t>(f.prefix_tokens * f.embed) * size_of(f.dtype);
  for (int64_t b = 0; b < f.source.grid.batch && bytes > 0; ++b) {
    std::memcpy(static_cast<char*>(f.out) + static_cast<size_t>(b) * bytes, f.prefix, bytes);
  }
}

}  // namespace

void run_linear(LinearForward f) {
  const KernelTable& table = kernels();
  const Parallel parallel = torch_parallel();
  const FewRowsPlan few = table.linear_few_rows_plan(f, parallel.threads);
  if (few.tasks > 0) {
    return for_each_task(parallel, few.tasks, few.scratch_bytes, [&](int64_t task, void* scratch) {
      table.linear_few_rows(f, few, task, scratch);
    });
  }
  const GemmPlan plan = table.linear_plan(f, parallel.threads);
  if (plan.tasks == 0) {
    return;
  }
  f.packed = PackedMemory::get(plan.packed_bytes);
  for_each_task(parallel, plan.pack_tasks, 0,
                [&](int64_t task, void*) { table.linear_pack(f, plan, task); });
  for_each_task(parallel, plan.tasks, plan.scratch_bytes,
                [&](int64_t task, void* scratch) { table.linear_forward(f, plan, task, scratch); });
}

void run_patch_embed(PatchEmbedForward f) {
  const KernelTable& table = kernels();
  const Parallel parallel = torch_parallel();
  const GemmPlan plan = table.patch_embed_plan(f, parallel.threads);
  if (plan.tasks == 0) {
    return write_prefix_only(f);
  }
  f.packed = PackedMemory::get(plan.packed_bytes);
  for_each_task(
      parallel, plan.pack_tasks, plan.pack_scratch_bytes,
      [&](int64_t task, void* scratch) { table.patch_embed_pack(f, plan, task, scratch); });
  for_each_task(parallel, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    table.patch_embed_forward(f, plan, task, scratch);
  });
}

void run_patch_unembed(PatchUnembed u) {
  const KernelTable& table = kernels();
  const Parallel parallel = torch_parallel();
  const GemmPlan plan = table.patch_unembed_plan(u, parallel.threads);
  if (plan.tasks == 0) {
    return;
  }
  u.packed = PackedMemory::get(plan.packed_bytes);
  for_each_task(parallel, plan.pack_tasks, 0,
                [&](int64_t task, void*) { table.patch_unembed_pack(u, plan, task); });
  for_each_task(parallel, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    table.patch_unembed_run(u, plan, task, scratch);
  });
}

void run_outer(OuterProduct o) {
  const KernelTable& table = kernels();
  const Parallel parallel = torch_parallel();
  if (o.depth == 0) {
    std::memset(o.out, 0, static_cast<size_t>(o.rows * o.columns) * size_of(o.dtype));
    return;
  }
  GemmPlan plan = table.outer_plan(o, 0, parallel.threads);
  if (plan.tasks == 0) {
    return;
  }
  const bool stages = plan.depth < o.depth;
  const Tensor sums = new_tensor({stages ? o.rows * o.columns : 0}, ScalarType::Float);
  o.packed = PackedMemory::get(plan.packed_bytes);  // the first stage is the longest
  o.sums = static_cast<float*>(sums.mutable_data_ptr());
  for (int64_t first = 0; first < o.depth; first += plan.depth) {
    plan = table.outer_plan(o, first, parallel.threads);
    for_each_task(
        parallel, plan.pack_tasks, plan.pack_scratch_bytes,
        [&](int64_t task, void* scratch) { table.outer_pack(o, first, plan, task, scratch); });
    for_each_task(parallel, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
      table.outer_run(o, first, plan, task, scratch);
    });
  }
}

void run_activation_backward(const ActivationBackward& b) {
  const KernelTable& table = kernels();
  const int64_t tasks = (b.elements + kActivationChunk - 1) / kActivationChunk;
  for_each_task(torch_parallel(), tasks, 0,
                [&](int64_t task, void*) { table.activation_backward(b, task); });
}

void run_column_sums(const ColumnSums& s) {
  const KernelTable& table = kernels();
  const int64_t tasks = (s.columns + kSumColumns - 1) / kSumColumns;
  for_each_task(torch_parallel(), tasks, 0,
                [&](int64_t task, void*) { table.column_sums(s, task); });
}

// images [B,C,H,W] or [B,C,T,H,W]; weight [E,C,(Pt,)Ph,Pw].
PatchGrid patch_grid(const Tensor& images, const Tensor& weight, bool interleave) {
  const bool video = images.dim() == 5;
  const int64_t h = images.dim() - 2;
  PatchGrid g{};
  g.batch = images.size(0);
  g.channels = images.size(1);
  g.stride_b = images.stride(0);
  g.stride_c = images.stride(1);
  g.stride_t = video ? images.stride(2) : 0;
  g.stride_h = images.stride(h);
  g.stride_w = images.stride(h + 1);
  g.patch_t = video ? weight.size(2) : 1;
  g.patch_h = weight.size(h);
  g.patch_w = weight.size(h + 1);
  g.grid_t = video ? images.size(2) / g.patch_t : 1;
  g.grid_h = images.size(h) / g.patch_h;
  g.grid_w = images.size(h + 1) / g.patch_w;
  g.interleaved = interleave && g.channels > 1 && g.stride_c == 1 && g.stride_w == g.channels;
  return g;
}

}  // namespace patchgen_fast
