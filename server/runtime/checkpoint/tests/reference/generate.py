#!/usr/bin/env python3
"""Writes what the checkpoint's tests are measured against.

    python generate.py      # needs gguf, torch, transformers; versions: ../../../tests/reference/requirements.txt

dequantize.json: for each ggml type two rows of random blocks as hex, and their values by the gguf package.
rope.json: rope frequencies by transformers, for the kinds of scaling.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).resolve().parent
# Where in a block its f16 numbers are: random bits there could be infinite or not a number.
HALVES = {
    "F16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
ROPES = {
    "default": dict(rope_type="default", rope_theta=100000.0),
    "linear": dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "yarn": dict(rope_type="yarn", rope_theta=10000.0, factor=16.0, original_max_position_embeddings=4096),
    "yarn-mscale": dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=0.707,
        truncate=False,
    ),
}


def blocks():
    random = np.random.default_rng(11)
    result = {}
    for name, places in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (2, size), dtype=np.uint8)
        for place in places:
            halves = random.normal(0, 0.1, 2).astype(np.float16)
            raw[:, place : place + 2] = halves.view(np.uint8).reshape(2, 2)
        values = dequantize(raw, kind).reshape(-1)
        result[name] = dict(bytes=raw.tobytes().hex(), values=[float(f"{x:.9g}") for x in values])
    return result


def ropes():
    result = []
    for name, parameters in ROPES.items():
        config = LlamaConfig(
            hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=65536, rope_parameters=parameters
        )
        rotary = LlamaRotaryEmbedding(config)
        inverse, scale = rotary.inv_freq, rotary.attention_scaling
        result.append(dict(name=name, parameters=parameters, inverse=[float(f"{x:.9g}") for x in inverse], scale=scale))
    return result


for file, content in {"dequantize.json": blocks(), "rope.json": ropes()}.items():
    (HERE / file).write_text(json.dumps(content, separators=(",", ":")) + "\n")
