#!/usr/bin/env python3
"""Writes a GGUF file of a model of a wanted shape with random weights: for measuring, where no such model is at hand.

    python shaped.py OUT.gguf --type Q8_0 --hidden 2048 --ffn 8192 --layers 16 --heads 32 --kv-heads 8

The default shape is that of a 1B LLaMA 3.2 with a small vocabulary. Types are those that the package gguf quantises:
F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1. Its text is noise; `examples/speed` and `baton bench engine` take it.
Needs numpy and gguf.
"""

import argparse

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--type", default="BF16", help="of all matrices; norms are F32")
    for name, default in dict(hidden=2048, ffn=8192, layers=16, heads=32, kv_heads=8, vocabulary=32000).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args()
    writer = GGUFWriter(options.out, "llama")
    describe(writer, options)
    # One run of random blocks is drawn and every matrix is filled with it: drawing and quantising gigabytes takes long.
    kind = GGMLQuantizationType[options.type]
    row = max(options.hidden, options.ffn)
    stock = np.random.default_rng(1).normal(0, 0.02, (64, row)).astype(np.float32)
    head_dim = options.hidden // options.heads
    kv = options.kv_heads * head_dim

    def matrix(name, outputs, inputs):
        some = quants.quantize(np.ascontiguousarray(stock[:, :inputs]), kind)
        writer.add_tensor(name, np.resize(some, (outputs, some.shape[1])), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, np.ones(options.hidden, np.float32))

    matrix("token_embd.weight", options.vocabulary, options.hidden)
    for layer in range(options.layers):
        at = f"blk.{layer}."
        norm(at + "attn_norm.weight")
        matrix(at + "attn_q.weight", options.hidden, options.hidden)
        matrix(at + "attn_k.weight", kv, options.hidden)
        matrix(at + "attn_v.weight", kv, options.hidden)
        matrix(at + "attn_output.weight", options.hidden, options.hidden)
        norm(at + "ffn_norm.weight")
        matrix(at + "ffn_gate.weight", options.ffn, options.hidden)
        matrix(at + "ffn_up.weight", options.ffn, options.hidden)
        matrix(at + "ffn_down.weight", options.hidden, options.ffn)
    norm("output_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer, options):
    """Everything but the tensors. Tokens are `t0`, `t1` ..., the last of which ends a text."""
    writer.add_name(f"random-{options.hidden}x{options.layers}")
    writer.add_context_length(8192)
    writer.add_embedding_length(options.hidden)
    writer.add_feed_forward_length(options.ffn)
    writer.add_block_count(options.layers)
    writer.add_head_count(options.heads)
    writer.add_head_count_kv(options.kv_heads)
    writer.add_rope_dimension_count(options.hidden // options.heads)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(options.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(options.vocabulary)])
    writer.add_token_types([TokenType.NORMAL] * (options.vocabulary - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(options.vocabulary - 1)
    writer.add_eos_token_id(options.vocabulary - 1)


if __name__ == "__main__":
    main()
