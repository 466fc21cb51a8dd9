#!/usr/bin/env python3
"""Writes what the runtime's tests are measured against: logits and greedy tokens by Hugging Face transformers.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python generate.py tiny                      # writes tiny/<model>/, seconds
    venv/bin/python generate.py real --model SMOLLM2.gguf # writes smollm2.json, minutes

All arithmetic is f32 on the weights as stored: whatever rounding or quantisation a file has happened before.
Everything is drawn from fixed seeds and computed by one thread, so that a second run gives the same files, but for last
digits where another processor sums in another order. The README beside this file states what is written.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
TYPES = gguf.GGMLQuantizationType

# ---------------------------------------------------------------------------------------------------------------------
# Tiny models


MERGES = "Ġ t|h e|i n|e r|Ġ a|o n|Ġt he|r e|a n|Ġ s|i s|Ġ w|e n".split("|")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(MERGES) + len(SPECIAL)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What each tiny model is there to show; the fields are LlamaConfig's and the types of the tensors.
BASE = dict(layers=2, hidden=32, ffn=64, heads=4, kv_heads=4, head_dim=16, tied=False, extra={})
HF_MODELS = {
    "hf-f32-ratio1-tied": BASE | dict(hidden=40, ffn=24, heads=4, kv_heads=4, head_dim=12, tied=True, dtype="f32"),
    "hf-f32-bias-linear": BASE
    | dict(
        hidden=32,
        ffn=56,
        heads=4,
        kv_heads=2,
        head_dim=8,
        layers=1,
        dtype="f32",
        extra=dict(attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="linear", factor=4.0)),
    ),
    "hf-f16-ratio3-wide-heads": BASE | dict(layers=1, hidden=48, heads=6, kv_heads=2, head_dim=20, dtype="f16"),
    "hf-bf16-ratio4-llama3": BASE
    | dict(
        heads=8,
        kv_heads=2,
        head_dim=16,
        dtype="bf16",
        # Written as transformers 4 does: rope_theta and rope_scaling at the top.
        old_config=True,
        extra=dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=50000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),
    "hf-bf16-sharded-yarn": BASE
    | dict(
        heads=4,
        kv_heads=1,
        head_dim=32,
        dtype="bf16",
        shards=2,
        extra=dict(
            rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
        ),
    ),
}
GGUF_MODELS = {
    "gguf-f32": BASE | dict(layers=1, head_dim=8, kv_heads=2, quants="F32"),
    "gguf-f16-tied": BASE | dict(layers=1, hidden=48, quants="F16", tied=True, heads=6, kv_heads=2),
    "gguf-q8_0-bias": BASE | dict(quants="Q8_0", heads=8, kv_heads=2, extra=dict(attention_bias=True)),
    "gguf-q4_0": BASE | dict(quants="Q4_0", heads=4, kv_heads=1, head_dim=32),
    "gguf-q4_1-like-smollm2": BASE | dict(hidden=96, ffn=64, quants="Q4_1", embedding="Q8_0", tied=True, heads=6, kv_heads=2),
    "gguf-q5_0-q5_1": BASE | dict(quants="Q5_0", down="Q5_1"),
    "gguf-q8_0-llama3-divisors": BASE
    | dict(
        quants="Q8_0",
        heads=4,
        kv_heads=1,
        extra=dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=50000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),
    # Blocks of 256 elements: as a Q4_K_M file mixes them.
    "gguf-q4_k-q5_k-q6_k": BASE
    | dict(
        layers=1,
        hidden=256,
        ffn=256,
        heads=4,
        kv_heads=1,
        head_dim=64,
        tied=True,
        quants="Q4_K",
        embedding="Q6_K",
        value="Q6_K",
        output="Q5_K",
        down="Q6_K",
    ),
}


def tiny():
    torch.set_num_threads(1)
    for index, (name, spec) in enumerate(HF_MODELS.items()):
        directory = fresh(name)
        model = random_model(spec, seed=100 + index)
        write_hugging_face(directory, model, spec)
        expect(directory, model, seed=100 + index)
        # transformers itself reads the directory to the same logits.
        agree(model, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), name)
    for index, (name, spec) in enumerate(GGUF_MODELS.items()):
        directory = fresh(name)
        model = random_model(spec, seed=200 + index)
        write_gguf(directory / "model.gguf", model, spec, np.random.default_rng(200 + index))
        expect(directory, model, seed=200 + index)
        if "rope_parameters" not in spec["extra"] and "attention_bias" not in spec["extra"]:
            loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
            agree(model, loaded, name)


def fresh(name):
    directory = HERE / "tiny" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def random_model(spec, seed):
    """A LLaMA with weights large enough that logits differ clearly and every part matters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=spec["hidden"],
        intermediate_size=spec["ffn"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        num_key_value_heads=spec["kv_heads"],
        head_dim=spec["head_dim"],
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=spec["tied"],
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        attn_implementation="eager",
        **spec["extra"],
    )
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(seed)
    rounding = {"f16": torch.float16, "bf16": torch.bfloat16}.get(spec.get("dtype"), torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.2)
            elif name.endswith(".bias"):
                weight.normal_(0.0, 0.3)
            else:
                weight.normal_(0.0, 1.5 / weight.shape[1] ** 0.5)
            weight.copy_(weight.to(rounding).float())
    return model


def expect(directory, model, seed):
    """expected.json: logits after each token of one prompt, and the greedy continuation.

    The prompt is the first drawn whose continuation never comes near a tie, so that greedy tokens are decided by the
    model and not by the last bit of a sum.
    """
    random = np.random.default_rng(seed)
    least = 0
    while least < 0.02:
        prompt = random.integers(0, VOCABULARY - len(SPECIAL), 12).tolist()
        tokens, margins = greedy(model, prompt, 24)
        least = min(margins)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    expected = dict(
        prompt=prompt, logits=[digits(row) for row in logits.tolist()], greedy=tokens, margins=digits(margins)
    )
    (directory / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory.name}: {size >> 10} KiB, logits spread {logits.std():.2f}, least margin {least:.4f}")


def greedy(model, prompt, count):
    """`count` tokens, each the most likely, and by how much each beat the second, in units of the logit."""
    tokens, margins, cache, step = [], [], None, prompt
    with torch.no_grad():
        for _ in range(count):
            out = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            tokens.append(best.indices[0].item())
            margins.append((best.values[0] - best.values[1]).item())
            step = tokens[-1:]
    return tokens, margins


def digits(values):
    """Six significant digits: finer than two orders of summation agree."""
    return [float(f"{value:.6g}") for value in values]


def agree(model, other, name):
    prompt = torch.arange(0, VOCABULARY, 7)[None]
    with torch.no_grad():
        a, b = model(prompt).logits, other.eval()(prompt).logits
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), f"{name}: transformers reads it differently, {(a - b).abs().max()}"


# ---------------------------------------------------------------------------------------------------------------------
# Files of the tiny models


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

    config = model.config.to_dict() | dict(architectures=["LlamaForCausalLM"], dtype=str(dtype)[6:])
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
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.parent.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
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
        head = config.head_dim
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
        divisors = plain / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    for name, weight in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
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


# ---------------------------------------------------------------------------------------------------------------------
# The real model

PARAGRAPH = (
    "A relay race is won in the exchange. The runner who comes in knows the track behind, the one who goes out only "
    "the track ahead, and for a few metres both must run at the same speed with one baton between them. Whoever lets "
    "go too early drops it; whoever holds on too long slows the other down. "
)
PROMPTS = {
    "one-token": dict(tokens=[1]),
    "sentence": dict(text="The capital of France is"),
    "chat": dict(chat=[dict(role="user", content="Why is the sky blue? Answer in two sentences.")]),
    "chat-system": dict(
        chat=[
            dict(role="system", content="You answer with short poems."),
            dict(role="user", content="Write about 3 café owners who don't sleep: 12,345 cups… ☕"),
        ]
    ),
    "code": dict(text='def fibonacci(n):\n    """Returns the n-th Fibonacci number."""\n    if n < 2:\n        return n\n'),
    "long": dict(text=PARAGRAPH * 9 + "In short, the exchange"),
}
SAMPLED = 512
STEPS = 48


def real(path):
    # Two threads halve the minutes; sums within one output element are not split between them.
    torch.set_num_threads(2)
    path = Path(path).resolve()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vocabulary_size = model.config.vocab_size
    indices = np.sort(np.random.default_rng(7).choice(vocabulary_size, SAMPLED, replace=False)).tolist()
    cases = []
    for name, prompt in PROMPTS.items():
        tokens = prompt.get("tokens") or tokenizer(prompt["text"]).input_ids if "chat" not in prompt else None
        if tokens is None:
            text = tokenizer.apply_chat_template(prompt["chat"], add_generation_prompt=True, tokenize=False)
            tokens = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        best = logits.topk(8)
        continuation, margins = greedy(model, tokens, STEPS)
        cases.append(
            dict(
                name=name,
                prompt=tokens,
                logits=digits(logits[indices].tolist()),
                top=best.indices.tolist(),
                top_logits=digits(best.values.tolist()),
                logsumexp=digits([torch.logsumexp(logits.double(), 0).item()])[0],
                greedy=continuation,
                margins=digits(margins),
            )
        )
        print(f"{name}: {len(tokens)} tokens, least margin {min(margins):.4f}: {tokenizer.decode(continuation)!r}")
    result = dict(model=path.stem, vocabulary=vocabulary_size, indices=indices, cases=cases)
    (HERE / "smollm2.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["tiny", "real"])
    parser.add_argument("--model", help="path of SmolLM2-135M-Instruct.Q4_1.gguf", default=os.environ.get("BATON_TEST_MODEL"))
    arguments = parser.parse_args()
    if arguments.part == "tiny":
        tiny()
    elif arguments.model:
        real(arguments.model)
    else:
        parser.error("real needs --model or BATON_TEST_MODEL")


if __name__ == "__main__":
    main()
