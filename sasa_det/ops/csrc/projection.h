// The projections of a layer: one matrix product per image, and two for the gradients; matmul.h multiplies.
//
// A map is (B, C, H, W), contiguous or channels_last. A weight is (outputs, inputs). All is float.
//
//     contiguous       Y[image] = W X[image]         dX[image] = W^T dY[image]       dW = sum of dY[image] X[image]^T
//     channels_last    Y = X W^T                     dX = dY W                       dW = dY^T X
//
// In channels_last the pixels of all images are the rows of one matrix.
#pragma once
#include <ATen/ops/empty.h>

#include <algorithm>

#include "launch.h"

namespace sasa {

// Depth of a block. A panel of B of this depth is about as large as the first-level cache, and a block of a few
// panels stays in the second-level cache.
constexpr int64_t DEPTH = 384;
constexpr int64_t BLOCK_PANELS = 4;      // of B, in a block of a contiguous map
constexpr int64_t BLOCK_ROW_PANELS = 12; // of A, in a block of a channels_last map
// Pixels of a block of dW. Shorter pieces of rows take longer to read from memory.
constexpr int64_t WEIGHT_DEPTH = 512;
constexpr int64_t MOST_PARTS = 16;       // of dW, each summed by itself

struct Matrix {
  const float* data;
  int64_t row, column;  // strides
};

inline Matrix transposed(const Matrix& m) { return {m.data, m.column, m.row}; }

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

class Floats {
 public:
  explicit Floats(int64_t count) : memory_(count * int64_t(sizeof(float))) {}
  float* data() const { return static_cast<float*>(memory_.data()); }

 private:
  Memory memory_;
};

// Whether all pixels of all images have their channels side by side.
inline bool is_channels_last(const Tensor& x) {
  return !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// Pack lines for all blocks of the depth, on all threads. The panels of the first block come first.
inline Floats pack_all(decltype(Multiplication::pack_rows) pack, int64_t width, const float* data, int64_t line,
                       int64_t step, int64_t lines, int64_t depth) {
  Floats packed(round_up(lines, width) * depth);
  at::parallel_for(0, divide_up(lines, width), 8, [&](int64_t first, int64_t end) {
    const int64_t count = std::min(end * width, lines) - first * width;
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t deep = std::min(DEPTH, depth - k);
      pack(data + first * width * line + k * step, line, step, count, deep,
           packed.data() + k * round_up(lines, width) + first * width * deep);
    }
  });
  return packed;
}

// result[image] = a * b[image] + bias of each row, for images whose rows are dense.
inline void multiply_images(const Matrix& a, int64_t rows, int64_t depth, const Tensor& b, const float* bias,
                            const Tensor& result) {
  const Multiplication& m = kernels().multiplication;
  const int64_t images = b.size(0), columns = b.size(2) * b.size(3), threads = at::get_num_threads();
  const Floats packed = pack_all(m.pack_rows, m.panel_rows, a.data, a.row, a.column, rows, depth);
  const int64_t panels = divide_up(columns, m.panel_columns);
  // Blocks are smaller, and are cut by rows, too, where there would be too few.
  const int64_t block = std::clamp<int64_t>(images * panels / (2 * threads), 1, BLOCK_PANELS) * m.panel_columns;
  const int64_t blocks = divide_up(columns, block);
  const int64_t row_panels = divide_up(rows, m.panel_rows);
  const int64_t cuts = std::clamp<int64_t>(divide_up(threads, images * blocks), 1, row_panels);
  const float* from = b.const_data_ptr<float>();
  float* to = result.data_ptr<float>();
  at::parallel_for(0, images * blocks * cuts, 1, [&](int64_t first_task, int64_t end_task) {
    const Floats scratch(std::min(DEPTH, depth) * block);
    for (int64_t task = first_task; task < end_task; ++task) {
      const int64_t image = task / cuts / blocks, column = task / cuts % blocks * block, cut = task % cuts;
      const int64_t row = row_panels * cut / cuts * m.panel_rows;
      const int64_t end_row = std::min(row_panels * (cut + 1) / cuts * m.panel_rows, rows);
      const int64_t width = std::min(block, columns - column);
      for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = std::min(DEPTH, depth - k);
        m.pack_columns(from + (image * depth + k) * columns + column, 1, columns, width, deep, scratch.data());
        const Tile tile{end_row - row, width, deep, to + (image * rows + row) * columns + column, columns,
                        k > 0, bias && !k ? bias + row : nullptr};
        m.multiply(tile, packed.data() + k * row_panels * m.panel_rows + row * deep, scratch.data(), false);
      }
    }
  });
}

// result = a * b + bias of each column, where the rows of a and of the result are pixels.
inline void multiply_pixels(const float* a, int64_t rows, int64_t depth, const Matrix& b, int64_t columns,
                            const float* bias, float* result) {
  const Multiplication& m = kernels().multiplication;
  const Floats packed = pack_all(m.pack_columns, m.panel_columns, b.data, b.column, b.row, columns, depth);
  const int64_t panels = divide_up(rows, m.panel_rows), threads = at::get_num_threads();
  const int64_t block = std::clamp<int64_t>(panels / (2 * threads), 1, BLOCK_ROW_PANELS) * m.panel_rows;
  at::parallel_for(0, divide_up(rows, block), 1, [&](int64_t first_task, int64_t end_task) {
    const Floats scratch(std::min(DEPTH, depth) * block);
    for (int64_t row = first_task * block; row < std::min(end_task * block, rows); row += block) {
      const int64_t height = std::min(block, rows - row);
      for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = std::min(DEPTH, depth - k);
        m.pack_rows(a + row * depth + k, depth, 1, height, deep, scratch.data());
        const Tile tile{height, columns, deep, result + row * columns, columns, k > 0, nullptr,
                        k ? nullptr : bias};
        m.multiply(tile, scratch.data(), packed.data() + k * round_up(columns, m.panel_columns), true);
      }
    }
  });
}

// result = sum over images of a[image] * b[image], of which all have `depth` columns or rows.
//
// The depth is cut into parts that do not depend on the number of threads, and so does no bit of the result.
inline void multiply_and_sum(const Matrix& a, int64_t a_image, int64_t rows, const Matrix& b, int64_t b_image,
                             int64_t columns, int64_t images, int64_t depth, float* result) {
  const Multiplication& m = kernels().multiplication;
  const int64_t steps = divide_up(depth, WEIGHT_DEPTH), all = images * steps, threads = at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(all / 4, 1, MOST_PARTS), size = rows * columns;
  const int64_t panels = divide_up(rows, m.panel_rows);
  const int64_t cuts = std::clamp<int64_t>(divide_up(threads, parts), 1, panels);
  const Floats partial(parts > 1 ? parts * size : 0);
  float* to = parts > 1 ? partial.data() : result;
  const int64_t block = BLOCK_ROW_PANELS * m.panel_rows;
  at::parallel_for(0, parts * cuts, 1, [&](int64_t first_task, int64_t end_task) {
    const int64_t deepest = std::min(WEIGHT_DEPTH, depth);
    const Floats left(block * deepest), right(round_up(columns, m.panel_columns) * deepest);
    for (int64_t task = first_task; task < end_task; ++task) {
      const int64_t part = task / cuts, cut = task % cuts, first = all * part / parts;
      const int64_t first_row = panels * cut / cuts * m.panel_rows;
      const int64_t end_row = std::min(panels * (cut + 1) / cuts * m.panel_rows, rows);
      for (int64_t step = first; step < all * (part + 1) / parts; ++step) {
        const int64_t image = step / steps, k = step % steps * WEIGHT_DEPTH;
        const int64_t deep = std::min(WEIGHT_DEPTH, depth - k);
        m.pack_columns(b.data + image * b_image + k * b.row, b.column, b.row, columns, deep, right.data());
        const auto multiply = [&](const float* panels, int64_t row, int64_t height, int64_t a_row) {
          Tile tile{height, columns, deep, to + part * size + row * columns, columns, step > first};
          tile.a_row = a_row;
          m.multiply(tile, panels, right.data(), true);
        };
        const float* from = a.data + image * a_image + k * a.column;
        for (int64_t row = first_row; row < end_row; row += block) {
          const int64_t height = std::min(block, end_row - row);
          // Rows of pixels are read once for each panel of B, which are few, so they need not be packed.
          const int64_t whole = a.column == 1 ? height / m.panel_rows * m.panel_rows : 0;
          if (whole) multiply(from + row * a.row, row, whole, a.row);
          if (whole == height) continue;
          m.pack_rows(from + (row + whole) * a.row, a.row, a.column, height - whole, deep, left.data());
          multiply(left.data(), row + whole, height - whole, 0);
        }
      }
    }
  });
  if (parts == 1) return;
  at::parallel_for(0, size, 4096, [&](int64_t first, int64_t end) {
    std::copy(to + first, to + end, result + first);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t n = first; n < end; ++n) result[n] += to[part * size + n];
  });
}

// ---- From tensors. ----

inline void check_projection(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const auto fits = [](const Tensor& t) { return t.is_cpu() && t.scalar_type() == at::kFloat; };
  TORCH_CHECK(fits(x) && fits(weight) && (!bias || fits(*bias)), "a projection takes float32 on the CPU");
  TORCH_CHECK(x.dim() == 4 && weight.dim() == 2 && x.size(1) == weight.size(1), "x is ", x.sizes(),
              ", and the weight ", weight.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "the bias does not fit the weight");
}

inline at::MemoryFormat layout(const Tensor& x) {
  return is_channels_last(x) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline Matrix as_matrix(const Tensor& weight) {
  return {weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1)};
}

// The pixels of every stride-th row and column of a map, in its layout.
inline Tensor strided(const Tensor& x, int64_t stride) {
  if (stride == 1) return x;
  return x.slice(2, 0, x.size(2), stride).slice(3, 0, x.size(3), stride).contiguous(layout(x));
}

// A map of so many channels, of the size and layout of x.
inline Tensor empty_map(const Tensor& x, int64_t channels) {
  const Tensor y = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options().memory_format(layout(x)));
  if (y.nbytes() >= HUGE_FROM) ask_for_huge_pages(y.data_ptr(), y.nbytes());
  return y;
}

// A map of `outputs` channels, each pixel's the product of the weight and the channels of x.
inline Tensor apply(const Matrix& weight, const Tensor& map, const OptionalTensor& bias, int64_t outputs) {
  const Tensor x = map.contiguous(layout(map));
  const int64_t inputs = x.size(1);
  const Tensor y = empty_map(x, outputs);
  if (!y.numel()) return y;
  if (!inputs) return bias ? y.copy_(bias->view({1, -1, 1, 1})) : y.zero_();
  const OptionalTensor dense = bias ? OptionalTensor(bias->contiguous()) : bias;
  const float* added = dense ? dense->const_data_ptr<float>() : nullptr;
  if (is_channels_last(x))
    multiply_pixels(x.const_data_ptr<float>(), x.numel() / inputs, inputs, transposed(weight), outputs, added,
                    y.data_ptr<float>());
  else
    multiply_images(weight, outputs, inputs, x, added, y);
  return y;
}

inline Tensor project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_projection(x, weight, bias);
  return apply(as_matrix(weight), x, bias, weight.size(0));
}

inline Tensor project_back(const Tensor& grad, const Tensor& weight) {
  check_projection(grad, weight.t(), OptionalTensor());
  return apply(transposed(as_matrix(weight)), grad, OptionalTensor(), weight.size(1));
}

inline Tensor weight_gradient(const Tensor& grad, const Tensor& map) {
  const Tensor result = at::zeros({grad.size(1), map.size(1)}, map.options());
  check_projection(map, result, OptionalTensor());
  TORCH_CHECK(grad.dim() == 4 && grad.is_cpu() && grad.scalar_type() == at::kFloat &&
                  grad.size(0) == map.size(0) && grad.size(2) == map.size(2) && grad.size(3) == map.size(3),
              "the gradient, ", grad.sizes(), ", does not fit the map, ", map.sizes());
  if (!grad.numel() || !map.numel()) return result;
  const Tensor x = map.contiguous(layout(map)), dy = grad.contiguous(layout(x));
  const int64_t outputs = dy.size(1), inputs = x.size(1), pixels = x.size(2) * x.size(3);
  const float *left = dy.const_data_ptr<float>(), *right = x.const_data_ptr<float>();
  if (is_channels_last(x))
    multiply_and_sum({left, 1, outputs}, 0, outputs, {right, inputs, 1}, 0, inputs, 1, x.size(0) * pixels,
                     result.data_ptr<float>());
  else
    multiply_and_sum({left, pixels, 1}, outputs * pixels, outputs, {right, 1, pixels}, inputs * pixels, inputs,
                     x.size(0), pixels, result.data_ptr<float>());
  return result;
}

}  // namespace sasa
