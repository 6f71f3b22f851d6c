// Room for large results on a CPU. The system hands out a large block page by page, each filled with zeros when it is
// first written to, and takes it back as soon as it is freed: in pages of 4 KiB that takes as long as a kernel that
// writes them. Here blocks lie in huge pages, where the system has them, and the last ones that were freed are kept
// for the next call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tensor_checks.h"

namespace hfe {

class KeptMemory {
 public:
  // So many bytes are kept at most; a process needs no more for one large call, forward and backward.
  static constexpr size_t kMost = size_t(128) << 20;
  static constexpr size_t kHugePage = size_t(2) << 20;

  KeptMemory() { teach_malloc(); }

  // Never destroyed: tensors may outlive all objects of the library.
  static KeptMemory& shared() {
    static KeptMemory* memory = new KeptMemory;
    return *memory;
  }

  // A block of `bytes`, whole huge pages; null if there is no memory.
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = kept_.size(); i-- > 0;) {
        if (kept_[i].bytes == bytes) return remove(i);
      }
    }
    void* data = nullptr;
    if (posix_memalign(&data, kHugePage, bytes) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint, which the system may refuse
#endif
    return data;
  }

  void give_back(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back({data, bytes});
    total_ += bytes;
    while (total_ > kMost) std::free(remove(0));
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  // glibc learns from the large blocks that are freed which sizes to hold on to: up to 32 MiB, and twice the largest in
  // all. What is kept here never comes back to teach it, and other tensors of the process would lie in fresh pages each
  // time. So it is shown one block, untouched, as large as it learns from. Settings of malloc that the process has made
  // itself stay as they are.
  static void teach_malloc() {
#if defined(__GLIBC__)
    void* volatile block = std::malloc((size_t(32) << 20) - (size_t(64) << 10));
    std::free(block);
#endif
  }

  void* remove(size_t index) {
    const Block block = kept_[index];
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(index));
    total_ -= block.bytes;
    return block.data;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the longest kept first
  size_t total_ = 0;
};

// A contiguous tensor that nothing has been written to, on the device of `like`; a large one in kept memory.
inline Tensor room_like(const Tensor& like, const Shape& shape, ScalarType type) {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  const size_t needed = count * (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2);
  const size_t bytes = (needed + KeptMemory::kHugePage - 1) / KeptMemory::kHugePage * KeptMemory::kHugePage;
  void* data = like.is_cpu() && bytes > KeptMemory::kHugePage ? KeptMemory::shared().take(bytes) : nullptr;
  if (data == nullptr) return torch::stable::new_empty(like, shape, type);
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * shape[i + 1];
  const auto free = [bytes](void* block) { KeptMemory::shared().give_back(block, bytes); };
  return torch::stable::from_blob(data, shape, strides, like.device(), type, free);
}

}  // namespace hfe
