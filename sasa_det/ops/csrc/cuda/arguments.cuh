// The arguments of a launch, the same for each kernel. ../gpu.cpp fills them in, and so does
// ops/backends/cuda_launches.py, which has the same structure.
#pragma once

struct Map {
  uint16_t* data;
  int64_t image;   // strides in elements; a pixel's channels are adjacent
  int row, col;
};
struct Arguments {
  // Value has the strides of key, and its gradient those of key's gradient. Without a key, key is value.
  Map query, key, value, output, grad, grad_query, grad_key, grad_value;
  const uint16_t *rel_row, *rel_col;
  float *lse, *delta, *partials;
  int height, width, heads, dilation;
  int across, pieces, length;   // strips of a phase, pieces of a strip, chunks of a piece
  int table_stride;             // from head to head: 0 if they share the tables
  float scale, factor, inverse; // factor is scale * log2(e)
  uint32_t zero;                // 0: but the compiler must not know
};
