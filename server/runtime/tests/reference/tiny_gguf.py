"""Writes a tiny model as a GGUF file, as llama.cpp's converter names and orders things."""

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tiny_files import TEMPLATE, vocabulary
from tiny_models import MERGES, SPECIAL, VOCABULARY

TYPES = gguf.GGMLQuantizationType
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def parts(model, spec):
    """The file's tensors: names, and views of the model's memory in the shapes they have there."""
    config = model.config
    buffers = ((name, tensor) for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias"))
    for name, tensor in [*model.named_parameters(), *buffers]:
        values = tensor.detach().numpy()
        if name in WHOLE:
            yield WHOLE[name], values
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest == "mlp.experts.gate_up_proj":
            middle = values.shape[1] // 2
            yield f"blk.{layer}.ffn_gate_exps.weight", values[:, :middle]
            yield f"blk.{layer}.ffn_up_exps.weight", values[:, middle:]
        elif rest == "self_attn.kv_b_proj.weight" and spec.get("split_kv_b"):
            heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            yield f"blk.{layer}.attn_k_b.weight", heads[:, : config.qk_nope_head_dim].transpose(0, 2, 1)
            yield f"blk.{layer}.attn_v_b.weight", heads[:, config.qk_nope_head_dim :]
        else:
            yield f"blk.{layer}.{NAMES[rest]}", values


def interleave(rows, heads):
    """Halves to pairs within each head: the order of q and k in GGUF files of the llama architecture."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def halve(rows, heads):
    """The inverse of interleave."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, model, spec, random):
    """Writes the model quantised, and puts the values that the file then holds back into it."""
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    describe(writer, path.parent.name, config, spec)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        divisors = plain / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    for name, view in parts(model, spec):
        rotated = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        heads = rotated.get(name.split(".")[-2]) if config.model_type == "llama" else None
        values = interleave(view, heads) if heads else np.ascontiguousarray(view)
        kind = TYPES[type_of(name, spec)] if values.ndim >= 2 else TYPES.F32
        raw = k_blocks(values.shape, kind, random) if kind.name.endswith("_K") else quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        stored = dequantize(raw, kind).reshape(values.shape)
        view[...] = halve(stored, heads) if heads else stored
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer, name, config, spec):
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if hasattr(config, "kv_lora_rank"):
        describe_latent(writer, config, spec)
    else:
        head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
    if hasattr(config, "num_experts_per_tok"):
        describe_experts(writer, config)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([1] * (VOCABULARY - len(SPECIAL)) + [3] * len(SPECIAL))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def describe_latent(writer, config, spec):
    """Newer files have attn_k_b and attn_v_b and speak of one head of latents, older ones have attn_kv_b."""
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    if spec.get("split_kv_b"):
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(head)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(head)
        writer.add_value_length(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def describe_experts(writer, config):
    deepseek = hasattr(config, "n_routed_experts")
    writer.add_expert_count(config.n_routed_experts if deepseek else config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if not deepseek:
        return
    sigmoid = config.model_type == "deepseek_v3"
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(sigmoid and config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def type_of(name, spec):
    if "ffn_gate_inp" in name:
        return "F32"
    if "token_embd" in name or name == "output.weight":
        return spec.get("embedding", spec["quants"])
    for part, field in {"attn_v": "value", "attn_output": "output", "ffn_down": "down"}.items():
        if part in name and field in spec:
            return spec[field]
    return spec["quants"]


def k_blocks(shape, kind, random):
    """The gguf package reads K-quants but does not write them, so their blocks are drawn: random quants and scales
    below block scales that give the values the wanted spread."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = shape
    blocks = random.integers(0, 256, (rows * columns // 256, size), dtype=np.uint8)
    spread = 1.5 / columns**0.5
    if kind == TYPES.Q6_K:
        blocks[:, 208:210] = half(spread / (74 * 18.5), len(blocks))
    else:
        middle = {TYPES.Q4_K: 7.5, TYPES.Q5_K: 15.5}[kind]
        scale = spread / (31.5 * middle)
        blocks[:, 0:2] = half(scale, len(blocks))
        blocks[:, 2:4] = half(scale * middle, len(blocks))
    return blocks.reshape(rows, -1)


def half(value, count):
    return np.tile(np.array([value], dtype=np.float16).view(np.uint8), (count, 1))
