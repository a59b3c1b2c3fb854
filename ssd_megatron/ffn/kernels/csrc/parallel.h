// Threads, their tasks and their memory.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "blocks.h"

// Memory of a thread that only grows.
template <class T>
T* scratch(int slot, int64_t count) {
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { free(memory); }
  };
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
  if (buffer.bytes < bytes) {
    free(buffer.memory);
    buffer.memory = aligned_alloc(64, bytes);
    buffer.bytes = bytes;
  }
  return (T*)buffer.memory;
}

struct TileShapes {  // eight tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tasks 0, 1 ... each by the next thread that is free.
template <class T, class Task>
void in_parallel(int64_t tasks, int64_t threads, const Task& task) {
  static const TileShapes shapes;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    if (std::is_same<T, bf16>::value) {
      memory_is_used();
      _tile_loadconfig(&shapes);
    }
    for (int64_t t; (t = next++) < tasks;) task(t);
    if (std::is_same<T, bf16>::value) _tile_release();
  }
}
