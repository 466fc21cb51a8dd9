"""Writes a tiny model as a Hugging Face directory."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tiny_models import MERGES, SPECIAL, VOCABULARY, tensors

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


def stored_type(name, dtype):
    """DeepSeek's checkpoints keep this one in f32."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def write_hugging_face(directory, model, spec):
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[spec["dtype"]]
    state = {name: tensor.detach().to(stored_type(name, dtype)).contiguous() for name, tensor in tensors(model)}
    for name, (quants, scales) in getattr(model, "eight_bits", {}).items():
        state |= {name: quants, f"{name}_scale_inv": scales}
    if spec.get("predicts_ahead"):
        # What a checkpoint has of a layer for predicting several tokens, in part: it must not matter.
        layer, hidden = model.config.num_hidden_layers, model.config.hidden_size
        for name, shape in {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "input_layernorm": (hidden,)}.items():
            state[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape, dtype=dtype)
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
    if "eight_bits" in spec:
        block = list(spec["eight_bits"])
        fp8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=block)
        config |= dict(quantization_config=fp8)
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
