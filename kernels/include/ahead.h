// Memory that is asked for before it is needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace hfe {

constexpr int64_t kLine = 64;

// How far ahead of where it is read a stream of rows is asked for.
constexpr int64_t kAheadBytes = 3072;

HFE_INLINE void prefetch(const char* at) { __builtin_prefetch(at, 0, 2); }

// The lines of `bytes` bytes at `at`; asking for what does not exist does no harm.
HFE_INLINE void touch_lines(const void* at, int64_t bytes) {
  const char* const from = static_cast<const char*>(at);
  for (int64_t i = 0; i < bytes; i += kLine) prefetch(from + i);
}

// Those that lie `kAheadBytes` behind `at`.
HFE_INLINE void prefetch_ahead(const void* at, int64_t bytes) {
  touch_lines(static_cast<const char*>(at) + kAheadBytes, bytes);
}

constexpr int64_t kPage = 4096;

// One line of each page. Where the processor does not know a page yet, asking for it takes long and holds up what comes
// after it; but it looks up several pages at a time.
HFE_INLINE void touch_pages(const void* at, int64_t bytes) {
  const char* const from = static_cast<const char*>(at);
  for (int64_t i = 0; i < bytes; i += kPage) prefetch(from + i);
}

// Rows that are asked for a few lines at a time while other work goes on: all at once, they would hold up what is read
// meanwhile.
class Ahead {
 public:
  // At most so many rows.
  static constexpr int64_t kMost = 16;

  void clear() { count_ = next_ = 0, lines_ = 0, per_step_ = 0; }

  void add(const void* row, int64_t bytes) {
    const char* const at = static_cast<const char*>(row);
    const char* const first = at - reinterpret_cast<uintptr_t>(at) % kLine;
    const int64_t lines = (at + bytes - first + kLine - 1) / kLine;
    touch_pages(at, bytes);
    prefetch(at + bytes - 1);
    rows_[count_++] = {first, lines};
    lines_ += lines;
  }

  // Divides what was added among so many calls of `step`; there may be none.
  void spread(int64_t steps) { per_step_ = (lines_ + steps - 1) / std::max<int64_t>(1, steps); }

  HFE_INLINE void step() {
    for (int64_t left = per_step_; left > 0 && next_ < count_; ++next_) {
      Row& row = rows_[next_];
      const int64_t some = std::min(left, row.lines);
      for (int64_t i = 0; i < some; ++i) prefetch(row.at + i * kLine);
      row.at += some * kLine;
      row.lines -= some;
      left -= some;
      if (row.lines > 0) return;
    }
  }

 private:
  struct Row {
    const char* at;
    int64_t lines;
  };

  Row rows_[kMost];
  int64_t count_ = 0, next_ = 0, lines_ = 0, per_step_ = 0;
};

// Weights that are read next, in their order, for work that leaves memory idle: it takes a stretch at a time and asks for
// its lines. No more than a near cache keeps until they are read.
class Upcoming {
 public:
  static constexpr int64_t kMost = 8, kMostBytes = 5 << 17;

  void add(const void* weights, int64_t bytes) {
    bytes = std::min(bytes, kMostBytes - bytes_);
    if (bytes <= 0 || count_ == kMost) return;
    stretches_[count_++] = {static_cast<const char*>(weights), bytes};
    bytes_ += bytes;
  }

  // At most `bytes` of what is left, whose pages are looked up at once; null where nothing is.
  const char* take(int64_t bytes) {
    if (next_ == count_) return nullptr;
    Stretch& stretch = stretches_[next_];
    const char* const at = stretch.at;
    bytes = std::min(bytes, stretch.bytes);
    touch_pages(at, bytes);
    stretch = {at + bytes, stretch.bytes - bytes};
    if (stretch.bytes == 0) ++next_;
    return at;
  }

 private:
  struct Stretch {
    const char* at;
    int64_t bytes;
  };

  Stretch stretches_[kMost];
  int64_t count_ = 0, next_ = 0, bytes_ = 0;
};

}  // namespace hfe
