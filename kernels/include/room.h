// Room of a call for numbers, at the beginning of a cache line.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace hfe {

template <typename T>
class Room {
 public:
  Room() = default;
  explicit Room(int64_t count) : numbers_(static_cast<T*>(::operator new[](count * sizeof(T), kAlignment))) {}
  Room(Room&& other) noexcept : numbers_(std::exchange(other.numbers_, nullptr)) {}
  Room& operator=(Room&& other) noexcept {
    std::swap(numbers_, other.numbers_);
    return *this;
  }
  ~Room() { ::operator delete[](numbers_, kAlignment); }

  operator T*() const { return numbers_; }

 private:
  static constexpr std::align_val_t kAlignment = std::align_val_t(64);

  T* numbers_ = nullptr;
};

}  // namespace hfe
