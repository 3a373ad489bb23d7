// Tensors in, bands of rows out to torch's threads, tensors out.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "problem.h"

namespace sasa {

using at::Tensor;
// std's, or in torch < 2.5 its own.
using OptionalTensor = decltype(std::declval<const c10::IValue&>().toOptional<Tensor>());

// What is not a map; see local_attention.py.
struct Options {
  int64_t kernel_size, num_heads, dilation;
  bool mask;
  double scale;
};

inline const Kernels& kernels() {
  // torch's own choice, which ATEN_CPU_CAPABILITY lowers.
  static const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__)
  if (capability == "AVX512") return kernels_avx512();
  if (capability == "AVX2") return kernels_avx2();
#endif
  return kernels_default();
}

// ---- What is allocated. ----

// Ask Linux to back a new tensor, to which nothing was written yet, by huge pages; see pages.py.
inline void ask_for_huge_pages(const Tensor& x) {
#if defined(__linux__)
  // As large as a huge page of x86 and of most of arm64's kernels. A tensor of less than two comes from memory
  // that was used before, as a rule.
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  if (x.nbytes() < 2 * huge) return;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = (begin + x.nbytes()) / huge * huge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// As geometry.py's.
inline Tensor empty_output(const Tensor& like) {
  const bool last = !like.is_contiguous() && like.stride(1) == 1;
  Tensor output = at::empty_like(
      like, like.options(), last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  ask_for_huge_pages(output);
  return output;
}

// Of softmax and sums.
inline at::ScalarType compute_type(const Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline OptionalTensor as_table(const OptionalTensor& x, const Tensor& query) {
  if (!x) return x;
  return x->to(compute_type(query)).contiguous();
}

// ---- What the kernels are told. ----

inline Map as_map(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

inline Problem describe(const Tensor& query, const OptionalTensor& key, const Tensor& value,
                        const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                        const Tensor& logsumexp, const Options& options) {
  Problem p{};
  p.batch = query.size(0);
  p.heads = options.num_heads;
  p.depth = query.size(1) / options.num_heads;
  p.height = query.size(2);
  p.width = query.size(3);
  p.kernel_size = options.kernel_size;
  // All that are larger see the centre alone. An empty map has none.
  p.dilation = std::max<int64_t>(1, std::min(options.dilation, std::max(p.height, p.width)));
  p.mask = options.mask;
  p.scale = options.scale;
  switch (query.scalar_type()) {
    case at::kFloat: p.type = Type::Float; break;
    case at::kDouble: p.type = Type::Double; break;
    case at::kBFloat16: p.type = Type::BFloat16; break;
    case at::kHalf: p.type = Type::Half; break;
    default: TORCH_CHECK(false, "no kernels for ", query.scalar_type());
  }
  p.query = as_map(query);
  if (key) p.key = as_map(*key);
  p.value = as_map(value);
  p.logsumexp = logsumexp.data_ptr();
  if (rel_row) {
    TORCH_CHECK(rel_row->sizes() == rel_col->sizes(), "rel_row is ", rel_row->sizes(), ", rel_col ", rel_col->sizes());
    p.rel_row = rel_row->data_ptr();
    p.rel_col = rel_col->data_ptr();
    p.rel_head = rel_row->size(0) == 1 ? 0 : p.depth / 2 * p.kernel_size;
  }
  return p;
}

// Cut the map into enough pieces to keep every thread busy, of no fewer than `least` blocks of TABLE_ROWS rows, since
// neighbouring bands pack (and in the backward recompute) a radius of the same rows. A piece is the bands of a group
// of phases, whose order is fixed, as they add to the same partial sums. The result does not depend on the pieces.
template <typename Run>
void run_bands(const Problem& p, int64_t least, bool backward, const Run& run) {
  constexpr int64_t alignment = 64;
  const int64_t across = phases(p, p.width), all = phases(p, p.height) * across;
  const int64_t groups = p.table_grads ? table_groups(p) : all, whole = p.batch * p.heads * groups;
  if (whole == 0) return;
  const int64_t wanted = (4 * at::get_num_threads() + whole - 1) / whole;
  const int64_t pieces = std::max<int64_t>(1, std::min(wanted, blocks(p) / least));
  const int64_t bytes = kernels().scratch(p, backward) + alignment;
  at::parallel_for(0, whole * pieces, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<char[]> memory(new char[bytes]());  // zeros
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    void* aligned = memory.get() + (alignment - address % alignment) % alignment;
    for (int64_t n = first; n < last; ++n) {
      const int64_t map = n / pieces / groups, group = n / pieces % groups, piece = n % pieces;
      const int64_t top = blocks(p) * piece / pieces * TABLE_ROWS;
      const int64_t end = blocks(p) * (piece + 1) / pieces * TABLE_ROWS;
      for (int64_t phase = all * group / groups; phase < all * (group + 1) / groups; ++phase) {
        const int64_t row = phase / across, height = at_phase(p, p.height, row);
        const Band band{map / p.heads, map % p.heads, row, phase % across, top, std::min(end, height), group};
        if (band.first < band.last) run(p, band, aligned);
      }
    }
  });
}

// ---- What is computed. ----

// Return the output and the log-sum-exp, in units of log 2.
inline std::tuple<Tensor, Tensor> forward(const Tensor& query, const OptionalTensor& key,
                                          const Tensor& value, const OptionalTensor& rel_row,
                                          const OptionalTensor& rel_col, const Options& options) {
  const Tensor output = empty_output(query);
  const Tensor logsumexp =
      at::empty({query.size(0), options.num_heads, query.size(2), query.size(3)},
                query.options().dtype(compute_type(query)));
  const OptionalTensor row = as_table(rel_row, query), col = as_table(rel_col, query);
  auto p = describe(query, key, value, row, col, logsumexp, options);
  p.output = as_map(output);
  run_bands(p, 1, false, kernels().forward);
  return {output, logsumexp};
}

// Add up the partial gradients of the positions, in double, for one head or for all that share them. Such few
// numbers take ATen's operators as long as a small map takes the kernels.
template <typename T>
void add_up(const Problem& p, T* row, T* col) {
  const int64_t count = p.depth * p.kernel_size, parts = table_groups(p) * blocks(p);
  std::vector<double> sums(count);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t image = 0; image < p.batch; ++image) {
      const T* part = static_cast<const T*>(p.table_grads) + (image * p.heads + head) * parts * count;
      for (int64_t m = 0; m < parts; ++m, part += count)
        for (int64_t n = 0; n < count; ++n) sums[n] += part[n];
    }
    if (!p.rel_head && head + 1 < p.heads) continue;
    std::copy_n(sums.begin(), count / 2, row + head * p.rel_head);
    std::copy_n(sums.begin() + count / 2, count / 2, col + head * p.rel_head);
    std::fill(sums.begin(), sums.end(), 0);
  }
}

// Write the gradients of the maps where they are wanted, and return those of the positions.
inline std::tuple<OptionalTensor, OptionalTensor> backward(
    const Tensor& grad, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& logsumexp,
    const Tensor& grad_query, const OptionalTensor& grad_key, const Tensor& grad_value,
    const Options& options) {
  const OptionalTensor row = as_table(rel_row, query), col = as_table(rel_col, query);
  auto p = describe(query, key, value, row, col, logsumexp, options);
  p.grad = as_map(grad);
  p.grad_query = as_map(grad_query);
  if (grad_key) p.grad_key = as_map(*grad_key);
  p.grad_value = as_map(grad_value);
  Tensor tables;
  if (row) {
    // Partial sums, so that threads share none and the order is fixed.
    tables = at::zeros({p.batch, p.heads, table_groups(p), blocks(p), p.depth, p.kernel_size}, row->options());
    p.table_grads = tables.data_ptr();
  }
  run_bands(p, 2, true, kernels().backward);
  if (!row) return {OptionalTensor(), OptionalTensor()};
  const Tensor grad_row = at::empty(rel_row->sizes(), row->options());
  const Tensor grad_col = at::empty(rel_col->sizes(), col->options());
  if (row->scalar_type() == at::kDouble) add_up(p, grad_row.data_ptr<double>(), grad_col.data_ptr<double>());
  else add_up(p, grad_row.data_ptr<float>(), grad_col.data_ptr<float>());
  return {grad_row.to(rel_row->scalar_type()), grad_col.to(rel_col->scalar_type())};
}

}  // namespace sasa
