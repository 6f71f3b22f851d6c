// How a thread reads and writes some neighbouring units of a row of the batch, step after step, in one access where the
// layout allows. For the host too, so that tests can run it there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "aligned_vector.h"
#include "convert.h"
#include "../include/sru_params.h"

namespace sru {

using hfe::AlignedVector;
using hfe::from_bfloat16;
using hfe::from_float16;
using hfe::narrow;
using hfe::size_of;
using hfe::to_bfloat16;
using hfe::to_float16;
using hfe::widen;

// For mixtures of dtypes that no kernel is made for: elements whose dtype is looked up at each access.
struct Any {
  double value;
};

HFE_INLINE double widen(Any value) { return value.value; }

HFE_INLINE Any load_any(DType dtype, const char* from) {
  switch (dtype) {
    case DType::float32: return {*reinterpret_cast<const float*>(from)};
    case DType::float64: return {*reinterpret_cast<const double*>(from)};
    case DType::bfloat16: return {from_bfloat16(*reinterpret_cast<const uint16_t*>(from))};
    default: return {from_float16(*reinterpret_cast<const uint16_t*>(from))};
  }
}

HFE_INLINE void store_any(DType dtype, char* to, Any any) {
  const float value = static_cast<float>(any.value);
  switch (dtype) {
    case DType::float32: *reinterpret_cast<float*>(to) = value; break;
    case DType::float64: *reinterpret_cast<double*>(to) = any.value; break;
    case DType::bfloat16: *reinterpret_cast<uint16_t*>(to) = to_bfloat16(value); break;
    default: *reinterpret_cast<uint16_t*>(to) = to_float16(value);
  }
}

// The steps of a column in the order in which they are worked on.
struct ThreadTile {
  int64_t row, unit, length;
  bool backwards;

  HFE_INLINE int64_t first() const { return backwards ? length - 1 : 0; }
  HFE_INLINE int64_t direction() const { return backwards ? -1 : 1; }
};

// A place in a tensor of elements T that moves with the steps; of no use where there is no tensor.
template <typename T, int V>
class StridedIterator {
 public:
  // `index` is the first step's, among `states` one more or less.
  HFE_INLINE StridedIterator(const TensorView& view, const ThreadTile& tile, int64_t index, int64_t part = 0)
      : dtype_(view.dtype) {
    const int64_t at = tile.row * view.batch_stride + index * view.step_stride + part * view.part_stride + tile.unit;
    place_ = static_cast<char*>(view.data) + at * element();
    stride_ = tile.direction() * view.step_stride * element();
    part_ = view.part_stride * element();
  }

  HFE_INLINE void advance() { place_ += stride_; }

  HFE_INLINE AlignedVector<T, V> load(int part = 0) const {
    const char* from = place_ + part * part_;
    if constexpr (std::is_same_v<T, Any>) {
      static_assert(V == 1);
      AlignedVector<T, V> vector;
      vector.set(0, load_any(dtype_, from));
      return vector;
    } else {
      return *reinterpret_cast<const AlignedVector<T, V>*>(from);
    }
  }

  template <typename S>
  HFE_INLINE void store(const S (&values)[V], int part = 0) const {
    char* to = place_ + part * part_;
    if constexpr (std::is_same_v<T, Any>) {
      store_any(dtype_, to, {static_cast<double>(values[0])});
    } else {
      AlignedVector<T, V> vector;
      for (int v = 0; v < V; ++v) vector.set(v, narrow<T>(values[v]));
      *reinterpret_cast<AlignedVector<T, V>*>(to) = vector;
    }
  }

 private:
  HFE_INLINE int64_t element() const {
    if constexpr (std::is_same_v<T, Any>) {
      return size_of(dtype_);
    } else {
      return sizeof(T);
    }
  }

  char* place_;
  int64_t stride_;
  int64_t part_;
  DType dtype_;
};

// The same for a boolean of each step, as the byte that it is.
class FlagIterator {
 public:
  HFE_INLINE FlagIterator(const BoolView& flags, const ThreadTile& tile)
      : place_(reinterpret_cast<const uint8_t*>(flags.data) + tile.row * flags.batch_stride +
               tile.first() * flags.step_stride),
        stride_(tile.direction() * flags.step_stride) {}

  HFE_INLINE uint8_t load() const { return *place_; }
  HFE_INLINE void advance() { place_ += stride_; }

 private:
  const uint8_t* place_;
  int64_t stride_;
};

}  // namespace sru
