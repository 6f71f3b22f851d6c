#include "attend.h"

#include <algorithm>

#include "functions.h"
#include "parallel.h"

namespace decode_layer {
namespace {

// Pages of a room that are asked for before they are read; a longer text is a stream.
constexpr int64_t kMostPages = 64;

}  // namespace

char* head_at(const CacheView& view, int64_t row, int64_t head) {
  const int64_t place = row * view.row_stride + head * view.head_stride;
  return static_cast<char*>(view.data) + place * row_bytes(view.format, 1);
}

void attend(const AttendParams& params) {
  const int64_t dim = params.head_dim, all = params.rows * params.heads;
  const KeyPart* parts[2];
  int64_t used = 0, bytes = 0, keys = 0;
  for (const KeyPart& part : params.parts) {
    if (part.count == 0) continue;
    parts[used++] = &part;
    bytes += 2 * part.count * row_bytes(part.keys.format, dim);
    keys += part.count;
  }
  for_each_part(all, bytes, [&](int64_t begin, int64_t end) {
    Room<float> room(3 * dim);
    float* const query = room + 2 * dim;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / params.heads;
      for (int64_t d = 0; d < dim; ++d) query[d] = params.queries[i * dim + d] * params.scale;
      float* const out = params.out + i * dim;
      std::fill_n(out, dim, 0.0f);
      const float* mask = params.mask == nullptr ? nullptr : params.mask + row * keys;
      SoftmaxTotals totals;
      for (int64_t p = 0; p < used; ++p) {
        // What is read next: this head's keys of the other part, or the next head's of the first one.
        const bool is_last = p + 1 == used;
        const KeyPart &part = *parts[p], &following = *parts[is_last ? 0 : p + 1];
        const int64_t next = is_last ? std::min(i + 1, end - 1) : i;
        const auto at = [&](const CacheView& view, int64_t j) {
          return head_at(view, j / params.heads, j % params.heads);
        };
        functions().attend[static_cast<int>(part.keys.format)](
            at(part.keys, i), at(part.values, i), at(following.keys, next), at(following.values, next), part.count, dim,
            query, mask, room, out, totals);
        if (mask != nullptr) mask += part.count;
      }
      const float inverse = totals.sum == 0.0f ? 0.0f : 1.0f / totals.sum;
      for (int64_t d = 0; d < dim; ++d) out[d] *= inverse;
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

void write_vector(const CacheView& view, const float* vector, int64_t count, int64_t row, int64_t head, int64_t place) {
  const Functions& all = functions();
  const auto write = view.format == Format::float16 ? all.narrow_finite : all.narrow[static_cast<int>(view.format)];
  write(vector, count, head_at(view, row, head) + place * row_bytes(view.format, count));
}

void write_token(const CacheView& view, const float* vectors, int64_t rows, int64_t heads, int64_t head_dim,
                 int64_t place) {
  for (int64_t i = 0; i < rows * heads; ++i) {
    write_vector(view, vectors + i * head_dim, head_dim, i / heads, i % heads, place);
  }
}

}  // namespace decode_layer
