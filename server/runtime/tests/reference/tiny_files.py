"""Writes a tiny model as a Hugging Face directory or as a GGUF file."""

import json

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tiny_models import MERGES, SPECIAL, VOCABULARY

TYPES = gguf.GGMLQuantizationType
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)



def byte_alphabet():
    """GPT-2's characters for the bytes 0 to 255, in the order of their ids."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(moved))]


def vocabulary():
    return byte_alphabet() + [merge.replace(" ", "") for merge in MERGES] + SPECIAL


def write_hugging_face(directory, model, spec):
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[spec["dtype"]]
    state = {name: weight.detach().to(dtype).contiguous() for name, weight in model.named_parameters()}
    names, count = sorted(state), spec.get("shards", 1)
    if count == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        placed = {name: f"model-{index * count // len(names) + 1:05}-of-{count:05}.safetensors"
                  for index, name in enumerate(names)}
        for file in sorted(set(placed.values())):
            part = {name: state[name] for name in names if placed[name] == file}
            save_file(part, directory / file, metadata={"format": "pt"})
        index = dict(metadata=dict(total_size=sum(w.nbytes for w in state.values())), weight_map=placed)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    config = model.config.to_dict() | dict(architectures=[type(model).__name__], dtype=str(dtype)[6:])
    if spec.get("old_config"):
        rope = config.pop("rope_parameters")
        config |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope, torch_dtype=config.pop("dtype"))
    dump = dict(indent=1, sort_keys=True)
    (directory / "config.json").write_text(json.dumps(config, **dump) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[VOCABULARY - 1, VOCABULARY - 3])) + "\n")
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=SPECIAL[2], bos_token=SPECIAL[1],
                    chat_template=TEMPLATE)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, **dump) + "\n")
    tokenizer = Tokenizer(models.BPE(
        vocab={token: index for index, token in enumerate(vocabulary()[:-len(SPECIAL)])},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
    ))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    assert tokenizer.get_vocab_size() == VOCABULARY and tokenizer.token_to_id(SPECIAL[0]) == VOCABULARY - 3
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)


ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


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
    writer.add_name(path.parent.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
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
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
        divisors = plain / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    for name, weight in model.named_parameters():
        rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = rotated.get(name.split(".")[-2]) if config.model_type == "llama" else None
        values = weight.detach().numpy()
        values = interleave(values, heads) if heads else values
        kind = TYPES[type_of(name, spec)] if values.ndim == 2 else TYPES.F32
        raw = k_blocks(values.shape, kind, random) if kind.name.endswith("_K") else quantize(values, kind)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        stored = dequantize(raw, kind).reshape(values.shape)
        stored = halve(stored, heads) if heads else stored
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def type_of(name, spec):
    if "embed_tokens" in name or "lm_head" in name:
        return spec.get("embedding", spec["quants"])
    for part, field in {"v_proj": "value", "o_proj": "output", "down_proj": "down"}.items():
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
