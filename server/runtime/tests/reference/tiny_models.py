"""What each tiny model is there to show, and the making of it.

Of a spec, `dtype` is the type of the tensors in a Hugging Face directory, `quants` with its exceptions the types in a GGUF
file, and `extra` are fields of the family's configuration in transformers.
"""

import torch
from transformers import (
    DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM,
    MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip

MERGES = "Ġ t|h e|i n|e r|Ġ a|o n|Ġt he|r e|a n|Ġ s|i s|Ġ w|e n".split("|")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(MERGES) + len(SPECIAL)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}

LLAMA3 = dict(
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=50000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
)

QWEN3_MOE = dict(moe_intermediate_size=16, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True)
DEEPSEEK = dict(
    kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=2, first_k_dense_replace=1,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1)
QUANTISABLE = dict(kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=16, moe_intermediate_size=32, n_shared_experts=1)
NO_WINDOW = dict(sliding_window=None)

BASE = dict(family="llama", layers=2, hidden=32, ffn=32, heads=4, kv_heads=4, head_dim=16, tied=False, extra={})
HF_MODELS = {
    "hf-f32-ratio1-tied": BASE | dict(layers=1, hidden=40, ffn=24, heads=4, kv_heads=4, head_dim=12, tied=True, dtype="f32"),
    "hf-f32-bias-linear": BASE
    | dict(
        hidden=32,
        ffn=56,
        heads=4,
        kv_heads=2,
        head_dim=8,
        layers=1,
        tied=True,
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
        extra=LLAMA3,
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
    "hf-bf16-mistral": BASE | dict(family="mistral", layers=1, kv_heads=2, tied=True, dtype="bf16", extra=NO_WINDOW),
    "hf-bf16-qwen2-ratio8-tied": BASE
    | dict(family="qwen2", layers=1, hidden=64, heads=8, kv_heads=1, head_dim=None, tied=True, dtype="bf16"),
    "hf-bf16-qwen3-wide-heads": BASE | dict(family="qwen3", heads=6, kv_heads=2, dtype="bf16"),
    "hf-f32-qwen3-bias-yarn": BASE
    | dict(
        family="qwen3",
        layers=1,
        head_dim=8,
        tied=True,
        dtype="f32",
        extra=dict(
            attention_bias=True,
            rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0),
        ),
    ),
    # Layers 0 and 2 are dense because of the step, layer 3 because it is listed.
    "hf-bf16-qwen3moe-some-dense": BASE
    | dict(
        family="qwen3_moe",
        layers=4,
        heads=4,
        kv_heads=1,
        head_dim=8,
        tied=True,
        dtype="bf16",
        extra=QWEN3_MOE | dict(decoder_sparse_step=2, mlp_only_layers=[3]),
    ),
    "hf-f32-qwen3moe-unnormalised": BASE
    | dict(
        family="qwen3_moe",
        layers=1,
        head_dim=8,
        tied=True,
        dtype="f32",
        extra=QWEN3_MOE | dict(num_experts=12, moe_intermediate_size=8, norm_topk_prob=False),
    ),
    # The shape of V2-Lite: queries without a latent of their own, the best experts of all.
    "hf-bf16-deepseek2-lite-yarn": BASE
    | dict(
        family="deepseek_v2",
        head_dim=None,
        tied=True,
        dtype="bf16",
        extra=DEEPSEEK | dict(topk_method="greedy", rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    ),
    "hf-f32-deepseek2-groups": BASE
    | dict(
        family="deepseek_v2",
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=None,
        tied=True,
        dtype="f32",
        extra=DEEPSEEK
        | dict(
            first_k_dense_replace=0, q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=6, v_head_dim=10,
            moe_intermediate_size=8, n_shared_experts=1, topk_method="group_limited_greedy", n_group=4, topk_group=2,
            routed_scaling_factor=1.5,
        ),  # fmt: skip
    ),
    "hf-bf16-deepseek3-yarn-mtp": BASE
    | dict(
        family="deepseek_v3",
        head_dim=None,
        tied=True,
        dtype="bf16",
        predicts_ahead=True,
        extra=DEEPSEEK
        | dict(
            q_lora_rank=16, n_shared_experts=1, n_group=4, topk_group=2,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7),
        ),  # fmt: skip
    ),
    # More heads than the sixteen that are computed at a time.
    "hf-f32-deepseek3-halves": BASE
    | dict(
        family="deepseek_v3",
        layers=1,
        heads=20,
        kv_heads=20,
        head_dim=None,
        tied=True,
        dtype="f32",
        extra=DEEPSEEK
        | dict(
            first_k_dense_replace=0, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
            moe_intermediate_size=8, n_shared_experts=1, n_group=2, topk_group=1, norm_topk_prob=False,
            rope_interleave=False,
        ),  # fmt: skip
    ),
    # As V3 and R1 are published: projections of eight bits with a scale for each block.
    "hf-f8-deepseek3": BASE
    | dict(
        family="deepseek_v3",
        head_dim=None,
        tied=True,
        dtype="bf16",
        eight_bits=(8, 16),
        extra=DEEPSEEK | dict(q_lora_rank=16, n_shared_experts=1, n_group=4, topk_group=2),
    ),
}
GGUF_MODELS = {
    "gguf-f32": BASE | dict(layers=1, head_dim=8, kv_heads=2, quants="F32"),
    "gguf-f16-tied": BASE | dict(layers=1, hidden=48, quants="F16", tied=True, heads=6, kv_heads=2),
    "gguf-q8_0-bias": BASE | dict(quants="Q8_0", heads=8, kv_heads=2, extra=dict(attention_bias=True)),
    "gguf-q4_0": BASE | dict(quants="Q4_0", heads=4, kv_heads=1, head_dim=32),
    "gguf-q4_1-like-smollm2": BASE | dict(hidden=96, ffn=64, quants="Q4_1", embedding="Q8_0", tied=True, heads=6, kv_heads=2),
    "gguf-q5_0-q5_1": BASE | dict(quants="Q5_0", down="Q5_1"),
    "gguf-q8_0-llama3-divisors": BASE | dict(quants="Q8_0", heads=4, kv_heads=1, extra=LLAMA3),
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
    "gguf-q8_0-qwen2": BASE | dict(family="qwen2", quants="Q8_0", kv_heads=2, head_dim=None, tied=True),
    "gguf-q8_0-qwen3": BASE | dict(family="qwen3", quants="Q8_0", kv_heads=2),
    "gguf-q8_0-qwen3moe": BASE
    | dict(
        family="qwen3_moe", quants="Q8_0", kv_heads=2, tied=True, extra=QWEN3_MOE | dict(moe_intermediate_size=32)
    ),
    "gguf-q8_0-deepseek2": BASE
    | dict(
        family="deepseek_v2",
        quants="Q8_0",
        heads=2,
        kv_heads=2,
        head_dim=None,
        tied=True,
        epsilon=1e-6,
        extra=DEEPSEEK | QUANTISABLE | dict(topk_method="greedy", n_routed_experts=4, num_experts_per_tok=2),
    ),
    # Newer files: what makes keys and what makes values apart.
    "gguf-q8_0-deepseek3-split": BASE
    | dict(
        family="deepseek_v3",
        quants="Q8_0",
        heads=2,
        kv_heads=2,
        head_dim=None,
        tied=True,
        epsilon=1e-6,
        split_kv_b=True,
        extra=DEEPSEEK
        | QUANTISABLE
        | dict(q_lora_rank=32, n_group=2, topk_group=1, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    ),
}


def random_model(spec, seed):
    """A model with weights large enough that logits differ clearly and every part matters."""
    configuration, architecture = FAMILIES[spec["family"]]
    shape = dict(num_key_value_heads=spec["kv_heads"], head_dim=spec["head_dim"])
    config = configuration(
        vocab_size=VOCABULARY,
        hidden_size=spec["hidden"],
        intermediate_size=spec["ffn"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        max_position_embeddings=256,
        rms_norm_eps=spec.get("epsilon", 1e-5),
        tie_word_embeddings=spec["tied"],
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        attn_implementation="eager",
        **{name: value for name, value in shape.items() if value is not None},
        **spec["extra"],
    )
    model = architecture(config).eval()
    torch.manual_seed(seed)
    rounding = {"f16": torch.float16, "bf16": torch.bfloat16}.get(spec.get("dtype"), torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.2)
            elif name.endswith(".bias"):
                weight.normal_(0.0, 0.3)
            else:
                weight.normal_(0.0, 1.5 / weight.shape[-1] ** 0.5)
            weight.copy_(weight.to(rounding).float())
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.normal_(0.0, 0.2)
        if "eight_bits" in spec:
            to_eight_bits(model, spec["eight_bits"])
    return model


def to_eight_bits(model, block):
    """Makes every projection what its eight bits and scales say; `model.eight_bits` has those by name."""
    model.eight_bits = {}
    for name, weight in list(tensors(model)):
        if name.endswith("proj.weight") or name.endswith("kv_a_proj_with_mqa.weight"):
            quants, scales = eight_bits(weight.detach(), block)
            model.eight_bits[name] = quants, scales
            spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            weight.copy_(quants.float() * spread[: weight.shape[0], : weight.shape[1]])


def eight_bits(weight, block):
    """E4M3 and, for each block of rows and columns, what its largest must be divided by to become E4M3's largest."""
    rows, columns = (-(-axis // size) for axis, size in zip(weight.shape, block))
    quants, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            scales[row, column] = weight[place].abs().max() / torch.finfo(torch.float8_e4m3fn).max
            quants[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return quants, scales


def tensors(model):
    """All tensors by their names in a checkpoint: transformers stacks experts in memory, but not in files."""
    buffers = ((name, tensor) for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias"))
    for name, tensor in [*model.named_parameters(), *buffers]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            yield name, tensor
            continue
        base = name.rsplit(".", 1)[0]
        for expert, matrix in enumerate(tensor):
            if name.endswith("down_proj"):
                yield f"{base}.{expert}.down_proj.weight", matrix
            else:
                gate, up = matrix.chunk(2)
                yield f"{base}.{expert}.gate_proj.weight", gate
                yield f"{base}.{expert}.up_proj.weight", up
