// A layer's forward: projections and attention, a few rows at a time, so that Q, K and V stay in a cache.
#pragma once
#include <optional>

#include "projection.h"

namespace sasa {

// Rows of keys whose queries are projected together, and those of so many rows of the map. More rows repeat less of the
// packing at their edges; fewer fit a smaller cache.
constexpr int64_t STRIP_ROWS = 24;

// Rows of queries that are computed together, three at a time.
inline int64_t strip_rows(int64_t stride) { return std::max<int64_t>(STRIP_ROWS / stride / 3 * 3, 3); }

// Rows of keys and values in the windows of so many rows of queries.
inline int64_t held_rows(int64_t kernel_size, int64_t stride) { return (strip_rows(stride) - 1) * stride + kernel_size; }

// How many parts of an image are computed at once; 0 if all strips together would hold more than the maps.
inline int64_t image_parts(int64_t images, int64_t height, int64_t kernel_size, int64_t stride) {
  const int64_t threads = at::get_num_threads(), parts = divide_up(threads, images);
  const int64_t held = held_rows(kernel_size, stride);
  return parts * held <= height && threads * held <= images * height ? parts : 0;
}

// Some of a layer's projections, of the pixels of one map. All is dense, in the layout of the map.
class Projections {
 public:
  Projections(const Tensor& x, const Tensor& weight, const OptionalTensor& bias)
      : x_(x), bias_(bias ? OptionalTensor(bias->contiguous()) : bias), last_(is_channels_last(x)),
        channels_(weight.size(0)), packed_(pack(weight, last_)) {}

  bool is_last() const { return last_; }
  int64_t channels() const { return channels_; }
  int64_t width() const { return x_.size(3); }
  // Numbers that `project` takes memory for.
  int64_t scratch() const { return std::min(DEPTH, x_.size(1)) * block(); }

  // Project rows [begin, end) of an image. Where `to` is, and the distance from one channel, or in channels_last one
  // pixel, to the next.
  void project(int64_t image, int64_t begin, int64_t end, float* to, int64_t stride, float* scratch) const {
    const int64_t inputs = x_.size(1), pixels = (end - begin) * width(), all = x_.size(2) * width();
    const int64_t rounded = round_up(channels_, last_ ? m_.panel_columns : m_.panel_rows);
    const float *from = x_.const_data_ptr<float>(), *added = bias_ ? bias_->const_data_ptr<float>() : nullptr;
    for (int64_t pixel = 0; pixel < pixels; pixel += block()) {
      const int64_t count = std::min(block(), pixels - pixel), at = begin * width() + pixel;
      for (int64_t k = 0; k < inputs; k += DEPTH) {
        const int64_t deep = std::min(DEPTH, inputs - k);
        const float* panels = packed_.data() + k * rounded;
        const float* bias = k ? nullptr : added;
        if (last_) {
          m_.pack_rows(from + (image * all + at) * inputs + k, inputs, 1, count, deep, scratch);
          const Tile tile{count, channels_, deep, to + pixel * stride, stride, k > 0, nullptr, bias};
          m_.multiply(tile, scratch, panels, true);
        } else {
          m_.pack_columns(from + (image * inputs + k) * all + at, 1, all, count, deep, scratch);
          const Tile tile{channels_, count, deep, to + pixel, stride, k > 0, bias, nullptr};
          m_.multiply(tile, panels, scratch, false);
        }
      }
    }
  }

 private:
  static Floats pack(const Tensor& weight, bool last) {
    const Multiplication& m = kernels().multiplication;
    const Matrix matrix = as_matrix(weight);
    const int64_t channels = weight.size(0), inputs = weight.size(1);
    return last ? pack_all(m.pack_columns, m.panel_columns, matrix.data, matrix.row, matrix.column, channels, inputs)
                : pack_all(m.pack_rows, m.panel_rows, matrix.data, matrix.row, matrix.column, channels, inputs);
  }
  int64_t block() const { return last_ ? BLOCK_ROW_PANELS * m_.panel_rows : BLOCK_PANELS * m_.panel_columns; }

  const Multiplication& m_ = kernels().multiplication;
  const Tensor x_;
  const OptionalTensor bias_;
  bool last_;
  int64_t channels_;
  Floats packed_;
};

// The projections of some rows of an image.
class Strip {
 public:
  Strip(const Projections& projections, int64_t rows)
      : projections_(projections), last_(projections.is_last()), width_(projections.width()),
        channels_(projections.channels()), rows_(rows), memory_(channels_ * rows * width_),
        scratch_(projections.scratch()) {}

  // Hold rows [begin, end) of an image. Those that it holds already are moved; of another image there are none.
  void hold(int64_t image, int64_t begin, int64_t end) {
    if (image != image_ || begin < begin_ || begin > end_) begin_ = end_ = begin;
    if (begin > begin_) shift(begin - begin_, end_ - begin);
    projections_.project(image, end_, end, at(end_ - begin), stride(), scratch_.data());
    image_ = image, begin_ = begin, end_ = end;
  }
  // Describe channels from `channel` on, by rows of the image.
  Map map(int64_t channel) const {
    Map m;
    m.channel = last_ ? 1 : rows_ * width_;
    m.row = last_ ? width_ * channels_ : width_;
    m.col = last_ ? channels_ : 1;
    m.data = memory_.data() + channel * m.channel - begin_ * m.row;
    return m;
  }

 private:
  // Move the rows from `first` on to the beginning; there are `count` of them.
  void shift(int64_t first, int64_t count) {
    const int64_t pieces = last_ ? 1 : channels_, size = last_ ? width_ * channels_ : width_;
    for (int64_t n = 0; n < pieces; ++n) {
      float* piece = memory_.data() + n * rows_ * size;
      std::copy(piece + first * size, piece + (first + count) * size, piece);
    }
  }
  // Where row `row` is, and the distance from one channel (or in channels_last one pixel) to the next.
  float* at(int64_t row) const { return memory_.data() + row * (last_ ? width_ * channels_ : width_); }
  int64_t stride() const { return last_ ? channels_ : rows_ * width_; }

  const Projections& projections_;
  bool last_;
  int64_t width_, channels_, rows_;
  int64_t image_ = -1, begin_ = 0, end_ = 0;  // what is held
  Floats memory_, scratch_;
};

// Return O and the log-sum-exp, as of the projections `weight`: the first of the map `queries`, the others of x, of which
// `queries` has the pixels that a stride leaves. Of key and value only the shape is read. All is checked.
inline std::tuple<Tensor, Tensor> attend_projected(const Tensor& x, const Tensor& queries, const Tensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& key,
                                                   const Tensor& value, const OptionalTensor& rel_row,
                                                   const OptionalTensor& rel_col, const Tensor& output,
                                                   const Options& options, int64_t parts) {
  const int64_t outputs = output.size(1), images = x.size(0), stride = options.stride;
  const Tensor lse = at::empty({images, options.num_heads, output.size(2), output.size(3)}, x.options());
  const OptionalTensor row = as_table(rel_row, x), col = as_table(rel_col, x);
  Problem whole = describe(output, key, value, row, col, lse, options);
  whole.output = as_map(output);

  // Without a stride one projection computes all, so that x is read once.
  const auto projections = [&](const Tensor& of, int64_t first, int64_t count) {
    return Projections(of, weight.narrow(0, first, count), bias ? OptionalTensor(bias->narrow(0, first, count)) : bias);
  };
  const int64_t apart = stride > 1 ? outputs : 0, others = weight.size(0) - apart;
  const Projections of_all = projections(x, apart, others);
  std::optional<Projections> of_queries;
  if (apart) of_queries.emplace(projections(queries, 0, apart));

  at::parallel_for(0, images * parts, 1, [&](int64_t first_task, int64_t end_task) {
    Strip strip(of_all, held_rows(options.kernel_size, stride));
    std::optional<Strip> query_strip;
    if (apart) query_strip.emplace(*of_queries, strip_rows(stride));
    const Memory memory = zeros(kernels().scratch(whole, false));
    const int64_t radius = options.kernel_size / 2;
    for (int64_t task = first_task; task < end_task; ++task) {
      const int64_t image = task / parts, part = task % parts;
      const int64_t first = whole.height * part / parts, end = whole.height * (part + 1) / parts;
      for (int64_t y = first; y < end; y += strip_rows(stride)) {
        const int64_t y_end = std::min(y + strip_rows(stride), end);
        strip.hold(image, std::max<int64_t>(y * stride - radius, 0),
                   std::min((y_end - 1) * stride + radius + 1, x.size(2)));
        if (apart) query_strip->hold(image, y, y_end);
        Problem p = whole;
        p.query = apart ? query_strip->map(0) : strip.map(0);
        if (key) p.key = strip.map(others - 2 * outputs);
        p.value = strip.map(others - outputs);
        for (int64_t head = 0; head < p.heads; ++head)
          kernels().forward(p, Band{image, head, 0, 0, y, y_end, 0}, memory.data());
      }
    }
  });
  return {output, lse};
}

}  // namespace sasa
