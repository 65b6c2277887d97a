"""Models that take several times as long to judge as their neighbours in the corpora."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["HEAVY"]

_NAMES: Mapping[str, str] = {
    "hf": """
        blip-retrieval deformable_detr pegasus@sdpa pegasus_x rt_detr siglip siglip2@sdpa zamba
    """,
    "hfx": """
        ernie4_5_moe
    """,
    "timm": """
        caformer_s18 crossvit_tiny_240 csatv2 cspresnet50 densenet121 densenetblur121d dpn48b gcvit_xxtiny
        ghostnetv2_100 ghostnetv3_050 inception_resnet_v2 lambda_resnet26t legacy_xception lowformer_b0
        maxvit_rmlp_pico_rw_256 mobilenetv5_base mvitv2_tiny pnasnet5large repvit_m1 res2net50_14w_8s resnet26t
        resnetaa50 selecsls42 sequencer2d_s shvit_s1 tf_efficientnet_cc_b0_4e volo_d1_224 xception41p
    """,
    "tv": """
        convnext_small convnext_tiny densenet161 efficientnet_b6 efficientnet_v2_m efficientnet_v2_s regnet_x_16gf
        regnet_x_3_2gf regnet_x_8gf regnet_y_16gf regnet_y_32gf regnet_y_3_2gf resnet152 resnet50 resnext101_32x8d
        resnext50_32x4d swin_v2_t
    """,
    "tvx": """
        fasterrcnn_resnet50_fpn_v2 fcn_resnet101 fcn_resnet50 maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2
        r2plus1d_18 raft_large retinanet_resnet50_fpn_v2 ssd300_vgg16
    """,
}
HEAVY = frozenset(f"{corpus}:{name}" for corpus, found in _NAMES.items() for name in found.split())
