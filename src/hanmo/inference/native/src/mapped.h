// Weights in files that are mapped into memory, and that somebody cuts off while they are read.
//
// What lies beyond the end of its file cannot be read: the system sends SIGBUS, which would end the program. Where the
// address is one of a model's weights, empty memory takes their place and the models that have them are marked as lost: the
// call ends and is refused, as are all later ones, and everything else goes on.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "model.h"

namespace hanmo::native {

inline std::atomic<Model*> watched[256];  // more models than any process has; those beyond are not watched
inline struct sigaction before_us;
inline const uintptr_t kPageBytes = sysconf(_SC_PAGESIZE);

// Where the weights end of which an address is one; 0 where it is none of the matrix's.
inline uintptr_t end_of_weights(const Matrix& m, uintptr_t address) {
  for (const auto& [part, bytes] : {std::pair{reinterpret_cast<uintptr_t>(m.values), m.value_bytes()},
                                    std::pair{reinterpret_cast<uintptr_t>(m.scales), 2 * m.scale_count()}})
    if (part && address >= part && address < part + static_cast<uintptr_t>(bytes)) return part + bytes;
  return 0;
}

inline uintptr_t end_of_weights(const Model& model, uintptr_t address) {
  uintptr_t end = 0;
  for (const Layer& layer : model.layers)
    for (const Matrix& matrix : layer.matrices) end = std::max(end, end_of_weights(matrix, address));
  for (const Matrix* matrix : {&model.embedding, &model.head, &model.checked})
    end = std::max(end, end_of_weights(*matrix, address));
  return end;
}

// Marks all models that have the address, for several may share a file, and puts empty memory there.
inline bool give_up(uintptr_t address) {
  uintptr_t end = 0;
  for (std::atomic<Model*>& place : watched)
    if (Model* model = place.load(std::memory_order_acquire))
      if (const uintptr_t found = end_of_weights(*model, address)) {
        model->lost.store(true, std::memory_order_release);
        end = std::max(end, found);
      }
  if (!end) return false;
  const uintptr_t first = address / kPageBytes * kPageBytes;
  return mmap(reinterpret_cast<void*>(first), end - first, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

// What the system calls on the thread that read.
inline void on_lost_memory(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  const bool ours = info->si_code > 0 && give_up(reinterpret_cast<uintptr_t>(info->si_addr));  // not sent by a process
  errno = error;
  if (ours) return;
  if (before_us.sa_flags & SA_SIGINFO) return before_us.sa_sigaction(signal, info, context);
  if (before_us.sa_handler != SIG_DFL && before_us.sa_handler != SIG_IGN) return before_us.sa_handler(signal);
  sigaction(signal, &before_us, nullptr);
  raise(signal);
}

// From now on a model's weights may be lost; until it is forgotten.
inline void watch(Model* model) {
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_sigaction = on_lost_memory;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    return sigaction(SIGBUS, &action, &before_us) == 0;
  }();
  if (!installed) return;
  for (std::atomic<Model*>& place : watched) {
    Model* none = nullptr;
    if (place.compare_exchange_strong(none, model)) return;
  }
}

inline void forget(Model* model) {
  for (std::atomic<Model*>& place : watched) {
    Model* found = model;
    if (place.compare_exchange_strong(found, nullptr)) return;
  }
}

}  // namespace hanmo::native
