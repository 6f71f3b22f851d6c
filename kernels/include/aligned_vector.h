// Neighbouring elements that a GPU loads and stores in one access of up to 128 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace hfe {

// The widest access is 16 bytes; what is larger takes several.
constexpr size_t kAccess = 16;

// V elements as they lie in memory. They are taken apart only where they are used: taking them apart where they are
// loaded would wait for the load.
template <typename T, int V>
class alignas(sizeof(T) * V < kAccess ? sizeof(T) * V : kAccess) AlignedVector {
 public:
  HFE_INLINE T at(int v) const {
    if constexpr (sizeof(T) == 8) {
      return same_bits<T>(static_cast<uint64_t>(words_[2 * v + 1]) << 32 | words_[2 * v]);
    } else if constexpr (sizeof(T) == 4) {
      return same_bits<T>(words_[v]);
    } else {
      return {static_cast<uint16_t>(words_[v / 2] >> v % 2 * 16)};
    }
  }

  HFE_INLINE void set(int v, T value) {
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

}  // namespace hfe
