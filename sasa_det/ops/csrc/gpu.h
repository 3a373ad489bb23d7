// The CUDA kernels as the host sees them: which are loaded, how a launch is laid out, forward and backward.
//
// Nothing here needs CUDA to be built: the driver's functions are pointers that Python finds and hands over. Python
// compiles a kernel at its first use and registers it (ops/backends/cuda_driver.py). From then on a call finds it
// here, without Python.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

#include "launch.h"

namespace sasa::gpu {

#include "cuda/arguments.cuh"

// The kernels take no map with an image of so many elements.
constexpr int64_t ADDRESSABLE = int64_t(1) << 30;

enum Kernel { FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS, KERNELS };

// What kernels are compiled for; cuda_launches.py says what each means. As Python passes it.
struct Variant {
  int bfloat16, depth, window, masked, dilated, has_key, has_rel;
};

// A variant's kernels on one GPU.
struct Loaded {
  c10::Device device;
  Variant variant;
  void* context;             // the driver's, that they are loaded in
  void* functions[KERNELS];  // null for those that are not loaded
  unsigned shared[KERNELS];  // bytes of shared memory of a block
  bool trusted;              // whether 'auto' may take them

  explicit operator bool() const { return functions[FORWARD]; }
  bool has_backward() const { return functions[BACKWARD_QUERIES] && functions[BACKWARD_KEYS]; }
};

// The sizes of an attention, and its options.
struct Shape {
  int64_t batch, heads, depth, height, width, dilation;
  Options options;

  // Of a map, of which so many channels are queries.
  Shape(const Tensor& map, int64_t channels, const Options& options);
  Variant variant(at::ScalarType type, bool has_key, bool has_rel) const;
};

// The kernels that compute an attention; false if they are not loaded, or if only trusted ones will do and they are not.
Loaded find(c10::Device device, const Variant& variant, bool trusted_only);

// Whether the kernels can read and write a map as it lies in memory.
bool fits(const Tensor& map);
// A map that fits, from a channel on.
Map map_of(const Tensor& map, int64_t first_channel = 0);

// Allocate by the allocator of another tensor, as at::empty does, but without the dispatcher.
Tensor allocate(const Tensor& like, at::IntArrayRef sizes, at::ScalarType type,
                at::MemoryFormat format = at::MemoryFormat::Contiguous);
// View the elements of a dense tensor from one on, outside of autograd's sight and without the dispatcher.
Tensor view(const Tensor& x, at::IntArrayRef sizes, int64_t first = 0);
Tensor view(const Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t first = 0);

// Tables of which all heads share the first, or have one each; in the type of the maps, or none.
struct Tables {
  const void *row = nullptr, *col = nullptr;
  int64_t heads = 0;
};

// Compute O and lse. The maps are those of `arguments`, all else in it is filled in here.
void attend(const Loaded& loaded, const Shape& shape, const Tables& tables, Arguments arguments,
            const Tensor& lse);
// Compute dQ, dK and dV, and return the gradients of both tables, (2, heads, depth / 2, k) in float32.
Tensor attend_backward(const Loaded& loaded, const Shape& shape, const Tables& tables,
                       Arguments arguments, const Tensor& lse);

// As sasa::forward and sasa::backward. Maps that do not fit are copied.
std::tuple<Tensor, Tensor> forward(const Tensor& query, const OptionalTensor& key, const Tensor& value,
                                   const OptionalTensor& rel_row, const OptionalTensor& rel_col,
                                   const Options& options);
std::tuple<OptionalTensor, OptionalTensor> backward(
    const Tensor& grad, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& rel_row, const OptionalTensor& rel_col, const Tensor& logsumexp,
    const Tensor& grad_query, const OptionalTensor& grad_key, const Tensor& grad_value,
    const Options& options);

// Whether the current stream of a GPU is being captured into a CUDA graph.
bool is_capturing(c10::Device device);

}  // namespace sasa::gpu
