#include "attend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "cpu_dispatch.h"

namespace decode_layer {
namespace {

struct HeadFunctions {
  void (*attend)(const void* keys, const void* values, const void* next_keys, const void* next_values, int64_t count,
                 int64_t dim, const float* query, const float* mask, float* room, float* out);
  void (*narrow)(const float* from, int64_t count, void* to);
};

struct AttendFunctions {
  HeadFunctions float32, bfloat16, float16;
};

#define HFE_LOOPS "../decode_layer_cpu/attend_loops.h"
#include "every_instruction_set.h"

const HeadFunctions& functions_of(hfe::DType dtype) {
  static const LoopsCapability choice = hfe::choose_capability(available(), "DECODE_LAYER_CPU_CAPABILITY");
  const AttendFunctions& all = choice.functions;
  return dtype == hfe::DType::float32 ? all.float32 : dtype == hfe::DType::bfloat16 ? all.bfloat16 : all.float16;
}

char* head_at(const KeyRoom& room, int64_t row, int64_t head) {
  const int64_t place = row * room.row_stride + head * room.head_stride;
  return static_cast<char*>(room.data) + place * hfe::size_of(room.dtype);
}

// Bytes that are worth a thread: some ten microseconds.
constexpr int64_t kGrainBytes = 1 << 18;

}  // namespace

void attend(const AttendParams& params) {
  const HeadFunctions& functions = functions_of(params.keys.dtype);
  const int64_t dim = params.head_dim, all = params.rows * params.heads;
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> room(3 * dim);
    float* const query = room.data() + 2 * dim;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / params.heads, head = i % params.heads, next = std::min(i + 1, end - 1);
      for (int64_t d = 0; d < dim; ++d) query[d] = params.queries[i * dim + d] * params.scale;
      functions.attend(head_at(params.keys, row, head), head_at(params.values, row, head),
                       head_at(params.keys, next / params.heads, next % params.heads),
                       head_at(params.values, next / params.heads, next % params.heads), params.count, dim, query,
                       params.mask == nullptr ? nullptr : params.mask + row * params.count, room.data(),
                       params.out + i * dim);
    }
  };
  const int64_t bytes = std::max<int64_t>(1, 2 * params.count * dim * hfe::size_of(params.keys.dtype));
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / bytes);
  if (all <= grain || torch::stable::get_num_threads() == 1) {
    work(0, all);
  } else {
    torch::stable::parallel_for(0, all, grain, work);
  }
}

void write_token(const KeyRoom& room, const float* vectors, int64_t rows, int64_t heads, int64_t head_dim,
                 int64_t place) {
  const HeadFunctions& functions = functions_of(room.dtype);
  for (int64_t i = 0; i < rows * heads; ++i) {
    functions.narrow(vectors + i * head_dim, head_dim,
                     head_at(room, i / heads, i % heads) + place * head_dim * hfe::size_of(room.dtype));
  }
}

}  // namespace decode_layer
