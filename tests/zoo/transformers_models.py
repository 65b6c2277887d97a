"""Architectures of transformers, from configurations of a few dozen channels.

Sizes are set wherever a configuration has an attribute of that name, in its parts too. They differ from each other
where an architecture lets them, so that dims that are not the same thing do not look the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.zoo import Case

__all__ = ["NAMES", "Arch", "build", "build_arch"]

HIDDEN, HEADS, LAYERS, WIDE, VOCAB, TOKENS, IMAGE, PATCH = 48, 4, 2, 80, 97, 10, 32, 8

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "decoder_hidden_size"), HIDDEN),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), WIDE),
    **dict.fromkeys(("n_inner", "decoder_intermediate_size", "ffn_hidden_size"), WIDE),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    "vocab_size": VOCAB,
    "num_key_value_heads": 2,
    "d_kv": 12,
    "head_dim": 12,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "type_vocab_size": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "projection_dim": 40,
    "num_labels": 5,
}


def ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(5, VOCAB, (batch, tokens))


def text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}


def padded() -> dict[str, Any]:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def _ids_only() -> dict[str, Any]:
    return {"input_ids": ids()}


def _seq2seq() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": ids(tokens=6)}


def _boxes() -> Tensor:
    corner = torch.randint(0, 20, (2, TOKENS, 2))
    return torch.cat([corner, corner + torch.randint(1, 20, (2, TOKENS, 2))], -1)


def image(size: int = IMAGE, channels: int = 3) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def _wave(samples: int = 800) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_values": torch.randn(2, samples)}


def _with(base: Callable[[], dict[str, Any]], **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {**base(), **{k: make() for k, make in more.items()}}


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        config: attributes that differ from ``SIZES``; a mapping is for a part of the configuration.
        auto: the auto class, or a class of transformers by name.
        attention: implementations to try, each a model of its own. Mixtures of experts are tried with each way of
            running experts too; grouped products know single precision only.
    """

    name: str
    inputs: Callable[[], dict[str, Any]] = text
    config: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModel"
    attention: tuple[str, ...] = ("eager", "sdpa")
    kind: str = ""


CAUSAL = "AutoModelForCausalLM"
MLM = "AutoModelForMaskedLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
BOTH, EAGER = ("eager", "sdpa"), ("eager",)
_CONV1D = {
    "conv_dim": (24, 32, 40),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 44,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}
MLA = {
    **MIXTURE,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}

ARCHITECTURES = (
    # encoders
    Arch("bert", padded),
    Arch("bert-mlm", auto=MLM, kind="bert"),
    Arch("bert-classifier", auto="AutoModelForSequenceClassification", kind="bert"),
    Arch("bert-qa", auto="AutoModelForQuestionAnswering", kind="bert", config={"num_labels": 2}),
    Arch("roberta", padded),
    Arch("xlm-roberta"),
    Arch("camembert", auto=MLM),
    Arch("roberta-prelayernorm"),
    Arch("xlm-roberta-xl"),
    Arch("xmod", config={"languages": ("en_XX",), "default_language": "en_XX"}),
    Arch("albert", config={"embedding_size": 20}, attention=BOTH),
    Arch("megatron-bert", attention=EAGER),
    Arch("layoutlm", _with(text, bbox=_boxes)),
    Arch("lilt", _with(text, bbox=_boxes), {"max_2d_position_embeddings": 80}, attention=EAGER),
    Arch("nystromformer", attention=EAGER, config={"segment_means_seq_len": 10, "num_landmarks": 5}),
    Arch("electra", config={"embedding_size": 20}),
    Arch("convbert", attention=EAGER, config={"embedding_size": 20, "conv_kernel_size": 3}),
    Arch(
        "mobilebert",
        config={"embedding_size": 20, "intra_bottleneck_size": 24, "true_hidden_size": 24},
        attention=EAGER,
    ),
    Arch("distilbert", padded),
    Arch(
        "deberta",
        attention=EAGER,
        config={"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    ),
    Arch(
        "deberta-v2",
        attention=EAGER,
        config={
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
    ),
    Arch("fnet", _ids_only, attention=EAGER),
    Arch(
        "funnel",
        attention=EAGER,
        config={"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1, "d_head": 12, "d_inner": WIDE},
        auto="FunnelModel",
    ),
    Arch("longformer", attention=EAGER, config={"attention_window": [4, 4]}),
    Arch(
        "big_bird", attention=EAGER, config={"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    ),
    Arch("mpnet", attention=EAGER),
    Arch("rembert", attention=EAGER, config={"input_embedding_size": 20, "output_embedding_size": 28}),
    Arch("roformer", attention=EAGER, config={"embedding_size": 20}),
    Arch("splinter", attention=EAGER),
    Arch(
        "squeezebert",
        attention=EAGER,
        config={
            "embedding_size": 48,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "intermediate_groups": 2,
            "output_groups": 2,
            "post_attention_groups": 1,
        },
    ),
    Arch("ibert", attention=EAGER),
    Arch("ernie"),
    Arch("esm", attention=BOTH, config={"position_embedding_type": "rotary", "token_dropout": False}),
    Arch(
        "canine",
        attention=EAGER,
        config={
            "local_transformer_stride": 16,
            "num_hash_buckets": 50,
            "num_hash_functions": 4,
            "downsampling_rate": 2,
            "upsampling_kernel_size": 3,
        },
    ),
    Arch("flaubert", attention=EAGER, config={"emb_dim": HIDDEN}),
    Arch("xlm", attention=EAGER, config={"emb_dim": HIDDEN}),
    Arch("xlnet", attention=EAGER, config={"d_inner": WIDE, "d_head": 12}),
    Arch("luke", attention=EAGER, config={"entity_vocab_size": 30, "entity_emb_size": 20}),
    Arch("mra", attention=EAGER, config={"block_per_row": 1, "num_block": 1}),
    Arch("yoso", attention=EAGER, config={"use_expectation": True}),
    Arch(
        "tapas",
        _with(text, token_type_ids=lambda: torch.zeros(2, TOKENS, 7, dtype=torch.long)),
        attention=EAGER,
        config={"type_vocab_sizes": [3, 8, 8, 2, 8, 10, 10]},
    ),
    Arch("modernbert", config={"global_attn_every_n_layers": 2, "local_attention": 4}),
    Arch("nomic_bert"),
    Arch("eurobert", config={"head_dim": 12}),
    Arch(
        "reformer",
        attention=EAGER,
        config={
            "attn_layers": ["local", "lsh"],
            "attention_head_size": 12,
            "axial_pos_shape": [2, 5],
            "axial_pos_embds_dim": [20, 28],
            "num_buckets": 2,
            "local_attn_chunk_length": 5,
            "lsh_attn_chunk_length": 5,
            "feed_forward_size": WIDE,
            "hash_seed": 0,
            "is_decoder": True,
        },
    ),
    # decoders
    Arch("gpt2", auto=CAUSAL),
    Arch("gpt2-model", kind="gpt2"),
    Arch("openai-gpt", attention=EAGER),
    Arch("ctrl", attention=EAGER, config={"dff": WIDE}),
    Arch("gptj", auto=CAUSAL, attention=EAGER, config={"rotary_dim": 4}),
    Arch("codegen", auto=CAUSAL, attention=EAGER, config={"rotary_dim": 4}),
    Arch(
        "gpt_neo",
        auto=CAUSAL,
        attention=EAGER,
        config={
            "attention_types": [[["global", "local"], 1]],
            "attention_layers": ["global", "local"],
            "window_size": 4,
        },
    ),
    Arch("gpt_neox", auto=CAUSAL),
    Arch("gpt_neox_japanese", auto=CAUSAL, attention=EAGER),
    Arch("gpt_bigcode", auto=CAUSAL),
    Arch("gpt_oss", auto=CAUSAL, attention=EAGER, config=MIXTURE),
    Arch("opt", auto=CAUSAL, config={"word_embed_proj_dim": 20}),
    Arch("biogpt", auto=CAUSAL),
    Arch("xglm", auto=CAUSAL, attention=EAGER),
    Arch("llama", auto=CAUSAL),
    Arch("llama-model", kind="llama", config={"head_dim": 10}),
    Arch("llama-tied", auto=CAUSAL, kind="llama", config={"tie_word_embeddings": True}),
    Arch("mistral", auto=CAUSAL, config={"sliding_window": 4}),
    Arch("qwen2", auto=CAUSAL),
    Arch("qwen3", auto=CAUSAL, config={"head_dim": 16}),
    Arch("gemma", auto=CAUSAL, config={"num_key_value_heads": 1, "head_dim": 14}),
    Arch(
        "gemma2",
        auto=CAUSAL,
        config={"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
        attention=EAGER,
    ),
    Arch("gemma3_text", auto=CAUSAL, config={"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}),
    Arch("phi", auto=CAUSAL, config={"partial_rotary_factor": 0.5}),
    Arch("phi3", auto=CAUSAL),
    Arch(
        "stablelm",
        auto=CAUSAL,
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    Arch("olmo", auto=CAUSAL),
    Arch("olmo2", auto=CAUSAL),
    Arch("cohere", auto=CAUSAL),
    Arch("cohere2", auto=CAUSAL),
    Arch("nemotron", auto=CAUSAL),
    Arch("granite", auto=CAUSAL),
    Arch("glm", auto=CAUSAL),
    Arch("glm4", auto=CAUSAL),
    Arch("starcoder2", auto=CAUSAL),
    Arch("persimmon", auto=CAUSAL),
    Arch("smollm3", auto=CAUSAL),
    Arch("exaone4", auto=CAUSAL),
    Arch("helium", auto=CAUSAL),
    Arch("seed_oss", auto=CAUSAL),
    Arch("apertus", auto=CAUSAL),
    Arch("arcee", auto=CAUSAL),
    Arch("ministral", auto=CAUSAL),
    Arch("diffllama", auto=CAUSAL),
    Arch("nanochat", auto=CAUSAL),
    Arch("bloom", auto=CAUSAL, attention=EAGER),
    Arch("mpt", auto=CAUSAL, attention=EAGER, config={"expansion_ratio": 2}),
    Arch("falcon", auto=CAUSAL),
    Arch(
        "falcon-alibi",
        auto=CAUSAL,
        kind="falcon",
        config={"alibi": True, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
    ),
    Arch("falcon-new", auto=CAUSAL, kind="falcon", config={"new_decoder_architecture": True, "num_kv_heads": 2}),
    Arch("minicpm3", auto=CAUSAL, config=MLA),
    # mixture of experts
    Arch("mixtral", auto=CAUSAL, config=MIXTURE),
    Arch("qwen2_moe", auto=CAUSAL, config=MIXTURE),
    Arch("qwen3_moe", auto=CAUSAL, config=MIXTURE),
    Arch("olmoe", auto=CAUSAL, config=MIXTURE),
    Arch("phimoe", auto=CAUSAL, config=MIXTURE),
    Arch("jetmoe", auto=CAUSAL, config={**MIXTURE, "kv_channels": 12, "num_key_value_heads": 2}),
    Arch("granitemoe", auto=CAUSAL, config=MIXTURE),
    Arch(
        "dbrx",
        auto=CAUSAL,
        config={
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": WIDE, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
        },
    ),
    Arch("deepseek_v2", auto=CAUSAL, config={**MLA, "topk_method": "greedy"}),
    Arch("deepseek_v3", auto=CAUSAL, config=MLA),
    Arch("glm4_moe", auto=CAUSAL, config={**MIXTURE, "n_group": 1, "topk_group": 1}),
    Arch(
        "switch_transformers",
        _seq2seq,
        {
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 2,
            "expert_capacity": 16,
        },
        SEQ2SEQ,
        EAGER,
    ),
    Arch("nllb-moe", _seq2seq, {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}, SEQ2SEQ, EAGER),
    # state space, recurrent, hybrid
    Arch(
        "mamba", _ids_only, {"state_size": 6, "expand": 2, "time_step_rank": 5, "intermediate_size": 96}, CAUSAL, EAGER
    ),
    Arch(
        "mamba2",
        _ids_only,
        {"state_size": 6, "expand": 2, "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 5},
        CAUSAL,
        EAGER,
    ),
    Arch(
        "falcon_mamba",
        _ids_only,
        {"state_size": 6, "expand": 2, "time_step_rank": 5, "intermediate_size": 96},
        CAUSAL,
        EAGER,
    ),
    Arch("rwkv", _ids_only, {"attention_hidden_size": HIDDEN, "context_length": 64}, CAUSAL, EAGER),
    Arch(
        "jamba",
        config={
            **MIXTURE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
            "use_mamba_kernels": False,
        },
        auto=CAUSAL,
    ),
    Arch(
        "bamba",
        config={
            "mamba_d_state": 6,
            "mamba_n_heads": 8,
            "mamba_d_head": 12,
            "mamba_n_groups": 2,
            "attn_layer_indices": [1],
            "mamba_chunk_size": 5,
        },
        auto=CAUSAL,
    ),
    Arch(
        "zamba",
        config={
            "num_hidden_layers": 4,
            "attention_hidden_size": 96,
            "attention_head_dim": 24,
            "num_key_value_heads": 4,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
            "n_mamba_heads": 2,
            "use_mamba_kernels": False,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
        auto=CAUSAL,
        attention=EAGER,
    ),
    Arch(
        "recurrent_gemma",
        text,
        {"lru_width": HIDDEN, "num_hidden_layers": 3, "attention_window_size": 8, "head_dim": 12},
        CAUSAL,
        EAGER,
    ),
    Arch("lfm2", auto=CAUSAL, config={"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]}),
    Arch(
        "qwen3_next",
        auto=CAUSAL,
        config={
            **MIXTURE,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 10,
            "linear_value_head_dim": 12,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # encoder-decoders
    Arch("t5", _seq2seq, {}, SEQ2SEQ, EAGER),
    Arch(
        "t5-gated",
        _seq2seq,
        {
            "feed_forward_proj": "gated-gelu",
            "is_gated_act": True,
            "dense_act_fn": "gelu_new",
            "tie_word_embeddings": False,
        },
        SEQ2SEQ,
        EAGER,
        "t5",
    ),
    Arch("mt5", _seq2seq, {}, SEQ2SEQ, EAGER),
    Arch(
        "longt5",
        _seq2seq,
        {"local_radius": 3, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        SEQ2SEQ,
        EAGER,
    ),
    Arch("umt5", _seq2seq, {}, SEQ2SEQ, EAGER),
    Arch("bart", _seq2seq, {}, SEQ2SEQ),
    Arch("mbart", _seq2seq, {}, SEQ2SEQ),
    Arch("pegasus", _seq2seq, {}, SEQ2SEQ),
    Arch("pegasus_x", _seq2seq, {"block_size": 4, "num_global_tokens": 3}, SEQ2SEQ, EAGER),
    Arch("marian", _seq2seq, {"decoder_vocab_size": VOCAB}, SEQ2SEQ),
    Arch("m2m_100", _seq2seq, {}, SEQ2SEQ),
    Arch("blenderbot", _seq2seq, {}, SEQ2SEQ),
    Arch("blenderbot-small", _seq2seq, {}, SEQ2SEQ),
    Arch("plbart", _seq2seq, {}, SEQ2SEQ),
    Arch("mvp", _seq2seq, {}, SEQ2SEQ, EAGER),
    Arch(
        "led",
        _seq2seq,
        {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        SEQ2SEQ,
        EAGER,
    ),
    Arch(
        "bigbird_pegasus",
        _seq2seq,
        {"block_size": 2, "num_random_blocks": 1, "attention_type": "original_full"},
        SEQ2SEQ,
        EAGER,
    ),
    Arch("prophetnet", _seq2seq, {"num_decoder_attention_heads": HEADS, "ngram": 2, "num_buckets": 8}, SEQ2SEQ, EAGER),
    Arch("fsmt", _seq2seq, {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}, SEQ2SEQ, EAGER),
    # vision
    Arch("vit", image()),
    Arch("vit-classifier", image(), auto="AutoModelForImageClassification", kind="vit"),
    Arch("deit", image()),
    Arch("beit", image(), {"use_relative_position_bias": True, "use_shared_relative_position_bias": False}),
    Arch("data2vec-vision", image(), {"use_relative_position_bias": True}),
    Arch("dinov2", image()),
    Arch("dinov2_with_registers", image()),
    Arch("dinov3_vit", image(), {"num_register_tokens": 2}),
    Arch("dinov3_convnext", image(), {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}, attention=EAGER),
    Arch("ijepa", image()),
    Arch("vit_msn", image()),
    Arch("vit_mae", _with(image(), noise=lambda: torch.rand(2, 16))),
    Arch(
        "swin",
        image(),
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        attention=BOTH,
    ),
    Arch(
        "swinv2",
        image(),
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        attention=EAGER,
    ),
    Arch(
        "swin2sr",
        image(16),
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 1, "image_size": 16},
        "Swin2SRForImageSuperResolution",
        EAGER,
    ),
    Arch(
        "convnext",
        image(),
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "patch_size": 4},
        attention=EAGER,
    ),
    Arch(
        "convnextv2",
        image(),
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "patch_size": 4},
        attention=EAGER,
    ),
    Arch("poolformer", image(64), {**_STAGES, "patch_sizes": [7, 3, 3, 3]}, attention=EAGER),
    Arch(
        "resnet",
        image(64),
        {"embedding_size": 16, "hidden_sizes": [20, 24, 32, 40], "depths": [2, 1, 1, 1], "layer_type": "bottleneck"},
        "AutoModelForImageClassification",
        EAGER,
    ),
    Arch(
        "bit",
        image(64),
        {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 1, 1, 1], "num_groups": 4},
        attention=EAGER,
    ),
    Arch(
        "regnet",
        image(64),
        {"embedding_size": 16, "hidden_sizes": [24, 32, 40, 48], "depths": [2, 1, 1, 1], "groups_width": 8},
        attention=EAGER,
    ),
    Arch(
        "efficientnet",
        image(64),
        {"width_coefficient": 0.5, "depth_coefficient": 0.4, "hidden_dim": 640, "image_size": 64},
        attention=EAGER,
    ),
    Arch("mobilenet_v1", image(64), {"depth_multiplier": 0.25}, attention=EAGER),
    Arch("mobilenet_v2", image(64), {"depth_multiplier": 0.35}, "AutoModelForImageClassification", EAGER),
    Arch(
        "mobilevit",
        image(64),
        {
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 40],
            "image_size": 64,
            "patch_size": 2,
        },
        attention=EAGER,
    ),
    Arch("mobilevitv2", image(64), {"image_size": 64, "patch_size": 2, "width_multiplier": 0.5}, attention=EAGER),
    Arch(
        "levit",
        image(128),
        {
            "image_size": 128,
            "patch_size": 16,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "drop_path_rate": 0,
            "attention_ratio": [2, 2, 2],
            "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
        },
        attention=EAGER,
    ),
    Arch(
        "pvt",
        image(),
        {**_STAGES, "sequence_reduction_ratios": [4, 2, 2, 1], "patch_sizes": [4, 2, 2, 2]},
        attention=EAGER,
    ),
    Arch("pvt_v2", image(64), {**_STAGES, "image_size": 64}, attention=EAGER),
    Arch(
        "cvt",
        image(64),
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "patch_sizes": [7, 3, 3]},
        attention=EAGER,
    ),
    Arch("segformer", image(64), {**_STAGES, "decoder_hidden_size": 28}, "AutoModelForSemanticSegmentation", EAGER),
    Arch("glpn", image(64), {**_STAGES, "decoder_hidden_size": 28}, "GLPNForDepthEstimation", EAGER),
    Arch(
        "focalnet",
        image(),
        {
            "embed_dim": 24,
            "hidden_sizes": [24, 48],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "patch_size": 4,
        },
        attention=EAGER,
    ),
    Arch("swiftformer", image(64), {"embed_dims": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}, attention=EAGER),
    Arch(
        "hiera",
        image(64),
        {
            "embed_dim": 16,
            "image_size": [64, 64],
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 4, 8],
            "hidden_size": 128,
        },
        attention=EAGER,
    ),
    Arch(
        "hgnet_v2",
        image(64),
        {
            "stem_channels": [3, 8, 12],
            "stage_in_channels": [12, 16, 24, 32],
            "stage_mid_channels": [8, 8, 12, 16],
            "stage_out_channels": [16, 24, 32, 40],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
            "hidden_sizes": [16, 24, 32, 40],
        },
        "HGNetV2Backbone",
        EAGER,
    ),
    Arch(
        "textnet",
        image(64),
        {
            "stem_out_channels": 16,
            "hidden_sizes": [16, 24, 32, 40, 48],
            "image_size": [64, 64],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
            "conv_layer_strides": [[2], [2], [2], [2]],
        },
        attention=EAGER,
    ),
    Arch("imagegpt", lambda: {"input_ids": torch.randint(0, 90, (2, 16))}, {"n_positions": 16}, attention=EAGER),
    Arch(
        "detr",
        image(64),
        {"use_timm_backbone": False, "num_queries": 7, "backbone_config": "resnet"},
        "AutoModelForObjectDetection",
        EAGER,
    ),
    Arch(
        "conditional_detr",
        image(64),
        {"use_timm_backbone": False, "num_queries": 7, "backbone_config": "resnet"},
        "AutoModelForObjectDetection",
        EAGER,
    ),
    Arch(
        "deformable_detr",
        image(64),
        {
            "use_timm_backbone": False,
            "num_queries": 7,
            "backbone_config": "resnet",
            "num_feature_levels": 4,
            "d_model": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "disable_custom_kernels": True,
        },
        "AutoModelForObjectDetection",
        EAGER,
    ),
    Arch(
        "rt_detr",
        image(64),
        {
            "backbone_config": "rt_detr_resnet",
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [24, 32, 40],
            "d_model": 32,
            "num_queries": 7,
            "encoder_ffn_dim": 56,
            "num_feature_levels": 3,
            "decoder_in_channels": [32, 32, 32],
            "disable_custom_kernels": True,
            "anchor_image_size": None,
        },
        "AutoModelForObjectDetection",
        EAGER,
    ),
    Arch("yolos", image(), {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 6}, "AutoModelForObjectDetection"),
    Arch(
        "dpt",
        image(),
        {
            "neck_hidden_sizes": [12, 16, 20, 24],
            "fusion_hidden_size": 28,
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
        },
        "AutoModelForDepthEstimation",
    ),
    Arch(
        "sam",
        _with(image(64), input_points=lambda: torch.rand(2, 1, 3, 2) * 60),
        {
            "vision_config": {
                "image_size": 64,
                "patch_size": 8,
                "output_channels": 20,
                "global_attn_indexes": [1],
                "window_size": 3,
                "mlp_dim": WIDE,
                "num_pos_feats": 10,
            },
            "prompt_encoder_config": {
                "hidden_size": 20,
                "image_size": 64,
                "patch_size": 8,
                "image_embedding_size": 8,
                "mask_input_channels": 8,
            },
            "mask_decoder_config": {
                "hidden_size": 20,
                "mlp_dim": 36,
                "num_attention_heads": 2,
                "attention_downsample_rate": 2,
                "iou_head_hidden_dim": 24,
            },
        },
        "SamModel",
        BOTH,
    ),
    Arch(
        "seggpt",
        lambda: {
            "pixel_values": torch.randn(2, 3, 32, 16),
            "prompt_pixel_values": torch.randn(2, 3, 32, 16),
            "prompt_masks": torch.randn(2, 3, 32, 16),
        },
        {
            "image_size": [64, 16],
            "patch_size": 8,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1],
            "pretrain_image_size": 16,
            "decoder_hidden_size": 12,
            "mlp_dim": WIDE,
        },
        "SegGptModel",
        EAGER,
    ),
    Arch(
        "vitdet",
        image(),
        {"window_block_indices": [0], "window_size": 2, "use_relative_position_embeddings": True},
        attention=EAGER,
    ),
    Arch(
        "timesformer", lambda: {"pixel_values": torch.randn(2, 4, 3, IMAGE, IMAGE)}, {"num_frames": 4}, attention=EAGER
    ),
    Arch("videomae", lambda: {"pixel_values": torch.randn(2, 4, 3, IMAGE, IMAGE)}, {"num_frames": 4}),
    Arch(
        "vivit",
        lambda: {"pixel_values": torch.randn(2, 4, 3, IMAGE, IMAGE)},
        {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    ),
    Arch(
        "upernet",
        image(64),
        {
            "backbone_config": "convnext",
            "hidden_size": 28,
            "auxiliary_channels": 12,
            "auxiliary_in_channels": 32,
            "pool_scales": [1, 2],
        },
        "UperNetForSemanticSegmentation",
        EAGER,
    ),
    # audio
    Arch("wav2vec2", _wave(), _CONV1D),
    Arch(
        "wav2vec2-ctc",
        _wave(),
        {**_CONV1D, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        "AutoModelForCTC",
        BOTH,
        "wav2vec2",
    ),
    Arch("hubert", _wave(), _CONV1D),
    Arch("wavlm", _wave(), {**_CONV1D, "num_buckets": 8, "max_bucket_distance": 16}, attention=EAGER),
    Arch("unispeech", _wave(), _CONV1D),
    Arch("unispeech-sat", _wave(), _CONV1D),
    Arch("data2vec-audio", _wave(), {**_CONV1D, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}),
    Arch("sew", _wave(), {**_CONV1D, "squeeze_factor": 2}),
    Arch(
        "sew-d",
        _wave(),
        {**_CONV1D, "squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 16},
        attention=EAGER,
    ),
    Arch(
        "wav2vec2-conformer",
        _wave(),
        {**_CONV1D, "conv_depthwise_kernel_size": 5, "position_embeddings_type": "relative"},
        attention=EAGER,
    ),
    Arch(
        "wav2vec2-bert",
        lambda: {"input_features": torch.randn(2, 20, 24)},
        {
            "feature_projection_input_dim": 24,
            "conv_depthwise_kernel_size": 5,
            "left_max_position_embeddings": 8,
            "right_max_position_embeddings": 8,
        },
        attention=EAGER,
    ),
    Arch(
        "whisper",
        lambda: {"input_features": torch.randn(2, 20, 40), "decoder_input_ids": ids(tokens=6)},
        {"num_mel_bins": 20, "max_source_positions": 20},
        "WhisperForConditionalGeneration",
    ),
    Arch(
        "speech_to_text",
        lambda: {"input_features": torch.randn(2, 40, 20), "decoder_input_ids": ids(tokens=6)},
        {"input_feat_per_channel": 20, "conv_channels": 28, "max_source_positions": 64},
        "Speech2TextForConditionalGeneration",
        EAGER,
    ),
    Arch(
        "moonshine",
        lambda: {"input_values": torch.randn(2, 3000), "decoder_input_ids": ids(tokens=6)},
        {
            "decoder_num_key_value_heads": 4,
            "encoder_num_key_value_heads": 4,
            "encoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
        },
        "AutoModelForSpeechSeq2Seq",
    ),
    Arch(
        "speecht5",
        lambda: {"input_values": torch.randn(2, 800), "decoder_input_ids": ids(tokens=6)},
        _CONV1D,
        "SpeechT5ForSpeechToText",
        EAGER,
    ),
    Arch(
        "audio-spectrogram-transformer",
        lambda: {"input_values": torch.randn(2, 40, 16)},
        {"max_length": 40, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4},
    ),
    Arch(
        "encodec",
        lambda: {"input_values": torch.randn(2, 1, 640)},
        {
            "num_filters": 8,
            "hidden_size": 24,
            "codebook_size": 32,
            "codebook_dim": 24,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
        },
        attention=EAGER,
    ),
    Arch(
        "dac",
        lambda: {"input_values": torch.randn(2, 1, 640)},
        {
            "encoder_hidden_size": 8,
            "hidden_size": 32,
            "decoder_hidden_size": 32,
            "downsampling_ratios": [2, 4],
            "upsampling_ratios": [4, 2],
            "n_codebooks": 2,
            "codebook_size": 32,
        },
        attention=EAGER,
    ),
    Arch(
        "univnet",
        lambda: {"input_features": torch.randn(2, 12, 20), "noise_sequence": torch.randn(2, 12, 12)},
        {
            "model_in_channels": 12,
            "model_hidden_channels": 8,
            "num_mel_bins": 20,
            "resblock_kernel_sizes": [3],
            "resblock_stride_sizes": [4],
            "resblock_dilation_sizes": [[1, 3]],
            "kernel_predictor_hidden_channels": 12,
        },
        attention=EAGER,
    ),
    Arch(
        "clap",
        lambda: {
            "input_ids": ids(),
            "attention_mask": torch.ones(2, TOKENS, dtype=torch.long),
            "input_features": torch.randn(2, 1, 64, 16),
        },
        {
            "audio_config": {
                "spec_size": 32,
                "num_mel_bins": 16,
                "depths": [1, 1],
                "num_attention_heads": [2, 4],
                "patch_embeds_hidden_size": 16,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "window_size": 4,
                "num_hidden_layers": 2,
                "hidden_size": 32,
            }
        },
        attention=EAGER,
    ),
    # multimodal
    Arch("clip", lambda: {**text(), **image()()}),
    Arch("siglip", lambda: {**text(), **image()()}, {"text_config": {"projection_size": HIDDEN}}),
    Arch(
        "siglip2",
        lambda: {
            "pixel_values": torch.randn(2, 16, 192),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.full((2, 2), 4),
        },
        {"num_patches": 16},
        "Siglip2VisionModel",
        BOTH,
        "siglip2_vision_model",
    ),
    Arch("chinese_clip", lambda: {**text(), **image()()}, attention=EAGER),
    Arch("altclip", lambda: {**text(), **image()()}, {"text_config": {"project_dim": 40}}, attention=EAGER),
    Arch("metaclip_2", lambda: {**text(), **image()()}),
    Arch(
        "clipseg",
        lambda: {**text(), **image()()},
        {"reduce_dim": 12, "extract_layers": [0, 1], "decoder_num_attention_heads": 2, "decoder_intermediate_size": 28},
        "CLIPSegForImageSegmentation",
        EAGER,
    ),
    Arch(
        "owlvit",
        lambda: {"input_ids": ids(), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long), **image()()},
        {"text_config": {"max_position_embeddings": 16}},
        attention=EAGER,
    ),
    Arch(
        "groupvit",
        lambda: {**text(), **image()()},
        {
            "vision_config": {"depths": [1, 1, 1], "num_group_tokens": [6, 4, 0], "num_output_groups": [6, 4, 0]},
            "projection_intermediate_dim": 52,
        },
        attention=EAGER,
    ),
    Arch("blip", lambda: {**text(), **image()()}, {"text_config": {"encoder_hidden_size": HIDDEN}}, attention=EAGER),
    Arch(
        "blip-retrieval",
        lambda: {**text(), **image()()},
        {"text_config": {"encoder_hidden_size": HIDDEN}, "image_text_hidden_size": 20},
        "BlipForImageTextRetrieval",
        EAGER,
        "blip",
    ),
    Arch("git", lambda: {**text(), **image()()}, auto=CAUSAL, attention=EAGER),
    Arch("flava", lambda: {**text(), **image()()}, attention=EAGER),
    Arch(
        "vilt",
        lambda: {**text(), **image()(), "pixel_mask": torch.ones(2, IMAGE, IMAGE, dtype=torch.long)},
        {"max_image_length": 16},
        attention=EAGER,
    ),
    Arch(
        "bridgetower",
        lambda: {**text(), **image()(), "pixel_mask": torch.ones(2, IMAGE, IMAGE, dtype=torch.long)},
        {
            "text_config": {"num_hidden_layers": 2, "hidden_size": 64},
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 64,
            "vision_config": {"num_hidden_layers": 2, "hidden_size": 64, "patch_size": 8, "image_size": 32},
        },
        attention=EAGER,
    ),
    Arch(
        "lxmert",
        _with(text, visual_feats=lambda: torch.randn(2, 5, 28), visual_pos=lambda: torch.randn(2, 5, 4)),
        {"visual_feat_dim": 28, "l_layers": 2, "r_layers": 1, "x_layers": 1},
        attention=EAGER,
    ),
    Arch(
        "visual_bert",
        _with(text, visual_embeds=lambda: torch.randn(2, 5, 28)),
        {"visual_embedding_dim": 28},
        attention=EAGER,
    ),
    Arch(
        "llava",
        lambda: {"input_ids": torch.cat([torch.full((2, 16), 96), ids()], 1), **image()()},
        {"image_token_index": 96, "image_token_id": 96, "vision_config": "clip_vision_model", "text_config": "llama"},
        "LlavaForConditionalGeneration",
    ),
    Arch(
        "perceiver",
        lambda: {"inputs": torch.randn(2, 12, 20)},
        {
            "d_model": 20,
            "d_latents": 28,
            "num_latents": 6,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 2,
        },
        "PerceiverModel",
        EAGER,
    ),
    Arch(
        "layoutlmv3",
        _with(
            text,
            bbox=lambda: torch.randint(0, 50, (2, TOKENS, 4)),
            pixel_values=lambda: torch.randn(2, 3, IMAGE, IMAGE),
        ),
        {"input_size": IMAGE, "coordinate_size": 8, "shape_size": 8},
        attention=EAGER,
    ),
    Arch(
        "trocr",
        lambda: {"input_ids": ids(), "encoder_hidden_states": torch.randn(2, 7, 28)},
        {"cross_attention_hidden_size": 28, "hidden_size": 48},
        "TrOCRForCausalLM",
        EAGER,
    ),
    Arch(
        "kosmos-2",
        lambda: {
            **image()(),
            "input_ids": ids(tokens=12),
            "image_embeds_position_mask": torch.tensor([[0] + [1] * 4 + [0] * 7] * 2),
        },
        {"latent_query_num": 4, "text_config": {"embed_dim": 48, "layers": 2}},
        attention=BOTH,
    ),
    # time series
    Arch(
        "patchtst",
        lambda: {"past_values": torch.randn(2, 32, 3)},
        {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8},
        attention=EAGER,
    ),
    Arch(
        "patchtsmixer",
        lambda: {"past_values": torch.randn(2, 32, 3)},
        {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8},
        attention=EAGER,
    ),
    Arch(
        "decision_transformer",
        lambda: {
            "states": torch.randn(2, 5, 7),
            "actions": torch.randn(2, 5, 3),
            "rewards": torch.randn(2, 5, 1),
            "returns_to_go": torch.randn(2, 5, 1),
            "timesteps": torch.arange(5).repeat(2, 1),
            "attention_mask": torch.ones(2, 5, dtype=torch.long),
        },
        {"state_dim": 7, "act_dim": 3, "max_ep_len": 20},
        attention=EAGER,
    ),
)


def _names() -> dict[str, tuple[Arch, str]]:
    found = {}
    for arch in ARCHITECTURES:
        experts = (
            ("grouped", "batched")
            if "num_experts_per_tok" in arch.config
            and arch.name not in ("minicpm3", "jetmoe")
            and "sdpa" in arch.attention
            else ()
        )
        for implementation in (*arch.attention, *experts):
            found[arch.name if implementation == arch.attention[0] else f"{arch.name}@{implementation}"] = (
                arch,
                implementation,
            )
    return found


_BY_NAME = _names()
NAMES = tuple(_BY_NAME)


def _set(config: Any, values: Mapping[str, Any], *, always: bool) -> None:
    for name, value in values.items():
        part = getattr(config, name, None)
        if isinstance(part, transformers.PretrainedConfig) and isinstance(value, Mapping):
            _set(part, value, always=True)
        elif always or hasattr(config, name):
            try:
                setattr(config, name, value)
            except (AttributeError, NotImplementedError):  # a name that stands for another one and can't be set
                continue


def _sizes(config: Any) -> dict[str, Any]:
    """The sizes that a configuration can take: not those that it has one of per stage."""
    per_stage = (
        {"num_hidden_layers", "num_layers", "num_attention_heads"} if getattr(config, "num_stages", None) else set()
    )
    return {
        k: v for k, v in SIZES.items() if k not in per_stage and not isinstance(getattr(config, k, None), (list, tuple))
    }


def _shrink(config: Any) -> None:
    """Every part of a configuration gets small sizes."""
    _set(config, _sizes(config), always=False)
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _shrink(part)


def _config(arch: Arch) -> Any:
    kind = arch.kind or arch.name
    parts = {k: v for k, v in arch.config.items() if isinstance(v, str) and k.endswith("_config")}
    whole = {k: _config(_PARTS[v]) for k, v in parts.items()}
    config = transformers.AutoConfig.for_model(kind, **whole)
    return _finish(config, {k: v for k, v in arch.config.items() if k not in parts}, keep=set(whole))


def _finish(config: Any, own: Mapping[str, Any], keep: set[str]) -> Any:
    _set(config, _sizes(config), always=False)
    for name, part in vars(config).items():
        if isinstance(part, transformers.PretrainedConfig) and name not in keep:
            _shrink(part)
    _set(config, own, always=True)
    if hasattr(config, "out_features") and hasattr(config, "stage_names") and "out_features" not in own:
        config._out_features = config._out_indices = None
    # Values that a constructor derives from others (layer types, per-layer lists) are derived again.
    derived = config.to_dict()
    for name in ("layer_types", "block_types", "mlp_layer_types"):
        if name in derived and name not in own:
            derived.pop(name)
    for name in ("model_type", "transformers_version", "torch_dtype", "dtype", "architectures"):
        derived.pop(name, None)
    if "out_features" not in own:
        for name in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices"):
            derived.pop(name, None)
    fresh = type(config)(**derived)
    for name in keep:
        setattr(fresh, name, getattr(config, name))
    return fresh


_PARTS = {
    "resnet": Arch(
        "resnet",
        config={
            "embedding_size": 16,
            "hidden_sizes": [20, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        },
    ),
    "rt_detr_resnet": Arch(
        "rt_detr_resnet",
        config={
            "embedding_size": 16,
            "hidden_sizes": [20, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "layer_type": "bottleneck",
            "out_features": ["stage2", "stage3", "stage4"],
        },
    ),
    "convnext": Arch(
        "convnext",
        config={
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "patch_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    ),
    "clip_vision_model": Arch("clip_vision_model"),
    "llama": Arch("llama"),
}


def build(name: str) -> Case:
    """A model with random weights and inputs for it."""
    return build_arch(*_BY_NAME[name])


def build_arch(arch: Arch, implementation: str) -> Case:
    """A model of one architecture, by the name of an attention or of a way to run experts."""
    config = _config(arch)
    experts = {"grouped": "grouped_mm", "batched": "batched_mm"}.get(implementation, "eager")
    if experts != "eager":
        implementation = "sdpa"
    config._attn_implementation = implementation
    config._experts_implementation = experts
    auto = getattr(transformers, arch.auto)
    if arch.auto.startswith("Auto"):
        model = auto.from_config(config, attn_implementation=implementation)
    else:
        model = auto._from_config(config, attn_implementation=implementation)
    return Case(model.eval(), (), arch.inputs())
