// From tensors to bands, which torch's threads share, and back to tensors.
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
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bands.h"

namespace sasa {

using at::Tensor;
// std::optional, or c10::optional in torch < 2.5.
using OptionalTensor = decltype(std::declval<const c10::IValue&>().toOptional<Tensor>());

// The arguments that are no tensors, as local_attention.py documents them.
struct Options {
  int64_t kernel_size, num_heads, dilation;
  bool mask;
  double scale;
  int64_t stride = 1;
};

inline const Kernels& kernels() {
  // What torch found the CPU to have, unless the environment's ATEN_CPU_CAPABILITY says less.
  static const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__)
  if (capability == "AVX512") return kernels_avx512();
  if (capability == "AVX2") return kernels_avx2();
#endif
  return kernels_default();
}

// ---- Results. ----

// Bytes of a huge page on x86 and on most arm64 kernels.
constexpr size_t HUGE_PAGE = size_t(1) << 21;
// Less than two mostly comes from memory that was used before, and has its pages already.
constexpr size_t HUGE_FROM = 2 * HUGE_PAGE;

// Ask Linux for huge pages for memory that nothing was written to yet; huge_pages.py says why.
inline void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t last = (begin + bytes) / HUGE_PAGE * HUGE_PAGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// As empty_output in window.py, which says why.
inline Tensor empty_output(const Tensor& like) {
  const bool last = !like.is_contiguous() && like.stride(1) == 1 && like.size(2) * like.size(3) != 1;
  Tensor output = at::empty_like(
      like, like.options(), last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (output.is_cpu() && output.nbytes() >= HUGE_FROM) ask_for_huge_pages(output.data_ptr(), output.nbytes());
  return output;
}

// The type of the softmax and of all sums.
inline at::ScalarType compute_type(const Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline OptionalTensor as_table(const OptionalTensor& x, const Tensor& query) {
  if (!x) return x;
  return x->to(compute_type(query)).contiguous();
}

// ---- The problem. ----

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
  set_sizes(p, value.size(2), value.size(3), options.stride, options.dilation);
  p.kernel_size = options.kernel_size;
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
  p.lse = logsumexp.data_ptr();
  if (rel_row) {
    TORCH_CHECK(rel_row->sizes() == rel_col->sizes(), "rel_row is ", rel_row->sizes(), ", rel_col ",
                rel_col->sizes());
    p.rel_row = rel_row->data_ptr();
    p.rel_col = rel_col->data_ptr();
    p.rel_head = rel_row->size(0) == 1 ? 0 : p.depth / 2 * p.kernel_size;
  }
  return p;
}

// Share the bands among torch's threads.
template <typename Run>
void run_on_threads(const Problem& p, int64_t min_blocks, bool backward, const Run& run) {
  const auto share = [](int64_t tasks, const auto& range) { at::parallel_for(0, tasks, 1, range); };
  run_bands(p, min_blocks, kernels().scratch(p, backward), at::get_num_threads(), share, run);
}

// ---- Forward and backward. ----

// Return O and the log-sum-exp in units of log 2.
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
  run_on_threads(p, 1, false, kernels().forward);
  return {output, logsumexp};
}

// Sum the partials of the tables' gradients in double, for each head or for all that share a table. On so few
// numbers ATen's operators would take as long as the kernels on a small map.
template <typename T>
void sum_partials(const Problem& p, T* row, T* col) {
  const int64_t count = p.depth * p.kernel_size, block_sums = table_partials(p) * blocks(p);
  std::vector<double> sums(count);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t image = 0; image < p.batch; ++image) {
      const T* block_sum = static_cast<const T*>(p.dtables) + (image * p.heads + head) * block_sums * count;
      for (int64_t m = 0; m < block_sums; ++m, block_sum += count)
        for (int64_t n = 0; n < count; ++n) sums[n] += block_sum[n];
    }
    if (!p.rel_head && head + 1 < p.heads) continue;
    std::copy_n(sums.begin(), count / 2, row + head * p.rel_head);
    std::copy_n(sums.begin() + count / 2, count / 2, col + head * p.rel_head);
    std::fill(sums.begin(), sums.end(), 0);
  }
}

// Write dQ, dK and dV into the given maps, and return the gradients of the tables.
inline std::tuple<OptionalTensor, OptionalTensor> backward(
    const Tensor& grad, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& logsumexp,
    const Tensor& grad_query, const OptionalTensor& grad_key, const Tensor& grad_value,
    const Options& options) {
  const OptionalTensor row = as_table(rel_row, query), col = as_table(rel_col, query);
  auto p = describe(query, key, value, row, col, logsumexp, options);
  p.doutput = as_map(grad);
  p.dquery = as_map(grad_query);
  if (grad_key) p.dkey = as_map(*grad_key);
  p.dvalue = as_map(grad_value);
  if (leaves_gaps(p)) {
    if (grad_key) grad_key->zero_();
    grad_value.zero_();
  }
  Tensor dtables;
  if (row) {
    // No two tasks add to the same block of a partial, and the order of all sums is fixed.
    const int64_t partials = table_partials(p);
    dtables = at::zeros({p.batch, p.heads, partials, blocks(p), p.depth, p.kernel_size}, row->options());
    p.dtables = dtables.data_ptr();
  }
  run_on_threads(p, 2, true, kernels().backward);
  if (!row) return {OptionalTensor(), OptionalTensor()};
  const Tensor grad_row = at::empty(rel_row->sizes(), row->options());
  const Tensor grad_col = at::empty(rel_col->sizes(), col->options());
  if (row->scalar_type() == at::kDouble)
    sum_partials(p, grad_row.data_ptr<double>(), grad_col.data_ptr<double>());
  else
    sum_partials(p, grad_row.data_ptr<float>(), grad_col.data_ptr<float>());
  return {grad_row.to(rel_row->scalar_type()), grad_col.to(rel_col->scalar_type())};
}

}  // namespace sasa
