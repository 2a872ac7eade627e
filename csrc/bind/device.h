// Where the kernels of csrc/cuda run: on the GPU of the tensors, or, in the tests' library of emulated kernels, on the
// CPU. The bindings *_cuda.cpp are compiled for both, and see of it what is here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#ifdef PPNET_EMULATOR
// The same operators, under another name, for CPU tensors.
#define PPNET_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ppnet_emulated, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define PPNET_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ppnet, CUDA, m)

// Weak: only a CUDA torch has it. torch declares it for CUDA builds alone.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace ppnet {

#ifdef PPNET_EMULATOR

inline constexpr bool kGpuTensors = false;

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}
  int32_t index() const { return 0; }
  void* stream() const { return nullptr; }
};

#else

inline constexpr bool kGpuTensors = true;

// Makes the device of a tensor the current one until the end of the scope, and knows its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  int32_t index() const { return index_; }
  void* stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this torch has no CUDA: its current stream is unknown");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

}  // namespace ppnet
