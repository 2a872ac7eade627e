// The activations of an MLP, as the torch-free kernels name them.
#pragma once

namespace ppnet {

enum class Act { silu, gelu, gelu_tanh, relu, relu2 };

}  // namespace ppnet
