"""More architectures of transformers: those that their default configuration and one kind of input describe, and parts.

A name stands for one model, with eager attention. The builder is that of :mod:`tests.zoo.transformers_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.zoo import Case
from tests.zoo.transformers_models import (
    CAUSAL,
    EAGER,
    HIDDEN,
    IMAGE,
    MIXTURE,
    MLA,
    TOKENS,
    Arch,
    build_arch,
    ids,
    image,
    padded,
    text,
)

__all__ = ["NAMES", "build"]

IMAGE_TOKEN = 4  # below the ids that random text has

Inputs = Callable[[], dict[str, Any]]

# (inputs, configuration) -> "kind:class" of each architecture
PLAIN: tuple[tuple[Inputs, Mapping[str, Any], str], ...] = (
    (
        padded,
        {},
        (
            "aria_text:AriaTextForCausalLM beam:BeamForCausalLM bert-generation:BertGenerationDecoder "
            "bitnet:BitNetForCausalLM cwm:CwmForCausalLM doge:DogeForCausalLM "
            "data2vec-text:Data2VecTextForCausalLM ernie4_5:Ernie4_5ForCausalLM "
            "flint:FlintForCausalLM fuyu:FuyuForCausalLM granite_swa:GraniteSWAForCausalLM "
            "hunyuan_v1_dense:HunYuanDenseV1ForCausalLM hyperclovax:HyperCLOVAXForCausalLM jais2:Jais2ForCausalLM "
            "ministral3:Ministral3ForCausalLM mllama:MllamaForCausalLM moshi:MoshiForCausalLM olmo3:Olmo3ForCausalLM "
            "modernbert-decoder:ModernBertDecoderForCausalLM vaultgemma:VaultGemmaForCausalLM aria:AriaModel "
            "clip_text_model:CLIPTextModel deepseek_vl:DeepseekVLModel dpr:DPRQuestionEncoder gte:GteModel "
            "jina_embeddings_v3:JinaEmbeddingsV3Model llava_next:LlavaNextModel mistral3:Mistral3Model "
            "molmo2_text:Molmo2TextModel paligemma:PaliGemmaModel qwen3_vl_text:Qwen3VLTextModel smolvlm:SmolVLMModel "
            "sam3_lite_text_text_model:Sam3LiteTextTextModel tipsv2_text_model:Tipsv2TextModel "
            "ultrabert:UltrabertModel video_llava:VideoLlavaModel vipllava:VipLlavaModel voxtral:VoxtralModel"
        ),
    ),
    (
        padded,
        MIXTURE,
        (
            "afmoe:AfmoeForCausalLM ernie4_5_moe:Ernie4_5_MoeForCausalLM exaone_moe:ExaoneMoeForCausalLM "
            "hy_v3:HYV3ForCausalLM kolibri1:Kolibri1ForCausalLM mellum:MellumForCausalLM "
            "minimax_m2:MiniMaxM2ForCausalLM "
            "solar_open:SolarOpenForCausalLM openai_privacy_filter:OpenAIPrivacyFilterModel "
            "qwen3_vl_moe_text:Qwen3VLMoeTextModel cohere2_moe:Cohere2MoeForCausalLM flex_olmo:FlexOlmoForCausalLM "
            "granitemoe_swa:GraniteMoeSWAForCausalLM granitemoeshared:GraniteMoeSharedForCausalLM "
            "hunyuan_v1_moe:HunYuanMoEV1ForCausalLM minimax:MiniMaxForCausalLM"
        ),
    ),
    (
        padded,
        MLA,
        (
            "axk1:AXK1ForCausalLM axk2:AXK2ForCausalLM glm4_moe_lite:Glm4MoeLiteForCausalLM "
            "glm_moe_dsa:GlmMoeDsaForCausalLM hy_v4:HYV4ForCausalLM youtu:YoutuForCausalLM"
        ),
    ),
    (
        image(),
        {},
        (
            "aimv2_vision_model:Aimv2VisionModel chinese_clip_vision_model:ChineseCLIPVisionModel mlcd:MLCDVisionModel "
            "clip_vision_model:CLIPVisionModel idefics3_vision:Idefics3VisionTransformer pixio:PixioModel "
            "internvl_vision:InternVLVisionModel qianfan_ocr_vision:QianfanOCRVisionModel sam3_vit_model:Sam3ViTModel "
            "siglip_vision_model:SiglipVisionModel smolvlm_vision:SmolVLMVisionTransformer "
            "tipsv2_vision_model:Tipsv2VisionModel"
        ),
    ),
)


def _seen(tokens: int, **more: Callable[[], Any]) -> Inputs:
    """Text in which ``tokens`` ids stand for an image."""

    def make() -> dict[str, Any]:
        found = torch.cat([torch.full((2, tokens), IMAGE_TOKEN), ids()], 1)
        return {
            "input_ids": found,
            "attention_mask": torch.ones_like(found),
            **{k: v() for k, v in more.items()},
        }

    return make


def _pixels(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, *shape)


_SEES = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, "vision_config": {"image_size": IMAGE}}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 5}

ARCHITECTURES = (
    Arch(
        "granitemoehybrid", padded, {**MIXTURE, **_SSM, "layer_types": ["mamba", "attention"]}, CAUSAL, attention=EAGER
    ),
    Arch("falcon_h1", padded, {**_SSM, "mamba_d_ssm": 96}, CAUSAL, attention=EAGER),
    Arch(
        "lfm2_moe",
        padded,
        {**MIXTURE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        CAUSAL,
        attention=EAGER,
    ),
    Arch(
        "qwen3_5_text",
        padded,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 10,
            "linear_value_head_dim": 12,
        },
        "Qwen3_5ForCausalLM",
        EAGER,
    ),
    Arch("glm4v_text", text, _ROPE, "Glm4vTextModel", EAGER),
    Arch("qwen2_vl_text", text, _ROPE, "Qwen2VLTextModel", EAGER),
    Arch("idefics3", _seen(4, pixel_values=_pixels(1, 3, IMAGE, IMAGE)), {**_SEES, "scale_factor": 2}, attention=EAGER),
    Arch(
        "paligemma-image",
        _seen(16, pixel_values=_pixels(3, IMAGE, IMAGE)),
        {**_SEES, "projection_dim": HIDDEN},
        "PaliGemmaForConditionalGeneration",
        EAGER,
        "paligemma",
    ),
    Arch(
        "gemma3",
        _seen(
            4,
            pixel_values=_pixels(3, IMAGE, IMAGE),
            token_type_ids=lambda: torch.tensor([[1] * 4 + [0] * TOKENS] * 2),
        ),
        {**_SEES, "mm_tokens_per_image": 4, "text_config": _LAYERS},
        "Gemma3ForConditionalGeneration",
        EAGER,
    ),
    Arch(
        "aya_vision",
        _seen(4, pixel_values=_pixels(3, IMAGE, IMAGE)),
        {**_SEES, "downsample_factor": 2, "text_config": _LAYERS},
        "AyaVisionForConditionalGeneration",
        EAGER,
    ),
    Arch(
        "blip-2",
        _seen(4, pixel_values=_pixels(3, IMAGE, IMAGE)),
        {**_SEES, "num_query_tokens": 4, "text_config": {"word_embed_proj_dim": HIDDEN}},
        "Blip2ForConditionalGeneration",
        EAGER,
    ),
    Arch(
        "mllama_text_model",
        lambda: {**text(), "cross_attention_states": torch.randn(2, 7, HIDDEN)},
        {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "MllamaForCausalLM",
        EAGER,
    ),
    Arch(
        "donut-swin",
        image(),
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        attention=EAGER,
    ),
    Arch(
        "mgp-str",
        lambda: {"pixel_values": torch.randn(2, 3, 32, 128)},
        {
            "image_size": [32, 128],
            "patch_size": 4,
            "max_token_length": 5,
            "num_character_labels": 11,
            "num_bpe_labels": 20,
            "num_wordpiece_labels": 20,
        },
        "MgpstrForSceneTextRecognition",
        EAGER,
    ),
    Arch(
        "musicgen_decoder",
        lambda: {"input_ids": torch.randint(0, 60, (4, 10)), "encoder_hidden_states": torch.randn(2, 7, HIDDEN)},
        {"num_codebooks": 2},
        "MusicgenForCausalLM",
        EAGER,
    ),
    Arch(
        "splinter-qa",
        text,
        {},
        "SplinterForQuestionAnswering",
        EAGER,
        "splinter",
    ),
    Arch("vit_mae-pretraining", image(), {"decoder_hidden_size": 28}, "ViTMAEForPreTraining", EAGER, "vit_mae"),
    Arch("longformer-mlm", padded, {"attention_window": [4, 4]}, "LongformerForMaskedLM", EAGER, "longformer"),
    Arch(
        "bert-loss",
        lambda: {**padded(), "labels": torch.tensor([0, 2])},
        {},
        "AutoModelForSequenceClassification",
        EAGER,
        "bert",
    ),
    Arch(
        "llama-loss",
        lambda: {**padded(), "labels": ids(), "output_hidden_states": True, "output_attentions": True},
        {},
        CAUSAL,
        EAGER,
        "llama",
    ),
    Arch(
        "segformer-loss",
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.randint(0, 5, (2, 64, 64))},
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
        "AutoModelForSemanticSegmentation",
        EAGER,
        "segformer",
    ),
)


def _all() -> Iterator[Arch]:
    for inputs, config, listed in PLAIN:
        for entry in listed.split():
            kind, _, cls = entry.partition(":")
            yield Arch(kind, inputs, config, cls, EAGER)
    yield from ARCHITECTURES


_BY_NAME = {arch.name: arch for arch in _all()}
NAMES = tuple(_BY_NAME)


def build(name: str) -> Case:
    """A model with random weights and inputs for it."""
    return build_arch(_BY_NAME[name], "eager")
