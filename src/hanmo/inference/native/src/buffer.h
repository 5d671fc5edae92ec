// Memory for plain numbers: zeros, at the beginning of a cache line, taken from the system where it is first touched.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace hanmo::native {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(memory_); }

  // Another size; what was there stays, what is new is zero. Throws std::bad_alloc, and then is as it was.
  void resize(int64_t count) {
    if (count < 0 || count > kMost) throw std::bad_alloc();
    Buffer other;
    if (count) {
      other.memory_ = std::calloc(count * sizeof(T) + kLine, 1);
      if (!other.memory_) throw std::bad_alloc();
      const uintptr_t address = reinterpret_cast<uintptr_t>(other.memory_);
      other.first_ = reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
      other.count_ = count;
      const int64_t kept = count_ < count ? count_ : count;
      if (kept) std::memcpy(other.first_, first_, kept * sizeof(T));
    }
    swap(other);
  }
  void reserve(int64_t count) {
    if (count > count_) resize(count);
  }

  int64_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  T* data() { return first_; }
  const T* data() const { return first_; }
  T& operator[](int64_t i) { return first_[i]; }
  const T& operator[](int64_t i) const { return first_[i]; }

 private:
  static constexpr int64_t kMost = int64_t{1} << 46, kLine = 64;  // no machine has more

  void swap(Buffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(first_, other.first_);
    std::swap(count_, other.count_);
  }

  void* memory_ = nullptr;
  T* first_ = nullptr;
  int64_t count_ = 0;
};

typedef Buffer<float> Vector;  // empty: not there

}  // namespace hanmo::native
