// qkv_decode and attend_mlp_decode on NVIDIA GPUs.
#ifdef PPNET_WITH_CUDA

#include "device.h"
#include "decoder_layer.h"

namespace ppnet {
namespace {

constexpr DecodeOperators kOperators{kGpuTensors,
                                     gpu::rms_norm,
                                     gpu::linears_decode,
                                     gpu::rotary,
                                     gpu::gated_attention_decode,
                                     gpu::linear_t_decode,
                                     gpu::gated_mlp_decode};

}  // namespace

PPNET_CUDA_OPERATORS(m) {
  m.impl("qkv_decode", TORCH_BOX(&qkv_decode<kOperators>));
  m.impl("attend_mlp_decode", TORCH_BOX(&attend_mlp_decode<kOperators>));
}

}  // namespace ppnet

#endif
