// Attention forward for few queries: decoding with a key-value cache.
//
// With one query a key takes part in one product: the time is that of reading keys and values, and
// a copy into tiles would double it. So they are read where they lie, once, in their own dtype. A
// task owns a run of keys of one batch entry and key-value head, and all query rows that see them:
// the queries of every head of the group share the read. It walks over tiles of kTile keys:
//
//     scores   lanes are dims; a vector of sums for kLanes (row, key) pairs at a time
//     softmax  online, over the tile's scores
//     values   lanes are dims; a tile's weighted sum, added to the running output
//
// What is read next is brought in meanwhile. Where batch and heads are few against the threads, the
// keys of a head are split between tasks, whose running maxima, sums and outputs
// `attention_decode_join` joins in a fixed order.
//
// bf16 keys multiply in pairs where the machine can; weights stay floats. Bytes moved: each operand
// once, out and lse once.
#pragma once

#include "attention_decode.h"
#include "attention_view.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kTile = 64;             // keys
constexpr int64_t kLeastSplitKeys = 256;  // shorter splits cost more to join than they save
constexpr int64_t kPage = 4096;
constexpr int64_t kPagesAhead = 8;
constexpr int64_t kBytesAhead = 2 * kPage;

// Sizes that follow from the problem alone.
template <class Math>
struct DecodeShape {
  explicit DecodeShape(const AttentionForward& problem)
      : group(problem.heads / problem.kv_heads),
        rows(problem.queries * group),
        padded_rows(round_up(rows, kLanes)),
        units(round_up(divide_up(problem.dim, Math::kGroup), kLanes)),
        columns(units * Math::kGroup),
        state_floats(2 * padded_rows + rows * columns) {}

  int64_t group;        // query heads of a key-value head
  int64_t rows;         // query rows of a key-value head
  int64_t padded_rows;  // of per-row numbers: whole vectors
  int64_t units;        // of a packed query row
  int64_t columns;      // floats of an output row
  int64_t state_floats;
};

// The running maxima, sums and unnormalised outputs of some keys.
struct DecodeState {
  template <class Math>
  DecodeState(const DecodeShape<Math>& shape, float* memory)
      : maxima(memory), sums(memory + shape.padded_rows), out(memory + 2 * shape.padded_rows) {}

  float *maxima, *sums, *out;
};

// Rows of a tile of keys or values, and of what is read after them.
template <class Element>
struct TileRows {
  const Element* data;
  int64_t stride, count;
  const Element* next;
  int64_t next_stride, next_count;
  int64_t dim;

  // Rows that follow each other are brought in kBytesAhead before they are read, on into the next
  // head's, and to the L1 cache, for so few bytes fit; the addresses of their pages, which take
  // longest to find, kPagesAhead before. Rows that lie apart: those of the next tile.
  PATCHGEN_FAST_INLINE_MEMBER void bring_next(int64_t row) const {
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(Element));
    if (stride == dim) {
      const char* from = reinterpret_cast<const char*>(data + row * stride);
      if (row * bytes % kPage < bytes) {
        __builtin_prefetch(from + kPagesAhead * kPage);
      }
      bring_row<false, kL1>(from + kBytesAhead, bytes);
    } else if (row < next_count) {
      bring_row(next + row * next_stride, bytes);
    }
  }
};

// kUnits units of kRows queries, from unit d on, times those of kLanes / kRows keys, added to
// `sums`; a unit that is not whole stands alone. Key after key, as they lie in memory: hardware
// foresees only reads in order.
template <class Math, int kRows, int kUnits, class Element>
PATCHGEN_FAST_INLINE void multiply_units(const float* queries, int64_t query_row,
                                         const Element* const* keys, int64_t d, int64_t dims,
                                         Vec (&sums)[kLanes]) {
  constexpr int kKeys = kLanes / kRows;
  constexpr int64_t kUnit = kLanes * Math::kGroup;
  queries += d / Math::kGroup;
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      const Vec key = load_units<Math>(keys[i] + d + u * kUnit, kUnits > 1 ? kUnit : dims);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Vec& sum = sums[r * kKeys + i];
        sum = Math::multiply_add(sum, load(queries + r * query_row + u * kLanes), key);
      }
    }
  }
}

// Products of kRows packed queries with the tile's keys, kLanes / kRows keys at a time.
template <class Math, int kRows, class Element>
void decode_scores(const float* queries, int64_t query_row, const TileRows<Element>& keys,
                   int64_t dim, float* scores, int64_t score_row) {
  constexpr int kKeys = kLanes / kRows;
  constexpr int64_t kUnit = kLanes * Math::kGroup;
  constexpr int kUnits = 4 / Math::kGroup;
  for (int64_t j = 0; j < keys.count; j += kKeys) {
    const Element* rows[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      // Past the last key the last one again: softmax hides its score.
      const int64_t key = smaller(j + i, keys.count - 1);
      rows[i] = keys.data + key * keys.stride;
      keys.bring_next(j + i);
    }
    Vec sums[kLanes] = {};
    int64_t d = 0;
    for (; d + kUnits * kUnit <= dim; d += kUnits * kUnit) {
      multiply_units<Math, kRows, kUnits>(queries, query_row, rows, d, kUnit, sums);
    }
    for (; d < dim; d += kUnit) {
      multiply_units<Math, kRows, 1>(queries, query_row, rows, d, dim - d, sums);
    }
    const Vec products = join_lanes<1>(sums);
    float lanes[kLanes];
    store(lanes, products);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_memcpy(scores + r * score_row + j, lanes + r * kKeys, kKeys * sizeof(float));
    }
  }
}

// out = out * decay + weights * values, of kRows rows and kUnits whole units of dims from `first`
// on, or of the last unit's `dims`. With PairMath, a unit's even dims come before its odd ones.
template <class Math, int kRows, int kUnits, class Element>
void decode_values(const float* weights, int64_t score_row, const TileRows<Element>& values,
                   int64_t first, int64_t dims, const float* decay, float* out, int64_t columns) {
  constexpr int kGroup = Math::kGroup;
  constexpr int64_t kUnit = kLanes * kGroup;
  Vec sums[kRows][kUnits * kGroup] = {};
  const Element* row = values.data + first;
  for (int64_t j = 0; j < values.count; ++j, row += values.stride) {
    Vec weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      weight[r] = broadcast(weights[r * score_row + j]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const Vec unit = load_units<Math>(row + u * kUnit, kUnits > 1 ? kUnit : dims);
      Vec dims_of_unit[kGroup] = {unit};
      if constexpr (kGroup == 2) {
        const Pairs pairs = bit_cast<Pairs>(unit);
        dims_of_unit[0] = bit_cast<Vec>(pairs << 16);
        dims_of_unit[1] = bit_cast<Vec>(pairs & 0xffff0000u);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroup; ++g) {
          sums[r][u * kGroup + g] = fma(weight[r], dims_of_unit[g], sums[r][u * kGroup + g]);
        }
      }
    }
    if (first == 0) {
      values.bring_next(j);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* to = out + r * columns + first;
#pragma GCC unroll 4
    for (int v = 0; v < kUnits * kGroup; ++v, to += kLanes) {
      store(to, fma(load(to), broadcast(decay[r]), sums[r][v]));
    }
  }
}

// All dims of kRows rows.
template <class Math, int kRows, class Element>
void decode_values(const float* weights, int64_t score_row, const TileRows<Element>& values,
                   int64_t dim, const float* decay, float* out, int64_t columns) {
  // Accumulators fill half of the registers at most: four vectors of each of four rows.
  constexpr int kUnits = smaller(4, kRegisters / 2 / kRows) / Math::kGroup;
  constexpr int64_t kUnit = kLanes * Math::kGroup;
  int64_t d = 0;
  for (; d + kUnits * kUnit <= dim; d += kUnits * kUnit) {
    decode_values<Math, kRows, kUnits>(weights, score_row, values, d, kUnits * kUnit, decay, out,
                                       columns);
  }
  for (; d < dim; d += kUnit) {
    decode_values<Math, kRows, 1>(weights, score_row, values, d, dim - d, decay, out, columns);
  }
}

// Calls run(row, kRows) for blocks of 4, 2 and 1 rows.
template <class Run>
PATCHGEN_FAST_INLINE void for_row_blocks(int64_t rows, const Run& run) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    run(r, std::integral_constant<int, 4>{});
  }
  if (r + 2 <= rows) {
    run(r, std::integral_constant<int, 2>{});
    r += 2;
  }
  if (r < rows) {
    run(r, std::integral_constant<int, 1>{});
  }
}

template <class Math, class Element>
class DecodeTask {
 public:
  DecodeTask(const AttentionDecode& problem, const AttentionPlan& plan, int64_t group)
      : problem_(problem),
        plan_(plan),
        shape_(problem),
        view_(problem, group / problem.kv_heads, group % problem.kv_heads) {}

  // A task's memory: scores, packed queries, and a state unless the problem has room for it.
  static size_t scratch_bytes(const DecodeShape<Math>& shape) {
    return sizeof(float) *
           static_cast<size_t>(shape.rows * (kTile + shape.units) + shape.state_floats);
  }

  void attend(int64_t split, float* scratch) {
    scores_ = scratch;
    queries_ = scores_ + shape_.rows * kTile;
    DecodeState state = problem_.partial == nullptr
                            ? DecodeState(shape_, queries_ + shape_.rows * shape_.units)
                            : partial(split);
    reset(state);
    pack_queries();
    const int64_t end = smaller(last_key(), (split + 1) * plan_.chunk);
    for (int64_t first = split * plan_.chunk; first < end; first += kTile) {
      add_tile({first, smaller(kTile, end - first)}, end, state);
    }
    if (problem_.partial == nullptr) {
      finish(state);
    }
  }

  // The splits' states into the first one, and that into out.
  void join() {
    DecodeState all = partial(0);
    for (int64_t split = 1; split < plan_.chunks; ++split) {
      const DecodeState part = partial(split);
      float ours[AttentionDecode::kMostRows + kLanes], theirs[AttentionDecode::kMostRows + kLanes];
      for (int64_t r = 0; r < shape_.rows; r += kLanes) {
        const Vec before = load(all.maxima + r), other = load(part.maxima + r);
        const Vec top = max(before, other);
        const Vec keep = decay(before, top), take = decay(other, top);
        store(all.maxima + r, top);
        store(all.sums + r, load(all.sums + r) * keep + load(part.sums + r) * take);
        store(ours + r, keep);
        store(theirs + r, take);
      }
      for (int64_t r = 0; r < shape_.rows; ++r) {
        float* out = all.out + r * shape_.columns;
        const float* other = part.out + r * shape_.columns;
        for (int64_t d = 0; d < shape_.columns; d += kLanes) {
          store(out + d,
                load(out + d) * broadcast(ours[r]) + load(other + d) * broadcast(theirs[r]));
        }
      }
    }
    finish(all);
  }

 private:
  DecodeState partial(int64_t split) const {
    const int64_t group = view_.batch * problem_.kv_heads + view_.kv_head;
    return DecodeState(shape_,
                       problem_.partial + (group * plan_.chunks + split) * shape_.state_floats);
  }

  // What a sum of weights under the maximum `before` is under `now`; 0 where it has no key yet.
  Vec decay(Vec before, Vec now) const {
    const Vec factor = broadcast(view_.to_natural * kLog2e);
    return select(before == kMinusInfinity, Vec{}, exp2_scaled(before - now, factor));
  }

  void reset(const DecodeState& state) const {
    for (int64_t r = 0; r < shape_.padded_rows; r += kLanes) {
      store(state.maxima + r, broadcast(kMinusInfinity));
      store(state.sums + r, Vec{});
    }
    __builtin_memset(state.out, 0, sizeof(float) * shape_.rows * shape_.columns);
  }

  // Query rows [first, first + queries) of head number h of the group.
  QueryRows rows_of(int64_t h) const {
    return {view_.kv_head * shape_.group + h, 0, problem_.queries};
  }

  void pack_queries() {
    for (int64_t h = 0; h < shape_.group; ++h) {
      pack_rows<Math>(view_.element<Element>(problem_.query, rows_of(h).head, 0),
                      problem_.query.token, problem_.queries, problem_.dim, view_.sign,
                      queries_ + h * problem_.queries * shape_.units, shape_.units);
    }
  }

  // Keys that any query sees come before it.
  int64_t last_key() const { return view_.visible(rows_of(0), view_.panel(0, problem_.keys)); }

  TileRows<Element> tile(const AttentionTensor& of, const KeyPanel& keys,
                         const AttentionTensor& next, int64_t next_first, int64_t end) const {
    return {view_.element<Element>(of, view_.kv_head, keys.first),
            of.token,
            keys.keys,
            view_.element<Element>(next, view_.kv_head, next_first),
            next.token,
            smaller(keys.keys, end - next_first),
            problem_.dim};
  }

  void add_tile(const KeyPanel& panel, int64_t end, const DecodeState& state) {
    const int64_t dim = problem_.dim;
    const TileRows<Element> keys = tile(problem_.key, panel, problem_.value, panel.first, end);
    for_row_blocks(shape_.rows, [&](int64_t r, auto count) {
      decode_scores<Math, count()>(queries_ + r * shape_.units, shape_.units, keys, dim,
                                   scores_ + r * kTile, kTile);
    });
    for (int64_t h = 0; h < shape_.group; ++h) {
      view_.mask(rows_of(h), panel, scores_ + h * problem_.queries * kTile, kTile);
    }
    float before[AttentionDecode::kMostRows + kLanes],
        sums[AttentionDecode::kMostRows + kLanes] = {};
    __builtin_memcpy(before, state.maxima, sizeof(float) * shape_.padded_rows);
    softmax_block<FloatMath>({scores_, kTile, divide_up(panel.keys, kLanes)}, shape_.rows,
                             view_.to_natural * kLog2e, state.maxima, sums);
    float decays[AttentionDecode::kMostRows + kLanes];
    for (int64_t r = 0; r < shape_.rows; r += kLanes) {
      const Vec kept = decay(load(before + r), load(state.maxima + r));
      store(decays + r, kept);
      store(state.sums + r, fma(load(state.sums + r), kept, load(sums + r)));
    }
    const TileRows<Element> values =
        tile(problem_.value, panel, problem_.key, panel.first + kTile, end);
    for_row_blocks(shape_.rows, [&](int64_t r, auto count) {
      decode_values<Math, count()>(scores_ + r * kTile, kTile, values, dim, decays + r,
                                   state.out + r * shape_.columns, shape_.columns);
    });
  }

  // Normalises into out, and writes lse.
  void finish(const DecodeState& state) const {
    for (int64_t r = 0; r < shape_.rows; ++r) {
      const int64_t query = r % problem_.queries;
      const int64_t head = view_.kv_head * shape_.group + r / problem_.queries;
      const float sum = state.sums[r];
      const Vec lse = log_sum_exp(broadcast(state.maxima[r]), broadcast(sum), view_.to_natural);
      problem_.lse[problem_.lse_row(view_.batch, head, query)] = lse[0];
      float* from = state.out + r * shape_.columns;
      in_order(from);
      Element* to =
          static_cast<Element*>(problem_.out) +
          ((view_.batch * problem_.queries + query) * problem_.heads + head) * problem_.dim;
      store_row(to, from, problem_.dim, sum == 0.0f ? 0.0f : 1.0f / sum);
    }
  }

  // Even and odd dims of each unit, one after the other again.
  void in_order(float* row) const {
    if constexpr (Math::kGroup == 2) {
      for (int64_t d = 0; d < shape_.columns; d += 2 * kLanes) {
        float dims[2 * kLanes];
        for (int i = 0; i < kLanes; ++i) {
          dims[2 * i] = row[d + i];
          dims[2 * i + 1] = row[d + kLanes + i];
        }
        __builtin_memcpy(row + d, dims, sizeof(dims));
      }
    }
  }

  const AttentionDecode& problem_;
  const AttentionPlan& plan_;
  const DecodeShape<Math> shape_;
  const HeadView view_;
  float *scores_ = nullptr, *queries_ = nullptr;
};

template <class Math>
AttentionPlan decode_plan(const AttentionDecode& problem, int64_t threads) {
  constexpr int64_t kTasksPerThread = 4;
  const DecodeShape<Math> shape(problem);
  const int64_t groups = problem.batch * problem.kv_heads;
  AttentionPlan plan{};
  const bool even = groups % threads == 0 || groups >= kTasksPerThread * threads;
  const int64_t wanted = even ? 1 : divide_up(kTasksPerThread * threads, groups);
  const int64_t splits = smaller(wanted, larger(1, problem.keys / kLeastSplitKeys));
  plan.chunk = larger(kTile, round_up(divide_up(problem.keys, splits), kTile));
  plan.chunks = larger(1, divide_up(problem.keys, plan.chunk));
  plan.tasks = groups * plan.chunks;
  plan.workspace = plan.chunks == 1 ? 0 : plan.tasks * shape.state_floats;
  plan.scratch_bytes = DecodeTask<Math, float>::scratch_bytes(shape);
  return plan;
}

AttentionPlan attention_decode_plan(const AttentionDecode& problem, int64_t threads) {
  return problem.dtype == Dtype::bfloat16 ? decode_plan<Bf16Math>(problem, threads)
                                          : decode_plan<FloatMath>(problem, threads);
}

template <class Run>
PATCHGEN_FAST_INLINE void with_decode_task(const AttentionDecode& problem,
                                           const AttentionPlan& plan, int64_t group,
                                           const Run& run) {
  switch (problem.dtype) {
    case Dtype::float32:
      return run(DecodeTask<FloatMath, float>(problem, plan, group));
    case Dtype::bfloat16:
      return run(DecodeTask<Bf16Math, BFloat16>(problem, plan, group));
    default:
      return run(DecodeTask<FloatMath, Float16>(problem, plan, group));
  }
}

// Tasks are (batch, key-value head, split).
void attention_decode(const AttentionDecode& problem, const AttentionPlan& plan, int64_t task,
                      void* scratch) {
  with_decode_task(problem, plan, task / plan.chunks, [&](auto decode) {
    decode.attend(task % plan.chunks, static_cast<float*>(scratch));
  });
}

// Tasks are (batch, key-value head); needed only where the plan has more chunks than one.
void attention_decode_join(const AttentionDecode& problem, const AttentionPlan& plan,
                           int64_t task) {
  with_decode_task(problem, plan, task, [](auto decode) { decode.join(); });
}

}  // namespace
}  // namespace patchgen_fast
