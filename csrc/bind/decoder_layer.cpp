// qkv_decode and attend_mlp_decode on the CPU.
#include "decoder_layer.h"

namespace ppnet {
namespace {

constexpr DecodeOperators kOperators{false,
                                     cpu::rms_norm,
                                     cpu::linears_decode,
                                     cpu::rotary,
                                     cpu::gated_attention_decode,
                                     cpu::linear_t_decode,
                                     cpu::gated_mlp_decode};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("qkv_decode", TORCH_BOX(&qkv_decode<kOperators>));
  m.impl("attend_mlp_decode", TORCH_BOX(&attend_mlp_decode<kOperators>));
}

}  // namespace ppnet
