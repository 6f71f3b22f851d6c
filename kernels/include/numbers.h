// Numbers of any floating-point format as float32, and the other way round. Included once for each instruction set, after
// lanes.h and in the same way; includes nothing itself.

template <typename T>
void widen_all(const void* from, int64_t count, float* to) {
  const T* const numbers = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(numbers + i));
  if (i < count) store_part(to + i, load_part(numbers + i, count - i), count - i);
}

template <typename T>
void narrow_all(const float* from, int64_t count, void* to) {
  T* const numbers = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(numbers + i, load(from + i));
  if (i < count) store_part(numbers + i, load_part(from + i, count - i), count - i);
}
