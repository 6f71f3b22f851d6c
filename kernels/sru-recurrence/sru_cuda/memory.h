// How a thread reads and writes some neighbouring units of a row of the batch, step after step, in one access where the
// layout allows. For the host too, so that tests can run it there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../include/convert.h"
#include "../include/sru_problem.h"

namespace sru {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// For mixtures of dtypes that no kernel is made for: elements whose dtype is looked up at each access.
struct Any {
  double value;
};

SRU_INLINE float widen(float value) { return value; }
SRU_INLINE double widen(double value) { return value; }
SRU_INLINE float widen(BFloat16 value) { return from_bfloat16(value.bits); }
SRU_INLINE float widen(Float16 value) { return from_float16(value.bits); }
SRU_INLINE double widen(Any value) { return value.value; }

template <typename T, typename S>
SRU_INLINE T narrow(S value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {to_bfloat16(static_cast<float>(value))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {to_float16(static_cast<float>(value))};
  } else if constexpr (std::is_same_v<T, Any>) {
    return {static_cast<double>(value)};
  } else {
    return static_cast<T>(value);
  }
}

// The widest access is 16 bytes; what is larger takes several.
constexpr size_t kAccess = 16;

// V elements as they lie in memory. They are taken apart only where they are used: taking them apart where they are
// loaded would wait for the load.
template <typename T, int V>
class alignas(sizeof(T) * V < kAccess ? sizeof(T) * V : kAccess) Pack {
 public:
  SRU_INLINE T at(int v) const {
    if constexpr (sizeof(T) == 8) {
      return same_bits<T>(static_cast<uint64_t>(words_[2 * v + 1]) << 32 | words_[2 * v]);
    } else if constexpr (sizeof(T) == 4) {
      return same_bits<T>(words_[v]);
    } else {
      return {static_cast<uint16_t>(words_[v / 2] >> v % 2 * 16)};
    }
  }

  SRU_INLINE void set(int v, T value) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = same_bits<uint64_t>(value);
      words_[2 * v] = static_cast<uint32_t>(bits);
      words_[2 * v + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      words_[v] = same_bits<uint32_t>(value);
    } else {
      words_[v / 2] |= static_cast<Word>(value.bits << v % 2 * 16);
    }
  }

 private:
  using Word = std::conditional_t<(sizeof(T) * V < 4), uint16_t, uint32_t>;
  Word words_[sizeof(T) * V / sizeof(Word)] = {};
};

SRU_INLINE int64_t size_of(Kind kind) {
  return kind == Kind::float64 ? 8 : kind == Kind::float32 ? 4 : 2;
}

SRU_INLINE Any load_any(Kind kind, const char* from) {
  switch (kind) {
    case Kind::float32: return {*reinterpret_cast<const float*>(from)};
    case Kind::float64: return {*reinterpret_cast<const double*>(from)};
    case Kind::bfloat16: return {from_bfloat16(*reinterpret_cast<const uint16_t*>(from))};
    default: return {from_float16(*reinterpret_cast<const uint16_t*>(from))};
  }
}

SRU_INLINE void store_any(Kind kind, char* to, Any any) {
  const float value = static_cast<float>(any.value);
  switch (kind) {
    case Kind::float32: *reinterpret_cast<float*>(to) = value; break;
    case Kind::float64: *reinterpret_cast<double*>(to) = any.value; break;
    case Kind::bfloat16: *reinterpret_cast<uint16_t*>(to) = to_bfloat16(value); break;
    default: *reinterpret_cast<uint16_t*>(to) = to_float16(value);
  }
}

// The steps of a column in the order in which they are worked on.
struct Walk {
  int64_t row, unit, length;
  bool backwards;

  SRU_INLINE int64_t first() const { return backwards ? length - 1 : 0; }
  SRU_INLINE int64_t direction() const { return backwards ? -1 : 1; }
};

// A place in a tensor of elements T that moves with the steps; of no use where there is no tensor.
template <typename T, int V>
class Cursor {
 public:
  // `index` is the first step's, among `states` one more or less.
  SRU_INLINE Cursor(const Rows& rows, const Walk& walk, int64_t index, int64_t part = 0) : kind_(rows.kind) {
    const int64_t at = walk.row * rows.batch_stride + index * rows.step_stride + part * rows.part_stride + walk.unit;
    place_ = static_cast<char*>(rows.data) + at * element();
    stride_ = walk.direction() * rows.step_stride * element();
    part_ = rows.part_stride * element();
  }

  SRU_INLINE void advance() { place_ += stride_; }

  SRU_INLINE Pack<T, V> load(int part = 0) const {
    const char* from = place_ + part * part_;
    if constexpr (std::is_same_v<T, Any>) {
      static_assert(V == 1);
      Pack<T, V> pack;
      pack.set(0, load_any(kind_, from));
      return pack;
    } else {
      return *reinterpret_cast<const Pack<T, V>*>(from);
    }
  }

  template <typename S>
  SRU_INLINE void store(const S (&values)[V], int part = 0) const {
    char* to = place_ + part * part_;
    Pack<T, V> pack;
    for (int v = 0; v < V; ++v) pack.set(v, narrow<T>(values[v]));
    if constexpr (std::is_same_v<T, Any>) {
      store_any(kind_, to, pack.at(0));
    } else {
      *reinterpret_cast<Pack<T, V>*>(to) = pack;
    }
  }

 private:
  SRU_INLINE int64_t element() const {
    if constexpr (std::is_same_v<T, Any>) {
      return size_of(kind_);
    } else {
      return sizeof(T);
    }
  }

  char* place_;
  int64_t stride_;
  int64_t part_;
  Kind kind_;
};

// The same for a boolean of each step, as the byte that it is.
class FlagCursor {
 public:
  SRU_INLINE FlagCursor(const Flags& flags, const Walk& walk)
      : place_(reinterpret_cast<const uint8_t*>(flags.data) + walk.row * flags.batch_stride +
               walk.first() * flags.step_stride),
        stride_(walk.direction() * flags.step_stride) {}

  SRU_INLINE uint8_t load() const { return *place_; }
  SRU_INLINE void advance() { place_ += stride_; }

 private:
  const uint8_t* place_;
  int64_t stride_;
};

}  // namespace sru
