#include "attend.h"

#include <algorithm>

#include "functions.h"
#include "parallel.h"

namespace decode_layer {
namespace {

// Pages of a room that are asked for before they are read; a longer text is a stream.
constexpr int64_t kMostPages = 64;

char* head_at(const CacheView& view, int64_t row, int64_t head) {
  const int64_t place = row * view.row_stride + head * view.head_stride;
  return static_cast<char*>(view.data) + place * row_bytes(view.format, 1);
}

}  // namespace

void attend(const AttendParams& params) {
  const auto attend_head = functions().attend[static_cast<int>(params.keys.format)];
  const int64_t dim = params.head_dim, all = params.rows * params.heads;
  const int64_t bytes = 2 * params.count * row_bytes(params.keys.format, dim);
  for_each_part(all, bytes, [&](int64_t begin, int64_t end) {
    Room<float> room(3 * dim);
    float* const query = room + 2 * dim;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / params.heads, head = i % params.heads, next = std::min(i + 1, end - 1);
      for (int64_t d = 0; d < dim; ++d) query[d] = params.queries[i * dim + d] * params.scale;
      attend_head(head_at(params.keys, row, head), head_at(params.values, row, head),
                  head_at(params.keys, next / params.heads, next % params.heads),
                  head_at(params.values, next / params.heads, next % params.heads), params.count, dim, query,
                  params.mask == nullptr ? nullptr : params.mask + row * params.count, room, params.out + i * dim);
    }
  });
}

void ask_for_tokens(const CacheView& view, int64_t rows, int64_t heads, int64_t head_dim, int64_t count) {
  const int64_t all = rows * heads, most = std::max<int64_t>(1, kMostPages / all) * hfe::kPage;
  const int64_t bytes = std::min(most, count * row_bytes(view.format, head_dim));
  for (int64_t i = 0; i < all; ++i) {
    const char* const at = head_at(view, i / heads, i % heads);
    hfe::touch_pages(at, bytes);
    hfe::prefetch(at + bytes - 1);
  }
}

void write_token(const CacheView& view, const float* vectors, int64_t rows, int64_t heads, int64_t head_dim,
                 int64_t place) {
  const Functions& all = functions();
  const auto write = view.format == Format::float16 ? all.narrow_finite : all.narrow[static_cast<int>(view.format)];
  for (int64_t i = 0; i < rows * heads; ++i) {
    write(vectors + i * head_dim, head_dim,
          head_at(view, i / heads, i % heads) + place * row_bytes(view.format, head_dim));
  }
}

}  // namespace decode_layer
