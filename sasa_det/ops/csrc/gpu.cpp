// gpu.h says what this is.
//
// It is compiled for size: it runs once per layer, and a wheel has it once for each version of torch.
#pragma GCC optimize("Os")
#include "gpu.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>

namespace sasa::gpu {

namespace {

// ---- The driver: functions of libcuda, and one of torch's CUDA library, in the order in which Python passes them.

struct Driver {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                void* stream, void** arguments, void** extra);
  int (*get_context)(void** context);
  int (*set_context)(void* context);
  int (*error_string)(int status, const char** text);
  int (*is_capturing)(void* stream, int* status);
  // CUDAStream::stream(): a CUDAStream is a c10::Stream and nothing else. Its number alone is no handle.
  void* (*handle)(const c10::Stream* stream);
};
Driver driver;

void check(int status, const char* call, const char* what) {
  if (status == 0) return;
  const char* text = nullptr;
  driver.error_string(status, &text);
  TORCH_CHECK(false, "local_attention: the GPU's driver refuses the kernel ", what, " (", call, "): ",
              text ? text : "unknown error", ", status ", status);
}

void* current_stream(c10::Device device) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  return driver.handle(&stream);
}

c10::Device device_of(int type, int index) {
  return {static_cast<c10::DeviceType>(type), static_cast<c10::DeviceIndex>(index)};
}

// ---- The registry. A network has a few variants, so it is searched from end to end.

std::mutex mutex;
std::vector<Loaded> registry;

bool equal(const Variant& a, const Variant& b) {
  return a.bfloat16 == b.bfloat16 && a.depth == b.depth && a.window == b.window && a.masked == b.masked &&
         a.dilated == b.dilated && a.has_key == b.has_key && a.has_rel == b.has_rel;
}

Loaded* look_up(c10::Device device, const Variant& variant) {
  for (Loaded& each : registry)
    if (each.device == device && equal(each.variant, variant)) return &each;
  return nullptr;
}

// ---- Launches; cuda_launches.py has the same numbers.

constexpr int64_t ROWS = 8, COLS = 16, WANTED_BLOCKS = 2048, LEAST_LENGTH = 2;
constexpr unsigned THREADS = 256;
constexpr double LOG2_E = 1.4426950408889634;
const char* const NAMES[KERNELS] = {"forward", "backward_queries", "backward_keys"};

int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

struct Cut {
  int64_t across, pieces, length;
  int64_t blocks;  // of one head of one image
};

Cut cut(const Shape& s) {
  const int64_t phases = std::min(s.dilation, s.height) * std::min(s.dilation, s.width);
  const int64_t chunks = divide_up(divide_up(s.height, s.dilation), ROWS);
  const int64_t across = divide_up(divide_up(s.width, s.dilation), COLS);
  const int64_t strips = s.batch * s.heads * phases * across;
  const int64_t wanted_pieces = divide_up(WANTED_BLOCKS, std::max<int64_t>(strips, 1));
  const int64_t length = std::max(divide_up(chunks, wanted_pieces), std::min(LEAST_LENGTH, chunks));
  const int64_t pieces = divide_up(chunks, length);
  return {across, pieces, length, phases * across * pieces};
}

void fill_in(Arguments& a, const Shape& s, const Tables& tables, const Tensor& lse) {
  const Cut pieces = cut(s);
  const double factor = s.options.scale * LOG2_E;
  a.height = s.height, a.width = s.width, a.heads = s.heads, a.dilation = s.dilation;
  a.across = pieces.across, a.pieces = pieces.pieces, a.length = pieces.length;
  a.table_stride = tables.heads > 1 ? s.depth / 2 * s.options.kernel_size : 0;
  a.scale = s.options.scale, a.factor = factor, a.inverse = 1 / factor;
  a.rel_row = static_cast<const uint16_t*>(tables.row), a.rel_col = static_cast<const uint16_t*>(tables.col);
  a.lse = static_cast<float*>(lse.data_ptr());
}

void launch(const Loaded& loaded, Kernel kernel, const Shape& s, Arguments& arguments) {
  const char* name = NAMES[kernel];
  void* parameters[] = {&arguments};
  // A thread of autograd may have no context yet, or that of another GPU.
  void* context = nullptr;
  check(driver.get_context(&context), "cuCtxGetCurrent", name);
  if (context != loaded.context) check(driver.set_context(loaded.context), "cuCtxSetCurrent", name);
  const int status = driver.launch(loaded.functions[kernel], s.batch * s.heads * cut(s).blocks, 1, 1, THREADS,
                                   1, 1, loaded.shared[kernel], current_stream(loaded.device), parameters, nullptr);
  if (context != loaded.context) driver.set_context(context);
  check(status, "cuLaunchKernel", name);
}

// The stride of a dimension; zero for one of a single element, whose stride may be anything.
int64_t stride(const Tensor& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

bool lie_alike(const Tensor& x, const Tensor& y) {
  return stride(x, 0) == stride(y, 0) && stride(x, 2) == stride(y, 2) && stride(x, 3) == stride(y, 3);
}

// Room for a map, and for a second that the kernels want to lie as it does: themselves where they fit, else new maps.
struct Pair {
  OptionalTensor first;
  Tensor second;

  Pair(const OptionalTensor& x, const Tensor& y) : first(x), second(y) {
    if (fits(y) && (!x || (fits(*x) && lie_alike(*x, y)))) return;
    second = allocate(y, y.sizes(), y.scalar_type(), at::MemoryFormat::ChannelsLast);
    if (x) first = allocate(*x, x->sizes(), x->scalar_type(), at::MemoryFormat::ChannelsLast);
  }
};

void copy_if_other(const Tensor& to, const Tensor& from) {
  if (!to.is_same(from)) to.copy_(from);
}

Pair laid_out(const OptionalTensor& x, const Tensor& y) {
  Pair pair(x, y);
  copy_if_other(pair.second, y);
  if (x) copy_if_other(*pair.first, *x);
  return pair;
}

// Contiguous tables, and where they are.
struct ContiguousTables {
  OptionalTensor row, col;

  ContiguousTables(const OptionalTensor& rel_row, const OptionalTensor& rel_col) {
    if (rel_row) row = rel_row->contiguous(), col = rel_col->contiguous();
  }
  Tables get() const {
    return row ? Tables{row->data_ptr(), col->data_ptr(), row->size(0)} : Tables{};
  }
};

Loaded find_or_fail(const Tensor& query, const Variant& variant) {
  const Loaded loaded = find(query.device(), variant, false);
  TORCH_CHECK(loaded, "local_attention: the CUDA kernels for this input are not loaded");
  return loaded;
}

}  // namespace

// ---- What gpu.h declares.

Shape::Shape(const Tensor& map, int64_t channels, const Options& options)
    : batch(map.size(0)), heads(options.num_heads), depth(channels / options.num_heads), height(map.size(2)),
      width(map.size(3)), dilation(std::min(options.dilation, std::max(height, width))), options(options) {}

Variant Shape::variant(at::ScalarType type, bool has_key, bool has_rel) const {
  return {type == at::kBFloat16, int(depth),    int(options.kernel_size), options.mask,
          dilation > 1,          has_key,       has_rel};
}

Loaded find(c10::Device device, const Variant& variant, bool trusted_only) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Loaded* found = look_up(device, variant);
  if (!found || (trusted_only && !found->trusted)) return {device, variant};
  return *found;
}

bool fits(const Tensor& x) {
  const int64_t row = stride(x, 2), col = stride(x, 3);
  if (x.stride(1) != 1 || reinterpret_cast<uintptr_t>(x.data_ptr()) % 16) return false;
  if ((stride(x, 0) | row | col) % 8) return false;
  return (x.size(2) - 1) * row + (x.size(3) - 1) * col + x.size(1) < ADDRESSABLE;
}

Map map_of(const Tensor& x, int64_t first_channel) {
  return {static_cast<uint16_t*>(x.data_ptr()) + first_channel, stride(x, 0), int(stride(x, 2)),
          int(stride(x, 3))};
}

Tensor allocate(const Tensor& like, at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  auto* const allocator = like.storage().unsafeGetStorageImpl()->allocator();
  // Memory that came from elsewhere has none.
  if (!allocator) return at::empty(sizes, like.options().dtype(type), format);
  const c10::OptionalDeviceGuard guard(like.device());
  const auto key = like.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  Tensor x = at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(key), type, format);
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
    x.fill_(NAN);
  return x;
}

Tensor view(const Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t first) {
  Tensor y = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(x.storage()),
                                                      x.key_set(), x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, x.storage_offset() + first);
  return y;
}

Tensor view(const Tensor& x, at::IntArrayRef sizes, int64_t first) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return view(x, sizes, strides, first);
}

void attend(const Loaded& loaded, const Shape& shape, const Tables& tables, Arguments arguments,
            const Tensor& lse) {
  fill_in(arguments, shape, tables, lse);
  launch(loaded, FORWARD, shape, arguments);
}

Tensor attend_backward(const Loaded& loaded, const Shape& s, const Tables& tables, Arguments arguments,
                       const Tensor& lse) {
  fill_in(arguments, s, tables, lse);
  const Tensor delta = allocate(lse, lse.sizes(), at::kFloat);
  arguments.delta = static_cast<float*>(delta.data_ptr());
  const int64_t half = s.depth / 2, k = s.options.kernel_size;
  Tensor partials;
  if (tables.row) {
    partials = allocate(lse, {s.batch, s.heads, cut(s).blocks, 2, half, k}, at::kFloat);
    arguments.partials = static_cast<float*>(partials.data_ptr());
  }
  launch(loaded, BACKWARD_QUERIES, s, arguments);
  launch(loaded, BACKWARD_KEYS, s, arguments);
  if (!tables.row) return {};
  Tensor sums = allocate(lse, {2, tables.heads, half, k}, at::kFloat);
  if (tables.heads == 1) {
    Tensor to = view(sums, {2, half, k});
    at::sum_out(to, partials, at::IntArrayRef{0, 1, 2});
  } else {
    // Written to where each table's gradient is contiguous.
    Tensor to = view(sums, {tables.heads, 2, half, k}, {half * k, tables.heads * half * k, k, 1});
    at::sum_out(to, partials, at::IntArrayRef{0, 2});
  }
  return sums;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const OptionalTensor& key, const Tensor& value,
                                   const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                   const Options& options) {
  const Shape shape(query, query.size(1), options);
  const auto loaded =
      find_or_fail(query, shape.variant(query.scalar_type(), key.has_value(), rel_row.has_value()));
  const Tensor output = empty_output(query);
  const Tensor lse = allocate(query, {shape.batch, shape.heads, shape.height, shape.width}, at::kFloat);
  const Pair from = laid_out({}, query), pair = laid_out(key, value), to({}, output);
  const ContiguousTables tables(rel_row, rel_col);
  Arguments a{};
  a.query = map_of(from.second), a.value = map_of(pair.second), a.output = map_of(to.second);
  a.key = pair.first ? map_of(*pair.first) : a.value;
  attend(loaded, shape, tables.get(), a, lse);
  copy_if_other(output, to.second);
  return {output, lse};
}

std::tuple<OptionalTensor, OptionalTensor> backward(
    const Tensor& grad, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& logsumexp,
    const Tensor& grad_query, const OptionalTensor& grad_key, const Tensor& grad_value, const Options& options) {
  const Shape shape(query, query.size(1), options);
  const auto loaded =
      find_or_fail(query, shape.variant(query.scalar_type(), key.has_value(), rel_row.has_value()));
  TORCH_CHECK(loaded.has_backward(), "local_attention: the CUDA kernels of this backward are not loaded");
  const Pair from = laid_out({}, query), pair = laid_out(key, value), grads = laid_out({}, grad);
  const Pair to({}, grad_query), to_pair(grad_key, grad_value);
  const ContiguousTables tables(rel_row, rel_col);
  Arguments a{};
  a.query = map_of(from.second), a.value = map_of(pair.second), a.grad = map_of(grads.second);
  a.key = pair.first ? map_of(*pair.first) : a.value;
  a.grad_query = map_of(to.second), a.grad_value = map_of(to_pair.second);
  a.grad_key = to_pair.first ? map_of(*to_pair.first) : a.grad_value;
  const Tensor sums = attend_backward(loaded, shape, tables.get(), a, logsumexp);
  copy_if_other(grad_query, to.second);
  if (grad_key) copy_if_other(*grad_key, *to_pair.first);
  copy_if_other(grad_value, to_pair.second);
  if (!rel_row) return {OptionalTensor(), OptionalTensor()};
  const Tensor cast = sums.to(rel_row->scalar_type());
  return {view(cast, rel_row->sizes()), view(cast, rel_col->sizes(), rel_row->numel())};
}

bool is_capturing(c10::Device device) {
  int status = 0;
  check(driver.is_capturing(current_stream(device), &status), "cuStreamIsCapturing", "forward");
  return status != 0;
}

}  // namespace sasa::gpu

// ---- What native_library.py calls. A device is given by the number of its type and its index.

extern "C" {

using sasa::gpu::Variant;

void sasa_cuda_connect(const void* const* functions) {
  static_assert(sizeof(sasa::gpu::driver) == 6 * sizeof(void*));
  std::memcpy(&sasa::gpu::driver, functions, sizeof(sasa::gpu::driver));
}

// The handle of a GPU's current stream.
void* sasa_cuda_stream(int type, int index) {
  return sasa::gpu::current_stream(sasa::gpu::device_of(type, index));
}

void sasa_cuda_register(int type, int index, const Variant* variant, int kernel, void* function,
                        unsigned shared, void* context) {
  using namespace sasa::gpu;
  const std::lock_guard<std::mutex> lock(mutex);
  const c10::Device device = device_of(type, index);
  if (!look_up(device, *variant)) registry.push_back({device, *variant, context});
  Loaded* loaded = look_up(device, *variant);
  loaded->functions[kernel] = function;
  loaded->shared[kernel] = shared;
}

// Let 'auto' take a variant on a GPU.
void sasa_cuda_trust(int type, int index, const Variant* variant) {
  using namespace sasa::gpu;
  const std::lock_guard<std::mutex> lock(mutex);
  Loaded* loaded = look_up(device_of(type, index), *variant);
  if (loaded) loaded->trusted = true;
}

// For tests, which register others.
void sasa_cuda_forget() {
  const std::lock_guard<std::mutex> lock(sasa::gpu::mutex);
  sasa::gpu::registry.clear();
}

}  // extern "C"
