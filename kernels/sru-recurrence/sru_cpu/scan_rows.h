// Rows of tensors as the recurrence reads and writes them. Included once for each instruction set, after lanes.h and in
// the same way; includes nothing itself.

// A chunk's rows have at most so many bytes: long enough for the processor's prefetching, and what is kept of a chunk
// fits into the second-level cache. Rows of 2 to 8 KiB lost a tenth to a half of the speed on tensors beyond the last
// cache.
constexpr int64_t kRowBytes = 16384;

// Units that stand together in a table: a cache line of float32, and the most lanes that there are.
constexpr int64_t kGroup = 16;

// Units between two looks at memory where rows pass through buffers. With longer ones reading and computing took turns.
constexpr int64_t kBlock = 128;

// dtypes of the state, of u and its gradient, and of x, h and their gradients.
template <typename State, typename Input, typename Highway>
struct Types {
  using S = State;
  using U = Input;
  using X = Highway;
};

// Numbers that are computed with at once, and how many.
template <typename S>
using Vector = std::conditional_t<std::is_same_v<S, float>, Lanes, S>;
template <typename S>
constexpr int64_t kWidth = std::is_same_v<S, float> ? kLanes : 1;

HFE_INLINE double load(const double* from) { return *from; }
HFE_INLINE void store(double* to, double x) { *to = x; }

// Steps of units from which on a chunk's rows outgrow the second-level cache, so that fetching ahead pays: fewer are
// there already, and asking for them would cost the forward pass a twenty-fifth.
constexpr int64_t kFetchUnits = 65536;

// Asks for `Count` units of a row that the next step reads or writes, to have them in the second-level cache by then.
// The processor's own prefetching stops at the end of each page of memory, and each of a dozen rows starts anew there.
// A step ahead is far enough; into the first-level cache, where a dozen rows compete for few lines, nothing is gained.
template <int64_t Count, typename T>
HFE_INLINE void fetch(const T* row) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < Count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// How a vector's numbers are read and written: all of them, or as many as are left of a row.
struct Whole {
  template <typename T>
  HFE_INLINE auto read(const T* from) const {
    return load(from);
  }
  template <typename T, typename V>
  HFE_INLINE void write(T* to, V x) const {
    store(to, x);
  }
};

struct Part {
  int64_t count;

  template <typename T>
  HFE_INLINE auto read(const T* from) const {
    T numbers[kLanes] = {};
    memcpy(numbers, from, count * sizeof(T));
    return load(numbers);
  }
  template <typename T, typename V>
  HFE_INLINE void write(T* to, V x) const {
    T numbers[kLanes];
    store(numbers, x);
    memcpy(to, numbers, count * sizeof(T));
  }
};

// Calls `work(access, group, i)` for all vectors of `count` units: from the i-th unit of a group on.
template <typename S, typename Work>
HFE_INLINE void for_each_vector(int64_t count, const Work& work) {
  int64_t group = 0;
  for (; group + kGroup <= count; group += kGroup) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kGroup; i += kWidth<S>) work(Whole(), group, i);
  }
  for (int64_t i = 0; group + i < count; i += kWidth<S>) {
    if constexpr (kWidth<S> == 1) {
      work(Whole(), group, i);
    } else {
      work(Part{std::min(kWidth<S>, count - group - i)}, group, i);
    }
  }
}

template <typename T>
void write_all(T* __restrict to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <typename T>
void copy(T* __restrict to, const T* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Some numbers for each unit of a chunk: the first of all units of a group, then the second of these, and so on. In
// rows of their own, all would stand at one place in their memory pages, and compete for a few lines of the cache.
template <typename S, int64_t N>
class Table {
 public:
  HFE_INLINE S* at(int64_t group, int64_t i, int64_t column) { return numbers_ + group * N + column * kGroup + i; }

  // Units from `start`, which begins a group, up to `end`, and what is left of the last group.
  void fill(int64_t column, int64_t start, int64_t end, S value) {
    for (int64_t group = start; group < end; group += kGroup) write_all(at(group, 0, column), kGroup, value);
  }
  void set(int64_t column, int64_t count, const S* from) {
    each(column, 0, count, [&](S* numbers, int64_t unit, int64_t some) { copy(numbers, from + unit, some); });
  }
  void get(int64_t column, int64_t start, int64_t end, S* to) {
    each(column, start, end, [&](S* numbers, int64_t unit, int64_t some) { copy(to + unit - start, numbers, some); });
  }
  void add(int64_t column, int64_t start, int64_t end, const S* from) {
    each(column, start, end, [&](S* numbers, int64_t unit, int64_t some) {
      for (int64_t i = 0; i < some; ++i) numbers[i] += from[unit - start + i];
    });
  }

 private:
  // A column's numbers for each group; whole groups are of a size that the compiler knows.
  template <typename Work>
  HFE_INLINE void each(int64_t column, int64_t start, int64_t end, const Work& work) {
    int64_t group = start;
    for (; group + kGroup <= end; group += kGroup) work(at(group, 0, column), group, kGroup);
    if (group < end) work(at(group, 0, column), group, end - group);
  }

  alignas(64) S numbers_[N * kRowBytes / sizeof(S)];
};

// What is read where nothing is given, in any dtype.
alignas(64) const unsigned char kZeroBytes[kRowBytes] = {};
const void* const kZeros = kZeroBytes;

template <typename S>
struct Block {
  alignas(64) S buffer[kBlock];
};

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return DType::bfloat16;
  } else if constexpr (std::is_same_v<T, Float16>) {
    return DType::float16;
  } else {
    return sizeof(T) == 8 ? DType::float64 : DType::float32;
  }
}

inline int64_t offset(const TensorView& view, int64_t row, int64_t step, int64_t part, int64_t first) {
  return row * view.batch_stride + step * view.step_stride + part * view.part_stride + first;
}

// Part of a row in dtype T: itself where it has it, else converted.
template <typename T>
const T* read(const TensorView& view, int64_t at, int64_t count, Block<T>& spare) {
  if constexpr (std::is_floating_point_v<T>) {
    if (view.dtype == dtype_of<T>()) return static_cast<const T*>(view.data) + at;
    T* __restrict to = spare.buffer;
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
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
    }
    return to;
  } else {
    return static_cast<const T*>(view.data) + at;
  }
}

// Where to write part of a row; `finish` brings it to its place if that is a buffer.
template <typename T>
T* place(const TensorView& view, int64_t at, Block<T>& spare) {
  return view.dtype == dtype_of<T>() ? static_cast<T*>(view.data) + at : spare.buffer;
}

template <typename T>
void finish(const TensorView& view, int64_t at, int64_t count, const Block<T>& spare) {
  if constexpr (std::is_floating_point_v<T>) {
    if (view.dtype == dtype_of<T>()) return;
    const T* __restrict from = spare.buffer;
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
}
