"""A Llama's weights as llama.cpp reads them, and llama.cpp generating with them, through `xllamacpp` and `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Writes a Llama with a tied head; its tokens get made-up names, since only their numbers are used."""
    import gguf

    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    rest = config.vocab_size - len(pieces)
    out.add_tokenizer_model("llama")
    out.add_token_list(pieces + [f"t{number}" for number in range(rest)])
    out.add_token_scores([0.0] * config.vocab_size)
    out.add_token_types(kinds + [gguf.TokenType.NORMAL] * rest)

    def add(name: str, value: torch.Tensor) -> None:
        # Vectors are float32 in every model of llama.cpp.
        value = value.detach().to(dtype if value.dim() == 2 else torch.float32).contiguous()
        if value.dtype == torch.bfloat16:
            out.add_tensor(name, value.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            out.add_tensor(name, value.numpy())

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for number, layer in enumerate(model.model.layers):
        for name, value in layer.state_dict().items():
            own = name.removesuffix(".weight")
            if own in ("self_attn.q_proj", "self_attn.k_proj"):
                value = pairs(value, config.head_dim)
            add(f"blk.{number}.{NAMES[own]}.weight", value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def pairs(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's rotary embedding: the two features that turn together are neighbours."""
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """llama.cpp with one sequence on as many threads as torch uses."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx = 512
        options.n_parallel = 1
        options.n_gpu_layers = 0
        options.cache_prompt = False
        options.warmup = True
        options.verbosity = 0
        # Memory of its own in place of a mapped file, so that it can have huge pages too.
        options.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(options)

    def generate(self, ids: torch.Tensor, new: int, likely: int = 0) -> dict[str, Any]:
        """The server's answer to a greedy completion, with llama.cpp's own "timings"; `likely`: tokens to tell of."""
        asked = {"prompt": ids[0].tolist(), "max_tokens": new, "temperature": 0.0, "ignore_eos": True}
        return self.server.handle_completions(asked | ({"logprobs": likely} if likely else {}))

    def seconds(self, ids: torch.Tensor, new: int) -> float:
        """Per token, after the first new one, which the prompt's pass made."""
        timings = self.generate(ids, new)["timings"]
        return timings["predicted_ms"] * 1e-3 / (timings["predicted_n"] - 1)
