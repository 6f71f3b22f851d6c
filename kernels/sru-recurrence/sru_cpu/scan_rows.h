// TensorView of tensors as the recurrence reads and writes them, in the state's dtype whatever theirs is. Included once for each
// instruction set, inside a namespace and with the compiler's target set, so that it includes nothing itself.

// A chunk's rows have at most so many bytes: long enough for the processor's prefetching, and some twenty rows fit into
// the second-level cache. TensorView of 8 KiB lost a fifth of the backward pass' speed on tensors beyond the last cache.
constexpr int64_t kRowBytes = 16384;

// Units between two looks at memory. TensorView of another dtype pass through buffers of this size: with longer ones reading
// and computing took turns, and bfloat16 lost a third of its speed.
constexpr int64_t kBlock = 128;

template <typename S>
struct Row {
  alignas(64) S buffer[kRowBytes / sizeof(S)];
};

template <typename S>
struct Block {
  alignas(64) S buffer[kBlock];
};

template <typename S>
constexpr DType dtype_of() {
  return sizeof(S) == 8 ? DType::float64 : DType::float32;
}

inline int64_t offset(const TensorView& view, int64_t row, int64_t step, int64_t part, int64_t first) {
  return row * view.batch_stride + step * view.step_stride + part * view.part_stride + first;
}

// Part of a row in the state's dtype: itself where it has it, else converted.
template <typename S>
const S* read(const TensorView& view, int64_t at, int64_t count, Block<S>& spare) {
  if (view.dtype == dtype_of<S>()) return static_cast<const S*>(view.data) + at;
  S* __restrict to = spare.buffer;
  if (view.dtype == DType::bfloat16) {
    const uint16_t* __restrict from = static_cast<const uint16_t*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
  } else if (view.dtype == DType::float16) {
    const uint16_t* __restrict from = static_cast<const uint16_t*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_float16(from[i]);
  } else if (view.dtype == DType::float32) {
    const float* __restrict from = static_cast<const float*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    const double* __restrict from = static_cast<const double*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(from[i]);
  }
  return to;
}

// Where to write part of a row; `finish` brings it to its place if that is a buffer.
template <typename S>
S* place(const TensorView& view, int64_t at, Block<S>& spare) {
  return view.dtype == dtype_of<S>() ? static_cast<S*>(view.data) + at : spare.buffer;
}

template <typename S>
void finish(const TensorView& view, int64_t at, int64_t count, const Block<S>& spare) {
  if (view.dtype == dtype_of<S>()) return;
  const S* __restrict from = spare.buffer;
  if (view.dtype == DType::bfloat16) {
    uint16_t* __restrict to = static_cast<uint16_t*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(static_cast<float>(from[i]));
  } else if (view.dtype == DType::float16) {
    uint16_t* __restrict to = static_cast<uint16_t*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = to_float16(static_cast<float>(from[i]));
  } else if (view.dtype == DType::float32) {
    float* __restrict to = static_cast<float*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  } else {
    double* __restrict to = static_cast<double*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

template <typename S>
void fill(S* __restrict to, int64_t count, S value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <typename S>
void copy(S* __restrict to, const S* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}
