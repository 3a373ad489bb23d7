// The operator sasa_det::LocalAttention for onnxruntime, with the CPU kernels of ../../ops/csrc.
//
// Inputs, all float32:
//   maps      (B, P * heads * depth, H, W): queries, keys and values one after the other, as a single
//             projection gives them, P = 3; or queries and values, P = 2
//   rel_row   (heads or 1, depth / 2, kernel_size), or none
//   rel_col   as rel_row
// Output: (B, heads * depth, H, W).
// Attributes, as local_attention.py documents them: kernel_size, num_heads, dilation (int), border (string),
// scale (float); and has_key (int), whether P is 3.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../ops/csrc/bands.h"
#include "onnxruntime_abi.h"

namespace {

using sasa::Kernels;
using sasa::Problem;
using Shape = std::vector<int64_t>;

// ---- Errors. ----

// What a function of onnxruntime answered.
struct Refusal {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Refusal{status};
}

// Messages name the operator: a graph has many nodes.
void require(bool fulfilled, const std::string& message) {
  if (!fulfilled) throw std::invalid_argument("LocalAttention: " + message);
}

// Call a function, and return its exception as a status: exceptions may not cross a C interface.
template <typename Function>
OrtStatus* as_status(const OrtApi& api, const Function& function) {
  try {
    function();
    return nullptr;
  } catch (const Refusal& refusal) {
    return refusal.status;
  } catch (const std::invalid_argument& error) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

std::string text(const Shape& shape) {
  std::string sizes;
  for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return "(" + sizes + ")";
}

// ---- The CPU. ----

// The kernels for this CPU. ATEN_CPU_CAPABILITY can ask for less, as it can of torch: then both choose the same.
const Kernels& kernels() {
#if defined(__x86_64__)
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = set ? set : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && most == "avx512") return sasa::kernels_avx512();
  if (avx2 && (most == "avx512" || most == "avx2")) return sasa::kernels_avx2();
#endif
  return sasa::kernels_default();
}

// Share tasks among the threads of the session. There are several ranges for each thread, so that no thread
// waits long for another.
template <typename Range>
void share_in_session(const OrtApi& api, const OrtKernelContext* context, int64_t threads, int64_t tasks,
                      const Range& range) {
  struct Work {
    const Range& range;
    int64_t tasks, ranges;
    std::atomic<bool> failed{false};
  } work{range, tasks, std::min(tasks, 4 * threads)};
  const auto run = [](void* data, size_t number) {
    Work& work = *static_cast<Work*>(data);
    const int64_t n = static_cast<int64_t>(number);
    try {
      work.range(work.tasks * n / work.ranges, work.tasks * (n + 1) / work.ranges);
    } catch (...) {
      work.failed = true;  // only memory can be missing
    }
  };
  check(api.KernelContext_ParallelFor(context, run, static_cast<size_t>(work.ranges), 0, &work));
  if (work.failed) throw std::bad_alloc();
}

// ---- A node of the graph. ----

Shape shape_of(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  size_t dims = 0;
  OrtStatus* status = api.GetDimensionsCount(info, &dims);
  Shape shape(dims);
  if (!status) status = api.GetDimensions(info, shape.data(), dims);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return shape;
}

float* data_of(const OrtApi& api, const OrtValue* value) {
  void* data = nullptr;
  check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<float*>(data);
}

class LocalAttention {
 public:
  LocalAttention(const OrtApi& api, const OrtKernelInfo* info) : api(api) {
    kernel_size = integer(info, "kernel_size");
    num_heads = integer(info, "num_heads");
    dilation = integer(info, "dilation");
    stride = integer(info, "stride", 1);
    has_key = integer(info, "has_key") != 0;
    float factor = 0;
    check(api.KernelInfoGetAttribute_float(info, "scale", &factor));
    scale = factor;
    char name[16] = "";
    size_t size = sizeof(name);
    // A longer string is none of those that are accepted.
    OrtStatus* too_long = api.KernelInfoGetAttribute_string(info, "border", name, &size);
    if (too_long) api.ReleaseStatus(too_long);
    const std::string border = name;
    require(kernel_size >= 1 && kernel_size <= sasa::LARGEST_KERNEL && kernel_size % 2 == 1,
            "kernel_size must be odd, from 1 to " + std::to_string(sasa::LARGEST_KERNEL) + ", but is " +
                std::to_string(kernel_size));
    require(num_heads >= 1, "num_heads must be at least 1, but is " + std::to_string(num_heads));
    require(dilation >= 1, "dilation must be at least 1, but is " + std::to_string(dilation));
    require(stride >= 1 && stride <= sasa::LARGEST_STRIDE,
            "stride must be from 1 to " + std::to_string(sasa::LARGEST_STRIDE) + ", but is " + std::to_string(stride));
    require(border == "zeros" || border == "mask",
            "border must be 'zeros' or 'mask', but is '" + border + "'");
    require(std::isfinite(scale), "scale must be a finite number, but is " + std::to_string(scale));
    mask = border == "mask";
  }

  void compute(OrtKernelContext* context) const {
    const OrtValue* maps = input(context, 0);
    require(maps, "its first input, the maps, is missing");
    const OrtValue *rel_row = input(context, 1), *rel_col = input(context, 2), *query = input(context, 3);
    const Shape size = shape_of(api, maps);
    const int64_t parts = (has_key ? 2 : 1) + (query ? 0 : 1);
    Problem p = describe(size, parts, query, rel_row, rel_col);
    const int64_t channels = p.heads * p.depth, area = size[2] * size[3];
    float* first = data_of(api, maps);
    // A map of some of `of` parts in memory.
    const auto map = [&](float* data, int64_t of, int64_t height, int64_t width) {
      return sasa::Map{data, of * channels * height * width, height * width, width, 1};
    };
    const auto part = [&](int64_t n) { return map(first + n * channels * area, parts, size[2], size[3]); };
    p.query = query ? map(data_of(api, query), 1, p.height, p.width) : part(0);
    if (has_key) p.key = part(parts - 2);
    p.value = part(parts - 1);
    if (rel_row) {
      p.rel_row = data_of(api, rel_row);
      p.rel_col = data_of(api, rel_col);
    }
    const int64_t shape[] = {p.batch, channels, p.height, p.width};
    OrtValue* output = nullptr;
    check(api.KernelContext_GetOutput(context, 0, shape, 4, &output));
    p.output = map(data_of(api, output), 1, p.height, p.width);
    // The session may have fewer threads than the CPU. Then there are some more cuts than needed.
    static const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
    static const Kernels& chosen = kernels();
    const auto share = [&](int64_t tasks, const auto& range) {
      share_in_session(api, context, threads, tasks, range);
    };
    sasa::run_bands(p, 1, chosen.scratch(p, false), threads, share, chosen.forward);
  }

  const OrtApi& api;

 private:
  int64_t integer(const OrtKernelInfo* info, const char* name) const {
    int64_t number = 0;
    check(api.KernelInfoGetAttribute_int64(info, name, &number));
    return number;
  }
  // The same of what older graphs do not have.
  int64_t integer(const OrtKernelInfo* info, const char* name, int64_t otherwise) const {
    int64_t number = 0;
    OrtStatus* missing = api.KernelInfoGetAttribute_int64(info, name, &number);
    if (missing) api.ReleaseStatus(missing);
    return missing ? otherwise : number;
  }

  // Null where a graph leaves it out.
  const OrtValue* input(const OrtKernelContext* context, size_t index) const {
    size_t count = 0;
    check(api.KernelContext_GetInputCount(context, &count));
    const OrtValue* value = nullptr;
    if (index < count) check(api.KernelContext_GetInput(context, index, &value));
    return value;
  }

  // What the kernels are to compute, without pointers. The kernels read and write as it says.
  Problem describe(const Shape& maps, int64_t parts, const OrtValue* query, const OrtValue* rel_row,
                   const OrtValue* rel_col) const {
    require(maps.size() == 4, "its maps must be (B, C, H, W), but are " + text(maps));
    require(maps[1] > 0 && maps[1] % parts == 0 && maps[1] / parts % num_heads == 0,
            "the channels of its maps must be divisible by " + std::to_string(parts) + " parts and num_heads=" +
                std::to_string(num_heads) + ", but the maps are " + text(maps));
    require(!rel_row == !rel_col, "rel_row and rel_col must both be there, or neither");
    require(has_key || rel_row, "without keys it needs rel_row and rel_col");
    Problem p{};
    p.type = sasa::Type::Float;
    p.batch = maps[0];
    p.heads = num_heads;
    p.depth = maps[1] / parts / num_heads;
    sasa::set_sizes(p, maps[2], maps[3], stride, dilation);
    require(query || stride == 1, "with a stride it needs queries of their own");
    if (query) {
      const Shape strided{p.batch, maps[1] / parts, p.height, p.width}, queries = shape_of(api, query);
      require(queries == strided, "its queries must be " + text(strided) + ", but are " + text(queries));
    }
    p.kernel_size = kernel_size;
    p.mask = mask;
    p.scale = scale;
    if (!rel_row) return p;
    const Shape row = shape_of(api, rel_row), col = shape_of(api, rel_col);
    const bool fits = row.size() == 3 && (row[0] == 1 || row[0] == num_heads) && p.depth % 2 == 0 &&
                      row[1] == p.depth / 2 && row[2] == kernel_size;
    require(fits && row == col,
            "rel_row and rel_col must be (1 or " + std::to_string(num_heads) + ", " +
                std::to_string(p.depth / 2) + ", " + std::to_string(kernel_size) + ") for " +
                std::to_string(p.depth) + " channels of a head, an even number, but are " + text(row) +
                " and " + text(col));
    p.rel_head = row[0] == 1 ? 0 : p.depth / 2 * kernel_size;
    return p;
  }

  int64_t kernel_size, num_heads, dilation, stride;
  bool has_key, mask;
  double scale;
};

OrtStatus* compute_node(void* node, OrtKernelContext* context) {
  const auto& attention = *static_cast<const LocalAttention*>(node);
  return as_status(attention.api, [&] { attention.compute(context); });
}

// ---- What onnxruntime asks about the operator. ----

OrtCustomOp describe_operator() {
  OrtCustomOp op{};
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp*) { return "LocalAttention"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 4; };
  op.GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  // It has no variadic inputs or outputs; onnxruntime asks all the same.
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** node) {
    return as_status(*api, [&] { *node = new LocalAttention(*api, info); });
  };
  op.KernelComputeV2 = compute_node;
  op.KernelDestroy = [](void* node) { delete static_cast<LocalAttention*>(node); };
  return op;
}

}  // namespace

// onnxruntime calls this for each SessionOptions in which the library is registered.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    // The first function is in every version of the table.
    const std::string found = base->GetVersionString();
    return base->GetApi(1)->CreateStatus(
        ORT_FAIL, ("sasa_det::LocalAttention needs onnxruntime 1.17 or later, but this is " + found).c_str());
  }
  return as_status(*api, [&] {
    static const OrtCustomOp op = describe_operator();
    // Sessions use a domain as long as they live: it is never freed. A process can hold several onnxruntimes.
    static std::mutex mutex;
    static std::vector<std::pair<const OrtApi*, OrtCustomOpDomain*>> domains;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [of, domain] : domains)
      if (of == api) return check(api->AddCustomOpDomain(options, domain));
    OrtCustomOpDomain* domain = nullptr;
    check(api->CreateCustomOpDomain("sasa_det", &domain));
    check(api->CustomOpDomain_Add(domain, &op));
    domains.emplace_back(api, domain);
    check(api->AddCustomOpDomain(options, domain));
  });
}
