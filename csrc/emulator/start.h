// Launches: cuda/launch.h calls this.
#pragma once

#include <tuple>
#include <type_traits>

#include "block.h"
#include "runtime.h"

namespace ppnet::emulator {

template <class... Params>
struct Call {
  void (*kernel)(Params...);
  std::tuple<std::decay_t<Params>...> arguments;
  static void run(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    std::apply(call.kernel, call.arguments);
  }
};

template <class... Params, class... Args>
cudaError_t start(void (*kernel)(Params...), dim3 grid, dim3 shape, size_t shared_bytes, Args&&... args) {
  const Call<Params...> call{kernel, {std::forward<Args>(args)...}};
  return keep(run({Call<Params...>::run, &call, reinterpret_cast<const void*>(kernel), grid, shape, shared_bytes}));
}

}  // namespace ppnet::emulator
