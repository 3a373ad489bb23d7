// A layer's forward: projections and attention, a few rows at a time, so that Q, K and V stay in a cache.
#pragma once
#include "projection.h"

namespace sasa {

// Rows of queries that are projected together. More rows repeat less of the packing at their edges; fewer fit
// a smaller cache.
constexpr int64_t STRIP_ROWS = 24;

// Q, K and V of some rows of an image, in the layout of the map.
class Strip {
 public:
  Strip(const Tensor& x, int64_t channels, int64_t rows)
      : last_(is_channels_last(x)), width_(x.size(3)), channels_(channels), rows_(rows),
        memory_(channels * rows * width_) {}

  // Describe channels from `channel` on, of which row `begin` of the image is the first that is held.
  Map map(int64_t channel, int64_t begin) const {
    Map m;
    m.channel = last_ ? 1 : rows_ * width_;
    m.row = last_ ? width_ * channels_ : width_;
    m.col = last_ ? channels_ : 1;
    m.data = memory_.data() + channel * m.channel - begin * m.row;
    return m;
  }
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

 private:
  bool last_;
  int64_t width_, channels_, rows_;
  Floats memory_;
};

// Rows that a strip holds: those of the queries, and of the keys and values in their windows.
inline int64_t held_rows(int64_t kernel_size) { return STRIP_ROWS + kernel_size - 1; }

// How many parts of an image are computed at once; 0 if all strips together would hold more than the maps.
inline int64_t image_parts(int64_t images, int64_t height, int64_t kernel_size) {
  const int64_t threads = at::get_num_threads(), parts = divide_up(threads, images);
  const int64_t held = held_rows(kernel_size);
  return parts * held <= height && threads * held <= images * height ? parts : 0;
}

// Return O and the log-sum-exp, as of the projections `weight` of x. All is checked.
inline std::tuple<Tensor, Tensor> attend_projected(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                   bool has_key, const OptionalTensor& rel_row,
                                                   const OptionalTensor& rel_col, const Tensor& output,
                                                   const Options& options, int64_t parts) {
  const int64_t height = x.size(2), width = x.size(3), inputs = x.size(1), channels = weight.size(0);
  const int64_t outputs = output.size(1), radius = options.kernel_size / 2, images = x.size(0);
  const bool last = is_channels_last(x);
  const Tensor lse = at::empty({images, options.num_heads, height, width}, x.options());
  const OptionalTensor row = as_table(rel_row, x), col = as_table(rel_col, x);
  Problem whole = describe(output, has_key ? OptionalTensor(output) : OptionalTensor(), output, row, col, lse, options);
  whole.output = as_map(output);

  const Multiplication& m = kernels().multiplication;
  const Matrix matrix = as_matrix(weight);
  const Floats packed =
      last ? pack_all(m.pack_columns, m.panel_columns, matrix.data, matrix.row, matrix.column, channels, inputs)
           : pack_all(m.pack_rows, m.panel_rows, matrix.data, matrix.row, matrix.column, channels, inputs);
  const OptionalTensor dense = bias ? OptionalTensor(bias->contiguous()) : bias;
  const float* added = dense ? dense->const_data_ptr<float>() : nullptr;
  const float* from = x.const_data_ptr<float>();
  const int64_t block = last ? BLOCK_ROW_PANELS * m.panel_rows : BLOCK_PANELS * m.panel_columns;
  const int64_t rounded = round_up(channels, last ? m.panel_columns : m.panel_rows);
  const int64_t deepest = std::min(DEPTH, inputs);

  at::parallel_for(0, images * parts, 1, [&](int64_t first_task, int64_t end_task) {
    Strip strip(x, channels, held_rows(options.kernel_size));
    const Floats scratch(deepest * block);
    const Memory memory = zeros(kernels().scratch(whole, false));
    // Project rows [begin, end) of an image into the strip, from its row `to` on.
    const auto project_rows = [&](int64_t image, int64_t begin, int64_t end, int64_t to) {
      const int64_t pixels = (end - begin) * width, all = height * width;
      for (int64_t pixel = 0; pixel < pixels; pixel += block) {
        const int64_t count = std::min(block, pixels - pixel), at = begin * width + pixel;
        for (int64_t k = 0; k < inputs; k += DEPTH) {
          const int64_t deep = std::min(DEPTH, inputs - k);
          const float* panels = packed.data() + k * rounded;
          const float* bias_now = k ? nullptr : added;
          if (last) {
            m.pack_rows(from + (image * all + at) * inputs + k, inputs, 1, count, deep, scratch.data());
            const Tile tile{count, channels, deep, strip.at(to) + pixel * channels, channels, k > 0, nullptr, bias_now};
            m.multiply(tile, scratch.data(), panels, true);
          } else {
            m.pack_columns(from + (image * inputs + k) * all + at, 1, all, count, deep, scratch.data());
            const Tile tile{channels, count, deep, strip.at(to) + pixel, strip.stride(), k > 0, bias_now, nullptr};
            m.multiply(tile, panels, scratch.data(), false);
          }
        }
      }
    };
    for (int64_t task = first_task; task < end_task; ++task) {
      const int64_t image = task / parts, part = task % parts;
      const int64_t first = height * part / parts, end = height * (part + 1) / parts;
      // The strip holds rows [top, next).
      int64_t top = std::max<int64_t>(first - radius, 0), next = top;
      for (int64_t y = first; y < end; y += STRIP_ROWS) {
        const int64_t y_end = std::min(y + STRIP_ROWS, end), below = std::min(y_end + radius, height);
        const int64_t above = std::max<int64_t>(y - radius, 0);
        if (above > top) strip.shift(above - top, next - above);
        top = above;
        project_rows(image, next, below, next - top);
        next = below;
        Problem p = whole;
        p.query = strip.map(0, top);
        if (has_key) p.key = strip.map(outputs, top);
        p.value = strip.map(channels - outputs, top);
        for (int64_t head = 0; head < p.heads; ++head)
          kernels().forward(p, Band{image, head, 0, 0, y, y_end, 0}, memory.data());
      }
    }
  });
  return {output, lse};
}

}  // namespace sasa
