// The op's implementations for torch's dispatcher, on the CPU and on CUDA, and what native_library.py calls. The
// dispatcher calls these without Python, which takes about as long as the kernels on a small map. Nothing here is
// from Python's own interface: one library serves every version of Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "gpu.h"
#include "launch.h"
#include "projected_attention.h"

namespace {

using at::Tensor;
using sasa::OptionalTensor;
// std::string_view, or c10::string_view in torch < 2.5.
using StringView = decltype(std::declval<const c10::IValue&>().toStringView());

// Parameters as in the schemas of torch_library.py, and THE_ arguments of the same names.
#define INPUTS                                                                            \
  const Tensor &query, const OptionalTensor &key, const Tensor &value,                    \
      const OptionalTensor &rel_row, const OptionalTensor &rel_col
#define THE_INPUTS query, key, value, rel_row, rel_col
#define GRAD_MAPS \
  const Tensor &grad_query, const OptionalTensor &grad_key, const Tensor &grad_value
#define THE_GRAD_MAPS grad_query, grad_key, grad_value
#define OPTIONS(String) \
  int64_t kernel_size, int64_t num_heads, int64_t dilation, String border, double scale
#define THE_OPTIONS \
  sasa::Options { kernel_size, num_heads, dilation, border == "mask", scale, stride }
#define THE_ARGUMENTS kernel_size, num_heads, dilation, border, scale
#define CHOICE StringView backend, int64_t stride
#define THE_CHOICE backend, stride

// Says whether 'auto' must go through Python, which logs the chosen backend.
bool (*logs_choices)() = nullptr;

// Call the implementation that torch_library.py registers for every device or every autograd key. It records
// gradients, calls other backends, and raises errors or logs a choice. `key` is one that has no other.
template <typename Function, typename... Arguments>
auto in_python(const char* name, c10::DispatchKey key, const Arguments&... arguments) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<Function>()
      .redispatch(c10::DispatchKeySet(key), arguments...);
}

bool same_type_and_device(const OptionalTensor& x, const Tensor& query) {
  return !x || (x->scalar_type() == query.scalar_type() && x->device() == query.device());
}

// Whether a tensor may be the gradient of another.
bool is_gradient(const OptionalTensor& x, const OptionalTensor& of) {
  if (x.has_value() != of.has_value()) return false;
  return !x || (same_type_and_device(x, *of) && x->sizes() == of->sizes());
}

// Whether the kernels may read and write as the arguments say. The op is also called without Python's
// local_attention, as exported graphs do; Python then says what is wrong.
bool is_well_formed(INPUTS, OPTIONS(StringView), int64_t stride) {
  if (kernel_size < 1 || kernel_size % 2 == 0 || num_heads < 1 || dilation < 1 || stride < 1) return false;
  if ((border != "zeros" && border != "mask") || !std::isfinite(scale)) return false;
  if (query.dim() != 4) return false;
  const auto size = query.sizes();
  if (size[1] == 0 || size[1] % num_heads != 0 || size[2] == 0 || size[3] == 0) return false;
  if (value.dim() != 4 || value.size(0) != size[0] || value.size(1) != size[1]) return false;
  for (int64_t n = 2; n < 4; ++n)
    if (sasa::divide_up(value.size(n), stride) != size[n]) return false;
  if (key && key->sizes() != value.sizes()) return false;
  if (rel_row.has_value() != rel_col.has_value() || !(key || rel_row)) return false;
  if (!rel_row) return true;
  const auto table = rel_row->sizes();
  const int64_t depth = size[1] / num_heads;
  return rel_row->dim() == 3 && rel_col->sizes() == table && depth % 2 == 0 && table[1] == depth / 2 &&
         table[2] == kernel_size && (table[0] == 1 || table[0] == num_heads);
}

// Whether a tensor may be what the forward gave the backward.
bool is_logsumexp(const Tensor& x, const Tensor& query, int64_t num_heads) {
  const auto type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return x.scalar_type() == type && x.device() == query.device() && x.is_contiguous() && x.dim() == 4 &&
         x.size(0) == query.size(0) && x.size(1) == num_heads && x.size(2) == query.size(2) &&
         x.size(3) == query.size(3);
}

// Whether the CPU's kernels may, or those of a GPU, as far as types and options say.
bool may_compute(INPUTS, OPTIONS(StringView), CHOICE, StringView by) {
  if (kernel_size > sasa::LARGEST_KERNEL || !is_well_formed(THE_INPUTS, THE_ARGUMENTS, stride)) return false;
  if (!(same_type_and_device(key, query) && same_type_and_device(value, query) &&
        same_type_and_device(rel_row, query) && same_type_and_device(rel_col, query)))
    return false;
  if (backend == by) return true;
  return backend == "auto" && !logs_choices();
}

// Whether these kernels are to compute it, without an error or a log of the choice.
bool is_native(INPUTS, OPTIONS(StringView), CHOICE) {
  return query.is_cpu() && stride <= sasa::LARGEST_STRIDE &&
         may_compute(THE_INPUTS, THE_ARGUMENTS, THE_CHOICE, "native");
}

// The same for a GPU's, if they are loaded. Python refuses what does not fit, and is asked about what is empty or has
// a stride.
bool is_cuda(INPUTS, OPTIONS(StringView), CHOICE, bool backward) {
  if (stride != 1 || (query.is_cpu() && backend == "auto")) return false;
  if (!may_compute(THE_INPUTS, THE_ARGUMENTS, THE_CHOICE, "cuda")) return false;
  if (query.numel() == 0 || !(scale > 0) || !sasa::gpu::fits(query)) return false;
  const auto variant = sasa::gpu::Shape(query, query.size(1), THE_OPTIONS)
                           .variant(query.scalar_type(), key.has_value(), rel_row.has_value());
  const auto loaded = sasa::gpu::find(query.device(), variant, backend == "auto");
  return loaded && (!backward || loaded.has_backward());
}

std::tuple<Tensor, Tensor> op_forward(INPUTS, OPTIONS(StringView), CHOICE) {
  if (is_native(THE_INPUTS, THE_ARGUMENTS, THE_CHOICE)) return sasa::forward(THE_INPUTS, THE_OPTIONS);
  if (is_cuda(THE_INPUTS, THE_ARGUMENTS, THE_CHOICE, false)) return sasa::gpu::forward(THE_INPUTS, THE_OPTIONS);
  return in_python<decltype(op_forward)>("sasa_det::local_attention", c10::DispatchKey::Undefined,
                                         THE_INPUTS, THE_ARGUMENTS, THE_CHOICE);
}

// Whether a derivative with respect to x is wanted, in reverse or forward mode.
bool is_differentiated(const OptionalTensor& x) {
  return x && ((at::GradMode::is_enabled() && x->requires_grad()) || x->_fw_grad(0).defined());
}

std::tuple<Tensor, Tensor> op_autograd(INPUTS, OPTIONS(StringView), CHOICE) {
  if (is_differentiated(query) || is_differentiated(key) || is_differentiated(value) ||
      is_differentiated(rel_row) || is_differentiated(rel_col))
    return in_python<decltype(op_forward)>("sasa_det::local_attention", c10::DispatchKey::AutogradOther,
                                           THE_INPUTS, THE_ARGUMENTS, THE_CHOICE);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sasa_det::local_attention", "")
                             .typed<decltype(op_forward)>();
  const at::AutoDispatchBelowAutograd below;
  return op.call(THE_INPUTS, kernel_size, num_heads, dilation, border, scale, THE_CHOICE);
}

// A schema cannot say that a result is optional: an empty tensor stands for none.
Tensor or_empty(const OptionalTensor& x, const Tensor& query) {
  return x ? *x : at::empty({0}, query.options());
}

std::tuple<Tensor, Tensor> op_backward_into(const Tensor& grad, INPUTS, const Tensor& logsumexp,
                                            GRAD_MAPS, OPTIONS(StringView), CHOICE) {
  if (is_gradient(grad, query) && is_gradient(grad_query, query) && is_gradient(grad_key, key) &&
      is_gradient(grad_value, value) && is_logsumexp(logsumexp, query, num_heads)) {
    const auto backward = [&](auto* function) {
      const auto [row, col] = function(grad, THE_INPUTS, logsumexp, THE_GRAD_MAPS, THE_OPTIONS);
      return std::tuple(or_empty(row, query), or_empty(col, query));
    };
    if (is_native(THE_INPUTS, THE_ARGUMENTS, THE_CHOICE)) return backward(sasa::backward);
    if (is_cuda(THE_INPUTS, THE_ARGUMENTS, THE_CHOICE, true)) return backward(sasa::gpu::backward);
  }
  return in_python<decltype(op_backward_into)>(
      "sasa_det::local_attention_backward_into", c10::DispatchKey::Undefined, grad, THE_INPUTS,
      logsumexp, THE_GRAD_MAPS, THE_ARGUMENTS, THE_CHOICE);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> op_backward(const Tensor& grad, INPUTS,
                                                               const Tensor& logsumexp,
                                                               OPTIONS(StringView), CHOICE) {
  const Tensor grad_query = sasa::empty_output(query), grad_value = sasa::empty_output(value);
  const OptionalTensor grad_key = key ? OptionalTensor(sasa::empty_output(*key)) : key;
  const auto [row, col] = op_backward_into(grad, THE_INPUTS, logsumexp, THE_GRAD_MAPS, kernel_size,
                                           num_heads, dilation, border, scale, THE_CHOICE);
  return {grad_query, or_empty(grad_key, query), grad_value, row, col};
}

// The layer's forward, as ../project.py calls it: by strips where that is faster, else one operator after the
// other. Returns O and the log-sum-exp. The weight has the rows of the query, of the key if there is one, and of
// the value.
std::tuple<Tensor, Tensor> attend(const Tensor& map, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& rel_row, const OptionalTensor& rel_col, bool has_key,
                                  OPTIONS(StringView), CHOICE) {
  sasa::check_projection(map, weight, bias);
  const int64_t maps = has_key ? 3 : 2, outputs = weight.size(0) / maps;
  TORCH_CHECK(outputs * maps == weight.size(0), "the weight's rows are not those of ", maps, " projections");
  const Tensor x = map.contiguous(sasa::layout(map)), queries = sasa::strided(x, stride);
  const int64_t parts = sasa::image_parts(x.size(0), x.size(2), kernel_size, stride);
  if (parts && dilation == 1 && x.size(1)) {
    const Tensor output = sasa::empty_map(queries, outputs);
    // Of the shape of the keys and values; there are none yet.
    const Tensor value = x.narrow(1, 0, 1).expand({x.size(0), outputs, x.size(2), x.size(3)});
    const OptionalTensor key = has_key ? OptionalTensor(value) : OptionalTensor();
    if (is_native(output, key, value, rel_row, rel_col, THE_ARGUMENTS, THE_CHOICE))
      return sasa::attend_projected(x, queries, weight, bias, key, value, rel_row, rel_col, output, THE_OPTIONS, parts);
  }
  // With a stride, queries are projections of fewer pixels.
  const int64_t apart = stride > 1 ? outputs : 0, others = weight.size(0) - apart;
  const auto project = [&](const Tensor& of, int64_t first, int64_t count) {
    return sasa::project(of, weight.narrow(0, first, count), bias ? OptionalTensor(bias->narrow(0, first, count)) : bias);
  };
  const Tensor y = project(x, apart, others), query = apart ? project(queries, 0, apart) : y.narrow(1, 0, outputs);
  const auto last = [&](int64_t n) { return y.narrow(1, others - n * outputs, outputs); };
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sasa_det::local_attention", "")
                             .typed<decltype(op_forward)>();
  return op.call(query, has_key ? OptionalTensor(last(2)) : OptionalTensor(), last(1), rel_row, rel_col, THE_ARGUMENTS,
                 THE_CHOICE);
}

// ---- As backends/native.py calls the kernels: with arguments that were checked. ----

std::tuple<Tensor, Tensor> forward(INPUTS, OPTIONS(StringView), int64_t stride) {
  return sasa::forward(THE_INPUTS, THE_OPTIONS);
}

std::tuple<OptionalTensor, OptionalTensor> backward(const Tensor& grad, INPUTS, const Tensor& logsumexp,
                                                    GRAD_MAPS, OPTIONS(StringView), int64_t stride) {
  return sasa::backward(grad, THE_INPUTS, logsumexp, THE_GRAD_MAPS, THE_OPTIONS);
}

#define INPUTS_SCHEMA "Tensor query, Tensor? key, Tensor value, Tensor? rel_row, Tensor? rel_col"
#define OPTIONS_SCHEMA "int kernel_size, int num_heads, int dilation, str border, float scale"
#define STRIDE_SCHEMA ", int stride=1"

TORCH_LIBRARY(sasa_det_native, library) {
  library.def("forward(" INPUTS_SCHEMA ", " OPTIONS_SCHEMA STRIDE_SCHEMA ") -> (Tensor, Tensor)", &forward);
  library.def("backward(Tensor grad, " INPUTS_SCHEMA
              ", Tensor logsumexp, Tensor(a!) grad_query, Tensor(b!)? grad_key, Tensor(c!) grad_value, "
              OPTIONS_SCHEMA STRIDE_SCHEMA ") -> (Tensor?, Tensor?)",
              &backward);
  // As ../project.py calls them. Counters of FLOPs see them, as they have kernels for a device.
  const auto cpu = c10::DispatchKey::CPU;
  library.def("project(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.impl("project", torch::dispatch(cpu, &sasa::project));
  library.def("attend(Tensor x, Tensor weight, Tensor? bias, Tensor? rel_row, Tensor? rel_col, bool has_key, "
              OPTIONS_SCHEMA ", str backend" STRIDE_SCHEMA ") -> (Tensor, Tensor)");
  library.impl("attend", torch::dispatch(cpu, &attend));
  library.def("project_back(Tensor grad, Tensor weight) -> Tensor");
  library.impl("project_back", torch::dispatch(cpu, &sasa::project_back));
  library.def("weight_gradient(Tensor grad, Tensor x) -> Tensor");
  library.impl("weight_gradient", torch::dispatch(cpu, &sasa::weight_gradient));
}

}  // namespace

extern "C" {

int64_t sasa_largest_kernel() { return sasa::LARGEST_KERNEL; }

int64_t sasa_largest_stride() { return sasa::LARGEST_STRIDE; }

int64_t sasa_huge_from() { return sasa::HUGE_FROM; }

// Register the op's implementations: these kernels where they can compute it, else the op in Python.
void sasa_take_over(bool (*python_logs_choices)()) {
  logs_choices = python_logs_choices;
  static torch::Library library(torch::Library::IMPL, "sasa_det", {}, __FILE__, __LINE__);
  static bool done = false;
  if (done) return;
  done = true;
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
    library.impl("local_attention", torch::dispatch(key, &op_forward));
    library.impl("local_attention_backward", torch::dispatch(key, &op_backward));
    library.impl("local_attention_backward_into", torch::dispatch(key, &op_backward_into));
  }
  for (const auto key : {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA})
    library.impl("local_attention", torch::dispatch(key, &op_autograd));
}

void sasa_ask_for_huge_pages(void* data, size_t bytes) { sasa::ask_for_huge_pages(data, bytes); }

// How many threads share the work; one if this was built without OpenMP.
int64_t sasa_threads() {
  std::atomic<int64_t> count{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++count; });
  return count;
}

const char* sasa_capability() { return sasa::kernels().capability; }

}  // extern "C"
