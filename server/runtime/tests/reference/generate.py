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

import numpy as np
import torch
from tiny_files import write_hugging_face
from tiny_gguf import write_gguf
from tiny_models import GGUF_MODELS, HF_MODELS, SPECIAL, VOCABULARY, random_model, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, FineGrainedFP8Config

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Tiny models


def tiny():
    torch.set_num_threads(1)
    for index, (name, spec) in enumerate(HF_MODELS.items()):
        directory = fresh(name)
        model = random_model(spec, seed=100 + index)
        write_hugging_face(directory, model, spec)
        expect(directory, model, seed=100 + index)
        # transformers itself reads the directory to the same logits.
        if "eight_bits" in spec:
            how = dict(quantization_config=FineGrainedFP8Config(dequantize=True))
            same_weights(model, AutoModelForCausalLM.from_pretrained(directory, **how), name)
        else:
            agree(model, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), name)
    for index, (name, spec) in enumerate(GGUF_MODELS.items()):
        directory = fresh(name)
        model = random_model(spec, seed=200 + index)
        write_gguf(directory / "model.gguf", model, spec, np.random.default_rng(200 + index))
        expect(directory, model, seed=200 + index)
        # It reads no more than these of GGUF files.
        if spec["family"] in ("llama", "qwen2") and not spec["extra"]:
            loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
            agree(model, loaded, name)


def fresh(name):
    directory = HERE / "tiny" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def expect(directory, model, seed):
    """expected.json: every third logit after each token of one prompt, and the greedy continuation.

    The prompt is the first drawn whose continuation never comes near a tie, so that greedy tokens are decided by the
    model and not by the last bit of a sum. For the same reason none whose tokens would go to other experts with K and V
    in bf16.
    """
    random = np.random.default_rng(seed)
    least, rounded = 0, 1
    while least < 0.02 or rounded > 0.07:
        prompt = random.integers(0, VOCABULARY - len(SPECIAL), 12).tolist()
        tokens, margins = greedy(model, prompt, 24)
        least = min(margins)
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
            beside = model(torch.tensor([prompt]), past_key_values=Bf16Cache(), use_cache=True).logits[0]
        rounded = (logits - beside).abs().max().item()
    expected = dict(
        prompt=prompt, logits=[digits(row[::3]) for row in logits.tolist()], greedy=tokens, margins=digits(margins)
    )
    (directory / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory.name}: {size >> 10} KiB, logits spread {logits.std():.2f}, least margin {least:.4f}")


class Bf16Cache(DynamicCache):
    """Keeps K and V as a bf16 cache does."""

    def update(self, keys, values, *rest, **more):
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *rest, **more)


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


def same_weights(model, other, name):
    """transformers makes bf16 of weights of eight bits, which may send a token to other experts: weights are compared."""
    read = dict(tensors(other))
    for tensor, weight in tensors(model):
        assert torch.equal(weight.bfloat16(), read[tensor].bfloat16()), f"{name}: transformers reads {tensor} differently"


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
