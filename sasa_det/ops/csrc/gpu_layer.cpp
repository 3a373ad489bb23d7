// The layer on a GPU: projection and attention in one node of autograd, from the layer's tensors to the launches.
//
// Weights, biases and tables are packed into one tensor of the maps' type, of which all are views. Under autocast the
// pack lives as long as autocast keeps its own casts.
//
// It is compiled for size: it runs once per layer, and a wheel has it once for each version of torch.
#pragma GCC optimize("Os")
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <mutex>

#include "gpu.h"

namespace sasa::gpu {

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using StringView = decltype(std::declval<const c10::IValue&>().toStringView());
// std::shared_ptr, or c10::intrusive_ptr in newer versions of torch.
using NodePointer = decltype(torch::autograd::Edge::function);

// As a schema has it: queries, keys and values of so many channels, or two of them.
struct Projection {
  int64_t channels, parts;
  bool bias;
  int64_t tables;  // heads of the tables; 0 where there are none
};

// ---- The pack: weights, biases, rel_row and rel_col, one after the other.

Tensor flat(const Tensor& x) { return view(x, {x.numel()}); }

std::vector<Tensor> pieces_of(at::TensorList weights, const std::vector<OptionalTensor>& biases,
                              const OptionalTensor& rel_row, const OptionalTensor& rel_col) {
  std::vector<Tensor> pieces;
  for (const Tensor& weight : weights) pieces.push_back(flat(weight));
  bool any = false;
  for (const auto& bias : biases) any |= bias.has_value();
  for (const auto& bias : biases)
    if (any) pieces.push_back(bias ? *bias : at::zeros({weights[0].size(0)}, weights[0].options()));
  if (rel_row) pieces.push_back(flat(*rel_row)), pieces.push_back(flat(*rel_col));
  return pieces;
}

struct Views {
  Tensor weight;       // of a 1x1 convolution
  OptionalTensor bias;
  Tables tables;

  Views(const Tensor& pack, const Projection& p, const Shape& s, int64_t in_channels) {
    const int64_t rows = p.parts * p.channels;
    weight = view(pack, {rows, in_channels, 1, 1});
    int64_t at = rows * in_channels;
    if (p.bias) bias = view(pack, {rows}, at), at += rows;
    const auto* const data = static_cast<const uint16_t*>(pack.data_ptr());
    const int64_t table = p.tables * (s.depth / 2) * s.options.kernel_size;
    if (p.tables) tables = {data + at, data + at + table, p.tables};
  }
};

// ---- Packs that autocast's region has already.

// A tensor as it was when it was packed. Holding on to the object keeps another from its address.
struct Seen {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  const void* data;
  uint32_t version;

  explicit Seen(const Tensor& x)
      : tensor(x.getIntrusivePtr()), data(x.data_ptr()), version(x._version()) {}
  bool is(const Tensor& x) const {
    return tensor._unsafe_get_target() == x.unsafeGetTensorImpl() && data == x.data_ptr() &&
           version == x._version();
  }
};
struct Cached {
  std::vector<Seen> seen;
  Tensor pack;
};
std::mutex mutex;
// Never destroyed: the process may end after the GPU's driver is gone.
auto& cache = *new std::vector<Cached>;
auto& region = *new Tensor;  // what autocast made of `marker` in the region that the cache is of

// What stands for autocast's region: autocast keeps its cast of a leaf until the region ends, and then makes another.
Tensor current_region(c10::Device device, at::ScalarType type) {
  static auto& marker = *new Tensor;
  if (!marker.defined() || marker.device() != device)
    marker = at::ones({1}, at::TensorOptions(device)).set_requires_grad(true);
  return at::autocast::cached_cast(type, marker, device.type());
}

// Without a call where there is nothing to cast.
Tensor as_type(const Tensor& x, at::ScalarType type) { return x.scalar_type() == type ? x : x.to(type); }

// `given` are the layer's tensors, `pieces` makes of them what is packed.
template <typename Pieces>
Tensor pack_of(const variable_list& given, const Pieces& pieces, at::ScalarType type, bool casts) {
  const c10::Device device = given[0].device();
  bool caches = casts && at::autocast::is_autocast_cache_enabled() && !c10::InferenceMode::is_enabled();
  for (const Tensor& x : given) caches = caches && !x.is_inference();
  // What is computed while a CUDA graph is captured has no values until the graph runs, and is to be computed anew
  // each time that it does.
  if (!caches || is_capturing(device)) return as_type(at::cat(pieces()), type);
  const std::lock_guard<std::mutex> lock(mutex);
  const Tensor now = current_region(device, type);
  if (!now.is_same(region)) region = now, cache.clear();
  for (const Cached& each : cache) {
    bool same = each.seen.size() == given.size();
    for (size_t i = 0; same && i < given.size(); ++i) same = each.seen[i].is(given[i]);
    if (same) return each.pack;
  }
  Cached added;
  for (const Tensor& x : given) added.seen.emplace_back(x);
  added.pack = as_type(at::cat(pieces()), type);
  cache.push_back(std::move(added));
  return cache.back().pack;
}

// ---- Below autograd.

#define PROJECTION int64_t channels, int64_t parts, bool bias, int64_t tables
#define OPTIONS                                                                                     \
  int64_t kernel_size, int64_t num_heads, int64_t dilation, StringView border, double scale
#define THE_OPTIONS \
  Options { kernel_size, num_heads, dilation, border == "mask", scale }

Loaded loaded_for(const Tensor& x, const Shape& shape, const Projection& p) {
  const Loaded loaded = find(x.device(), shape.variant(x.scalar_type(), p.parts == 3, p.tables > 0), false);
  TORCH_CHECK(loaded, "local_attention: the CUDA kernels for this input are not loaded");
  return loaded;
}

Tensor as_the_kernels_want(const Tensor& x) {
  return fits(x) ? x : x.clone(at::MemoryFormat::ChannelsLast);
}

Tensor project(const Tensor& x, const Views& views) {
  const int64_t one[] = {1, 1}, zero[] = {0, 0};
  return as_the_kernels_want(at::convolution(x, views.weight, views.bias, one, zero, one, false, zero, 1));
}

// The queries, keys and values in the projected map, and likewise their gradients.
void point_to(const Tensor& maps, const Projection& p, Map& query, Map& key, Map& value) {
  query = map_of(maps);
  value = map_of(maps, (p.parts - 1) * p.channels);
  key = p.parts == 3 ? map_of(maps, p.channels) : value;
}

// Give the output, lse and the projected maps.
std::tuple<Tensor, Tensor, Tensor> projected_forward(const Tensor& x, const Tensor& pack, PROJECTION, OPTIONS) {
  const Projection p{channels, parts, bias, tables};
  const Shape s(x, channels, THE_OPTIONS);
  const Loaded loaded = loaded_for(x, s, p);
  const Views views(pack, p, s, x.size(1));
  const Tensor maps = project(x, views);
  const Tensor output = allocate(maps, {s.batch, channels, s.height, s.width}, maps.scalar_type(),
                                 at::MemoryFormat::ChannelsLast);
  const Tensor lse = allocate(maps, {s.batch, s.heads, s.height, s.width}, at::kFloat);
  Arguments a{};
  point_to(maps, p, a.query, a.key, a.value);
  a.output = map_of(output);
  attend(loaded, s, views.tables, a, lse);
  return {output, lse, maps};
}

// Give the gradients of x, of all weights and of all biases, in the type of the maps, and of the tables in float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> projected_backward(
    const Tensor& given_grad, const Tensor& x, const Tensor& pack, const Tensor& logsumexp,
    const OptionalTensor& kept, PROJECTION, OPTIONS, std::array<bool, 3> wanted) {
  const Projection p{channels, parts, bias, tables};
  const Shape s(x, channels, THE_OPTIONS);
  const Loaded loaded = loaded_for(x, s, p);
  const Views views(pack, p, s, x.size(1));
  const Tensor grad = as_the_kernels_want(given_grad);
  Tensor maps = kept ? *kept : project(x, views);
  const Tensor grad_maps = allocate(maps, maps.sizes(), maps.scalar_type(), at::MemoryFormat::ChannelsLast);
  Arguments a{};
  point_to(maps, p, a.query, a.key, a.value);
  point_to(grad_maps, p, a.grad_query, a.grad_key, a.grad_value);
  a.grad = map_of(grad);
  const Tensor grad_tables = attend_backward(loaded, s, views.tables, a, logsumexp);
  maps.reset();
  const int64_t one[] = {1, 1}, zero[] = {0, 0}, rows[] = {parts * channels};
  const auto [grad_x, grad_weight, grad_bias] =
      at::convolution_backward(grad_maps, x, views.weight, bias ? at::OptionalIntArrayRef(rows) : at::OptionalIntArrayRef(), one,
                               zero, one, false, zero, 1, {wanted[0], wanted[1], wanted[2] && bias});
  return {grad_x, grad_weight, grad_bias, grad_tables};
}

// Called through the dispatcher, where modes see them and count their FLOPs.
template <typename Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// ---- Autograd.

// No dispatcher key but those of a tensor in memory: nobody else wants to see what is done to it.
bool is_plain(const Tensor& x) {
  auto plain = c10::DispatchKeySet(c10::DispatchKeySet::RAW, 0)
               .add(c10::DispatchKey::ADInplaceOrView)
               .add(c10::DispatchKey::AutogradCPU)
               .add(c10::DispatchKey::AutogradCUDA)
               .add(c10::DispatchKey::AutocastCPU)
               .add(c10::DispatchKey::AutocastCUDA)
               .add(c10::DispatchKey::CPU)
               .add(c10::DispatchKey::CUDA);
  return (x.key_set().raw_repr() & ~plain.raw_repr()) == 0;
}

struct BelowAutograd {
  at::AutoDispatchBelowAutograd autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// The layer's tensors, undefined where there are none: x, weights, biases, rel_row, rel_col.
struct Inputs {
  Tensor x;
  std::vector<Tensor> weights;
  std::vector<OptionalTensor> biases;
  OptionalTensor rel_row, rel_col;

  // All but x, and only those that there are.
  variable_list learned() const {
    variable_list all(weights);
    for (const auto& bias : biases)
      if (bias) all.push_back(*bias);
    if (rel_row) all.push_back(*rel_row), all.push_back(*rel_col);
    return all;
  }
};

Tensor or_undefined(const OptionalTensor& x) { return x ? *x : Tensor(); }
OptionalTensor or_none(const Tensor& x) { return x.defined() ? OptionalTensor(x) : OptionalTensor(); }

struct LocalSelfAttentionBackward : torch::autograd::Node {
  Projection projection;
  Options options;
  std::string backend;
  // The layer's tensors, then the pack, lse and the maps, if they are kept.
  std::vector<SavedVariable> saved;

  std::string name() const override { return "LocalSelfAttentionBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& each : saved) each.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const int64_t parts = projection.parts;
    variable_list results(3 + 2 * parts);
    if (!grads[0].defined()) return results;
    Inputs in;
    Tensor pack, lse, maps;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto unpack = [&, next = size_t(0)]() mutable { return saved[next++].unpack(getptr()); };
      in.x = unpack();
      for (int64_t i = 0; i < parts; ++i) in.weights.push_back(unpack());
      for (int64_t i = 0; i < parts; ++i) in.biases.push_back(or_none(unpack()));
      in.rel_row = or_none(unpack()), in.rel_col = or_none(unpack());
      pack = unpack(), lse = unpack(), maps = unpack();
    }
    // With create_graph, or under a transform, somebody may differentiate what comes out.
    if (at::GradMode::is_enabled() || !is_plain(grads[0])) return differentiable(grads[0], in);

    const auto wants = [this](int64_t first, int64_t count) {
      bool any = false;
      for (int64_t i = first; i < first + count; ++i) any |= task_should_compute_output(i);
      return any;
    };
    const BelowAutograd below;
    static const auto op = find_op<decltype(projected_backward)>("sasa_det_cuda::projected_backward");
    const auto [grad_x, grad_weight, grad_bias, grad_tables] = op.call(
        grads[0], in.x, pack, lse, or_none(maps), projection.channels, parts, projection.bias,
        projection.tables, options.kernel_size, options.num_heads, options.dilation,
        options.mask ? "mask" : "zeros", options.scale, {wants(0, 1), wants(1, parts), wants(1 + parts, parts)});
    results[0] = grad_x;
    const auto type = in.weights[0].scalar_type();
    if (grad_weight.defined()) {
      const Tensor cast = as_type(grad_weight, type);
      for (int64_t i = 0; i < parts; ++i)
        results[1 + i] = view(cast, in.weights[i].sizes(), i * in.weights[i].numel());
    }
    if (grad_bias.defined()) {
      const Tensor cast = as_type(grad_bias, type);
      for (int64_t i = 0; i < parts; ++i)
        if (in.biases[i]) results[1 + parts + i] = view(cast, {projection.channels}, i * projection.channels);
    }
    if (grad_tables.defined()) {
      const Tensor cast = as_type(grad_tables, type);
      results[1 + 2 * parts] = view(cast, in.rel_row->sizes());
      results[2 + 2 * parts] = view(cast, in.rel_col->sizes(), in.rel_row->numel());
    }
    return results;
  }

  // The same by operations that autograd sees.
  variable_list differentiable(const Tensor& grad, const Inputs& in) {
    const at::AutoGradMode enable(true);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto as = [&](const Tensor& x) { return x.to(in.x.scalar_type()); };
    OptionalTensor bias;
    if (projection.bias) {
      std::vector<Tensor> biases;
      for (const auto& each : in.biases)
        biases.push_back(each ? *each : at::zeros({projection.channels}, in.weights[0].options()));
      bias = as(at::cat(biases));
    }
    const Tensor weight = as(at::cat(in.weights)).unsqueeze(2).unsqueeze(3);
    const auto maps = at::conv2d(in.x, weight, bias).chunk(projection.parts, 1);
    const OptionalTensor key = projection.parts == 3 ? OptionalTensor(maps[1]) : OptionalTensor();
    OptionalTensor row, col;
    if (in.rel_row) row = as(*in.rel_row), col = as(*in.rel_col);
    using Attend = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                              const OptionalTensor&, int64_t, int64_t, int64_t, StringView, double,
                                              StringView, int64_t);
    static const auto op = find_op<Attend>("sasa_det::local_attention");
    const Tensor output = std::get<0>(op.call(maps.front(), key, maps.back(), row, col, options.kernel_size,
                                              options.num_heads, options.dilation, options.mask ? "mask" : "zeros",
                                              options.scale, backend, 1));
    variable_list all{in.x}, wanted;
    all.insert(all.end(), in.weights.begin(), in.weights.end());
    for (const auto& each : in.biases) all.push_back(or_undefined(each));
    all.push_back(or_undefined(in.rel_row)), all.push_back(or_undefined(in.rel_col));
    for (size_t i = 0; i < all.size(); ++i)
      if (task_should_compute_output(i)) wanted.push_back(all[i]);
    const auto found = torch::autograd::grad({output}, wanted, {grad}, /*retain_graph=*/true, /*create_graph=*/true);
    variable_list results(all.size());
    for (size_t i = 0, next = 0; i < all.size(); ++i)
      if (task_should_compute_output(i)) results[i] = found[next++];
    return results;
  }
};

// std::shared_ptr's nodes are deleted by a function of torch that does not recurse.
template <typename T>
void delete_node(T* node) {
  deleteNode(node);
}
template <typename Pointer>
void own(std::shared_ptr<Pointer>& pointer, LocalSelfAttentionBackward* node) {
  pointer = std::shared_ptr<Pointer>(node, [](auto* each) { delete_node(static_cast<Pointer*>(each)); });
}
template <typename Pointer>
void own(c10::intrusive_ptr<Pointer>& pointer, LocalSelfAttentionBackward* node) {
  pointer = c10::intrusive_ptr<Pointer>::unsafe_steal_from_new(node);
}

void record(Tensor& output, const Inputs& in, const Projection& projection, const Options& options,
            StringView backend, const Tensor& pack, const Tensor& lse, const Tensor& maps) {
  auto* const node = new LocalSelfAttentionBackward;
  NodePointer pointer;
  own(pointer, node);
  node->projection = projection, node->options = options, node->backend = std::string(backend);
  torch::autograd::edge_list edges;
  const auto add = [&](const Tensor& x) {
    edges.push_back(x.defined() ? torch::autograd::impl::gradient_edge(x) : torch::autograd::Edge());
    node->saved.emplace_back(x, false);
  };
  add(in.x);
  for (const Tensor& weight : in.weights) add(weight);
  for (const auto& bias : in.biases) add(or_undefined(bias));
  add(or_undefined(in.rel_row)), add(or_undefined(in.rel_col));
  for (const Tensor& each : {pack, lse, maps}) node->saved.emplace_back(each, false);
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(output, pointer);
}

// ---- The layer.

// Whether the layer's tensors are such as the functions above take: in memory, contiguous but for x, of fitting shapes.
bool is_well_formed(const Inputs& in, const Options& options) {
  const size_t parts = in.weights.size();
  if (in.x.dim() != 4 || in.x.numel() == 0 || (parts != 2 && parts != 3) || in.biases.size() != parts) return false;
  const int64_t channels = in.weights[0].size(0);
  if (channels == 0 || options.num_heads < 1 || channels % options.num_heads || options.dilation < 1) return false;
  const int64_t depth = channels / options.num_heads;
  for (const Tensor& weight : in.weights)
    if (weight.dim() != 2 || weight.size(0) != channels || weight.size(1) != in.x.size(1)) return false;
  for (const auto& bias : in.biases)
    if (bias && (bias->dim() != 1 || bias->size(0) != channels)) return false;
  if (in.rel_row.has_value() != in.rel_col.has_value() || (parts == 2 && !in.rel_row)) return false;
  if (in.rel_row) {
    const auto table = in.rel_row->sizes();
    if (in.rel_col->sizes() != table || table.size() != 3 || depth % 2 || table[1] != depth / 2 ||
        table[2] != options.kernel_size || (table[0] != 1 && table[0] != options.num_heads))
      return false;
  }
  if (!is_plain(in.x) || in.x.size(2) * in.x.size(3) * int64_t(parts) * channels >= ADDRESSABLE) return false;
  for (const Tensor& x : in.learned())
    if (!is_plain(x) || x.device() != in.x.device() || x.scalar_type() != in.weights[0].scalar_type() ||
        !x.is_contiguous())
      return false;
  return in.x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

// Compute the layer, if kernels for it are loaded and take its input; else nothing, and Python does.
OptionalTensor projected_attention(const Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases,
                                   const OptionalTensor& rel_row, const OptionalTensor& rel_col, OPTIONS,
                                   StringView backend, bool keep) {
  const Options options = THE_OPTIONS;
  Inputs in{x, weights.vec(), {}, rel_row, rel_col};
  for (size_t i = 0; i < biases.size(); ++i) in.biases.push_back(biases.get(i));
  if ((backend != "auto" && backend != "cuda") || !(scale > 0) || !is_well_formed(in, options)) return {};
  // A tracer of operators does not follow the views of memory.
  if (c10::impl::TorchDispatchModeTLS::get_mode(c10::impl::TorchDispatchModeKey::PROXY)) return {};
  const auto device = x.device().type();
  const auto autocast = x.is_cuda() ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  const bool casts = !c10::impl::tls_is_dispatch_key_excluded(autocast);
  const auto type = casts ? at::autocast::get_lower_precision_fp_from_device_type(device) : x.scalar_type();
  const auto of_weights = weights[0].scalar_type();
  if (type != at::kBFloat16 && type != at::kHalf) return {};
  // Autocast leaves float64 alone.
  if (casts ? x.scalar_type() == at::kDouble || of_weights == at::kDouble || !x.is_floating_point() : of_weights != type)
    return {};

  const Shape shape(x, weights[0].size(0), options);
  const Projection p{weights[0].size(0), int64_t(weights.size()), false, rel_row ? rel_row->size(0) : 0};
  const Loaded loaded =
      find(x.device(), shape.variant(type, p.parts == 3, rel_row.has_value()), backend == "auto");
  const variable_list learned = in.learned();
  bool differentiated = false;
  if (at::GradMode::is_enabled()) {
    differentiated = x.requires_grad();
    for (const Tensor& each : learned) differentiated |= each.requires_grad();
  }
  if (!loaded || (differentiated && !loaded.has_backward())) return {};

  Projection projection = p;
  for (const auto& bias : in.biases) projection.bias |= bias.has_value();
  in.x = as_type(x, type);  // seen by autograd
  Tensor pack, output, lse, maps;
  {
    const BelowAutograd below;
    pack = pack_of(learned, [&] { return pieces_of(in.weights, in.biases, rel_row, rel_col); }, type, casts);
    static const auto op = find_op<decltype(projected_forward)>("sasa_det_cuda::projected_forward");
    std::tie(output, lse, maps) =
        op.call(in.x, pack, projection.channels, projection.parts, projection.bias, projection.tables, kernel_size,
                num_heads, dilation, border, scale);
  }
  if (differentiated) record(output, in, projection, options, backend, pack, lse, keep ? maps : Tensor());
  return output;
}

// As backends/cuda.py calls the kernels: with arguments that were checked.
std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const OptionalTensor& key, const Tensor& value,
                                             const OptionalTensor& rel_row, const OptionalTensor& rel_col, OPTIONS) {
  return gpu::forward(query, key, value, rel_row, rel_col, THE_OPTIONS);
}
std::tuple<OptionalTensor, OptionalTensor> attention_backward(
    const Tensor& grad, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& logsumexp, const Tensor& grad_query,
    const OptionalTensor& grad_key, const Tensor& grad_value, OPTIONS) {
  return gpu::backward(grad, query, key, value, rel_row, rel_col, logsumexp, grad_query, grad_key, grad_value, THE_OPTIONS);
}

#define INPUTS_SCHEMA "Tensor query, Tensor? key, Tensor value, Tensor? rel_row, Tensor? rel_col"
#define OPTIONS_SCHEMA "int kernel_size, int num_heads, int dilation, str border, float scale"
#define PROJECTION_SCHEMA "int channels, int parts, bool bias, int tables, " OPTIONS_SCHEMA

TORCH_LIBRARY(sasa_det_cuda, library) {
  const auto define = [&](const char* schema, auto* function) {
    library.def(schema, torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
  };
  define("forward(" INPUTS_SCHEMA ", " OPTIONS_SCHEMA ") -> (Tensor, Tensor)", &attention_forward);
  define("backward(Tensor grad, " INPUTS_SCHEMA
         ", Tensor logsumexp, Tensor(a!) grad_query, Tensor(b!)? grad_key, Tensor(c!) grad_value, " OPTIONS_SCHEMA
         ") -> (Tensor?, Tensor?)",
         &attention_backward);
  define("projected_forward(Tensor x, Tensor pack, " PROJECTION_SCHEMA ") -> (Tensor, Tensor, Tensor)",
         &projected_forward);
  define("projected_backward(Tensor grad, Tensor x, Tensor pack, Tensor logsumexp, Tensor? maps, " PROJECTION_SCHEMA
         ", bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
         &projected_backward);
  library.def("projected_attention(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? rel_row, Tensor? rel_col, "
              OPTIONS_SCHEMA ", str backend, bool keep) -> Tensor?",
              &projected_attention);
}

}  // namespace

}  // namespace sasa::gpu
