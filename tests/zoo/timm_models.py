"""One model or more of each family module of timm, the smallest ones, on images as small as they allow.

Families that only have large members are made shallower by their own arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

from tests.zoo import Case

__all__ = ["NAMES", "build"]


@dataclass(frozen=True)
class Entry:
    """A model of timm.

    Attributes:
        size: side of the images.
        options: arguments of its factory.
    """

    name: str
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


def _fixed(name: str, size: int, **options: Any) -> Entry:
    """A model that has to be told the size of its images."""
    return Entry(name, size, {"img_size": size, **options})


_SHALLOW = {"depth": 2, "embed_dim": 96, "num_heads": 4}

ENTRIES = (
    _fixed("beit_base_patch16_224", 64, **_SHALLOW),
    Entry("halonet_h1", 256),
    Entry("eca_botnext26ts_256", 128, {"img_size": 128}),
    Entry("lambda_resnet26t", 128, {"img_size": 128}),
    Entry("test_byobnet"),
    Entry("mobileone_s1"),
    _fixed("cait_xxs24_224", 64, depth=2),
    _fixed("coat_tiny", 64),
    Entry("coat_lite_tiny", 64, {"img_size": 64}),
    _fixed("convit_tiny", 64, depth=3, local_up_to_layer=2),
    Entry("convmixer_768_32", 56),
    Entry("test_convnext"),
    Entry("test_convnext2"),
    Entry("convnextv2_atto"),
    Entry("cpubone_nano"),
    Entry("crossvit_tiny_240", 240),
    Entry("csatv2", 512),
    Entry("cs3darknet_focus_s"),
    Entry("cspresnet50"),
    Entry("cspnext_tiny"),
    Entry("davit_tiny"),
    Entry("deepseek_vit_412m", 56, {"img_size": 56, **_SHALLOW}),
    _fixed("deit_tiny_distilled_patch16_224", 64, depth=2),
    _fixed("deit3_small_patch16_224", 64, depth=2),
    Entry("densenet121"),
    Entry("densenetblur121d"),
    Entry("dla46x_c"),
    Entry("dpn48b"),
    Entry("edgenext_xx_small"),
    Entry("efficientformer_l1", 224),
    _fixed("efficientformerv2_s0", 64),
    Entry("test_efficientnet"),
    Entry("test_efficientnet_evos"),
    Entry("test_efficientnet_gn"),
    Entry("efficientvim_m1"),
    Entry("efficientvit_b0"),
    Entry("efficientvit_m0", 224),
    _fixed("eva02_tiny_patch14_224", 56, depth=2),
    _fixed("vit_tiny_patch16_dinov3_qkvb", 64, depth=2),
    Entry("fasternet_t0"),
    Entry("fastvit_t8"),
    Entry("focalnet_tiny_srf", 64),
    Entry("gcvit_xxtiny", 224),
    Entry("gemma4_vit_167m", 96, {"img_size": 96, **_SHALLOW}),
    Entry("ghostnet_050"),
    Entry("ghostnetv2_100"),
    Entry("ghostnetv3_050"),
    Entry("hardcorenas_b"),
    Entry("hgnetv2_b0"),
    Entry("hiera_tiny_224", 64, {"img_size": 64, "embed_dim": 24}),
    Entry("sam2_hiera_tiny", 128),
    Entry("hrnet_w18_small"),
    Entry("iformer_t", 224),
    Entry("inception_next_atto"),
    Entry("inception_resnet_v2", 96),
    Entry("inception_v3", 96),
    Entry("inception_v4", 96),
    Entry("lcnetv2_small"),
    Entry("levit_128s", 224),
    Entry("levit_conv_128s", 224),
    Entry("lowformer_b0"),
    Entry("test_mambaout"),
    Entry("maxvit_pico_rw_256", 128, {"img_size": 128}),
    Entry("maxvit_rmlp_pico_rw_256", 128, {"img_size": 128}),
    Entry("coatnet_pico_rw_224", 64, {"img_size": 64}),
    Entry("poolformerv2_s12"),
    Entry("caformer_s18"),
    _fixed("gmlp_ti16_224", 64),
    _fixed("mixer_s32_224", 64),
    _fixed("resmlp_12_224", 64),
    Entry("mobilenetv3_small_050"),
    Entry("lcnet_035"),
    Entry("mobilenetv5_base", 64),
    Entry("mobilevit_xxs"),
    Entry("mobilevitv2_050"),
    Entry("mvitv2_tiny", 64, {"img_size": 64}),
    Entry("naflexvit_base_patch16_gap", 64, {"depth": 2, "embed_dim": 96, "num_heads": 4}),
    Entry("nasnetalarge", 96),
    _fixed("nest_tiny", 64, patch_size=4),
    Entry("nextvit_small"),
    Entry("test_nfnet"),
    Entry("nf_regnet_b0"),
    _fixed("pit_ti_224", 64),
    _fixed("pit_ti_distilled_224", 64),
    Entry("pnasnet5large", 96),
    Entry("pvt_v2_b0"),
    Entry("pvt_v2_b2_li"),
    Entry("qwen3_vit_88m", 64, {"img_size": 64, **_SHALLOW}),
    Entry("rdnet_tiny"),
    Entry("regnetx_002"),
    Entry("regnety_002"),
    Entry("regnetz_005"),
    Entry("repghostnet_050"),
    Entry("repvit_m1"),
    Entry("res2net50_14w_8s"),
    Entry("resnest14d"),
    Entry("test_resnet"),
    Entry("resnet10t"),
    Entry("ecaresnet26t"),
    Entry("resnet26t"),
    Entry("resnetaa50"),
    Entry("seresnext26d_32x4d"),
    Entry("resnetv2_18"),
    Entry("resnetv2_50x1_bit"),
    Entry("rexnet_100"),
    Entry("selecsls42"),
    Entry("legacy_seresnet18"),
    Entry("legacy_senet154", 64),
    Entry("sequencer2d_s", 224, {"layers": (1, 1, 1, 1)}),
    Entry("shvit_s1", 96),
    Entry("skresnet18"),
    Entry("starnet_s050"),
    Entry("swiftformer_xs"),
    _fixed("swin_tiny_patch4_window7_224", 56, depths=(1, 1, 2, 1), embed_dim=24),
    _fixed("swinv2_tiny_window8_256", 64, depths=(1, 1, 2, 1), embed_dim=24),
    _fixed("swinv2_cr_tiny_224", 64, depths=(1, 1, 2, 1), embed_dim=24),
    Entry("tiny_vit_5m_224", 224),
    Entry("tnt_s_legacy_patch16_224", 224, {"depth": 2}),
    Entry("tresnet_m"),
    _fixed("twins_svt_small", 64, depths=(1, 1, 2, 1)),
    _fixed("twins_pcpvt_small", 64, depths=(1, 1, 2, 1)),
    Entry("vgg11", 64),
    Entry("visformer_tiny", 224),
    Entry("test_vit", 160),
    Entry("test_vit2", 160),
    Entry("test_vit3", 160),
    Entry("test_vit4", 160),
    _fixed("vit_tiny_r_s16_p8_224", 64, depth=2),
    _fixed("vit_relpos_small_patch16_224", 64, depth=2),
    _fixed("vit_srelpos_small_patch16_224", 64, depth=2),
    _fixed("samvit_base_patch16_224", 64, depth=2, embed_dim=96, num_heads=4),
    Entry("vitamin_small_224", 64, {"img_size": 64}),
    _fixed("volo_d1_224", 64),
    Entry("ese_vovnet19b_slim_dw"),
    Entry("vovnet39a"),
    Entry("legacy_xception", 96),
    Entry("xception41p", 96),
    _fixed("xcit_nano_12_p8_224", 64, depth=2),
    # other ways to normalise, attend, pool and embed than the families' smallest members have
    Entry("test_efficientnet_ln"),
    Entry("convnext_zepto_rms"),
    Entry("mixnet_s"),
    Entry("mobilenetv4_conv_small_035"),
    Entry("cpubone_b1_dwnorm"),
    Entry("regnetz_b16_evos"),
    Entry("tf_efficientnet_cc_b0_4e"),
    _fixed("vit_pe_core_tiny_patch16_384", 64, depth=2),
    _fixed("vit_base_patch16_siglip_224", 64, **_SHALLOW),
    _fixed("vit_so150m_patch16_reg4_map_256", 64, **_SHALLOW),
    _fixed("vit_base_patch16_xp_224", 64, **_SHALLOW),
    _fixed("vit_intern300m_patch14_448", 56, **_SHALLOW),
    _fixed("vit_giant_patch16_lingbot", 64, **_SHALLOW),
    _fixed("aimv2_large_patch14_224", 56, **_SHALLOW),
    _fixed("beit3_base_patch16_224", 64, **_SHALLOW),
    _fixed("eva_giant_patch14_clip_224", 56, **_SHALLOW),
    _fixed("vit_relpos_base_patch16_clsgap_224", 64, **_SHALLOW),
    Entry("naflexvit_base_patch16_map", 64, _SHALLOW),
    Entry("naflexvit_base_patch16_parfac_gap", 64, _SHALLOW),
    Entry("qwen3_vit_88m_merge", 64, {"img_size": 64, **_SHALLOW}),
    Entry("gemma4_vit_167m_enc", 96, {"img_size": 96, **_SHALLOW}),
)
_BY_NAME = {entry.name: entry for entry in ENTRIES}
NAMES = tuple(_BY_NAME)


def build(name: str) -> Case:
    """A model with random weights and images for it."""
    entry = _BY_NAME[name]
    model = timm.create_model(name, pretrained=False, **entry.options)
    return Case(model.eval(), (torch.randn(2, 3, entry.size, entry.size),))
