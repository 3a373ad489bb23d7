// Tensors in, bands of rows out to torch's threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const sasa::Kernels& kernels() {
  // torch's own choice, which ATEN_CPU_CAPABILITY lowers.
  static const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__)
  if (capability == "AVX512") return sasa::kernels_avx512();
  if (capability == "AVX2") return sasa::kernels_avx2();
#endif
  return sasa::kernels_default();
}

sasa::Map as_map(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

sasa::Problem describe(const Tensor& query, const OptionalTensor& key, const Tensor& value,
                       const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                       const Tensor& logsumexp, int64_t kernel_size, int64_t num_heads,
                       int64_t dilation, bool mask, double scale) {
  sasa::Problem p{};
  p.batch = query.size(0);
  p.heads = num_heads;
  p.depth = query.size(1) / num_heads;
  p.height = query.size(2);
  p.width = query.size(3);
  p.kernel_size = kernel_size;
  p.dilation = dilation;
  p.mask = mask;
  p.scale = scale;
  switch (query.scalar_type()) {
    case at::kFloat: p.type = sasa::Type::Float; break;
    case at::kDouble: p.type = sasa::Type::Double; break;
    case at::kBFloat16: p.type = sasa::Type::BFloat16; break;
    case at::kHalf: p.type = sasa::Type::Half; break;
    default: TORCH_CHECK(false, "no kernels for ", query.scalar_type());
  }
  p.query = as_map(query);
  if (key) p.key = as_map(*key);
  p.value = as_map(value);
  p.logsumexp = logsumexp.data_ptr();
  if (rel_row) {
    p.rel_row = rel_row->data_ptr();
    p.rel_col = rel_col->data_ptr();
    p.rel_head = rel_row->size(0) == 1 ? 0 : p.depth / 2 * kernel_size;
  }
  return p;
}

// Enough bands to keep every thread busy, of no fewer than `least` blocks of TABLE_ROWS rows, since
// neighbouring bands pack (and in the backward recompute) a radius of the same rows. The result does
// not depend on it.
std::vector<sasa::Band> cut(const sasa::Problem& p, int64_t least) {
  constexpr int64_t block = sasa::TABLE_ROWS;
  std::vector<sasa::Band> bands;
  const int64_t maps = p.batch * p.heads * p.dilation * p.dilation;
  if (maps == 0) return bands;
  const int64_t wanted = (4 * at::get_num_threads() + maps - 1) / maps;
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t head = 0; head < p.heads; ++head)
      for (int64_t row = 0; row < std::min(p.dilation, p.height); ++row)
        for (int64_t col = 0; col < std::min(p.dilation, p.width); ++col) {
          const int64_t height = (p.height - row + p.dilation - 1) / p.dilation;
          const int64_t blocks = (height + block - 1) / block;
          const int64_t count = std::max<int64_t>(1, std::min(wanted, blocks / least));
          for (int64_t n = 0; n < count; ++n)
            bands.push_back({image, head, row, col, blocks * n / count * block,
                             std::min(height, blocks * (n + 1) / count * block)});
        }
  return bands;
}

template <typename Run>
void run_bands(const sasa::Problem& p, const std::vector<sasa::Band>& bands, bool backward,
               const Run& run) {
  constexpr int64_t alignment = 64;
  const int64_t bytes = kernels().scratch(p, backward) + alignment;
  at::parallel_for(0, bands.size(), 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<char[]> memory(new char[bytes]());  // zeros
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    void* aligned = memory.get() + (alignment - address % alignment) % alignment;
    for (int64_t n = first; n < last; ++n) run(p, bands[n], aligned);
  });
}

void forward(const Tensor& query, const OptionalTensor& key, const Tensor& value,
             const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& output,
             const Tensor& logsumexp, int64_t kernel_size, int64_t num_heads, int64_t dilation,
             bool mask, double scale) {
  auto p = describe(query, key, value, rel_row, rel_col, logsumexp, kernel_size, num_heads,
                    dilation, mask, scale);
  p.output = as_map(output);
  run_bands(p, cut(p, 1), false, kernels().forward);
}

void backward(const Tensor& grad, const Tensor& query, const OptionalTensor& key,
              const Tensor& value, const OptionalTensor& rel_row, const OptionalTensor& rel_col,
              const Tensor& logsumexp, const Tensor& grad_query,
              const OptionalTensor& grad_key, const Tensor& grad_value,
              const OptionalTensor& table_grads, int64_t kernel_size, int64_t num_heads,
              int64_t dilation, bool mask, double scale) {
  auto p = describe(query, key, value, rel_row, rel_col, logsumexp, kernel_size, num_heads,
                    dilation, mask, scale);
  p.grad = as_map(grad);
  p.grad_query = as_map(grad_query);
  if (grad_key) p.grad_key = as_map(*grad_key);
  p.grad_value = as_map(grad_value);
  if (table_grads) p.table_grads = table_grads->data_ptr();
  run_bands(p, cut(p, 2), true, kernels().backward);
}

// How many threads share the work: one where this was built without OpenMP.
int64_t threads() {
  std::atomic<int64_t> count{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++count; });
  return count;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("backward", &backward, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.attr("TABLE_ROWS") = sasa::TABLE_ROWS;
  m.def("threads", &threads);
  m.def("capability", [] { return std::string(kernels().capability); });
}
