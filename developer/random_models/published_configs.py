"""What the published extractors' `config.json` and `preprocessor_config.json` say, and tiny networks of the same kind.

Written down without access to the hub, from the scripts in transformers that made these repositories and the versions
of transformers that wrote them: every value that a network's shape or its input depends on is here, labels' names are
not.
"""

from typing import Any

_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# openmmlab/upernet-convnext-small
UPERNET_CONVNEXT_SMALL: dict[str, Any] = {
    "architectures": ["UperNetForSemanticSegmentation"],
    "auxiliary_channels": 256,
    "auxiliary_concat_input": False,
    "auxiliary_in_channels": 384,
    "auxiliary_loss_weight": 0.4,
    "auxiliary_num_convs": 1,
    "backbone_config": {
        "depths": [3, 3, 27, 3],
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_sizes": [96, 192, 384, 768],
        "image_size": 224,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "layer_scale_init_value": 1e-06,
        "model_type": "convnext",
        "num_channels": 3,
        "num_stages": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "patch_size": 4,
        "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
    },
    "hidden_size": 512,
    "id2label": {str(i): f"LABEL_{i}" for i in range(150)},
    "initializer_range": 0.02,
    "label2id": {f"LABEL_{i}": i for i in range(150)},
    "loss_ignore_index": 255,
    "model_type": "upernet",
    "pool_scales": [1, 2, 3, 6],
    "torch_dtype": "float32",
    "use_auxiliary_head": True,
}
UPERNET_PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True,
    "do_reduce_labels": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": _IMAGENET_MEAN,
    "image_processor_type": "SegformerImageProcessor",
    "image_std": _IMAGENET_STD,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 512, "width": 512},
}

# Intel/dpt-large
DPT_LARGE: dict[str, Any] = {
    "architectures": ["DPTForDepthEstimation"],
    "attention_probs_dropout_prob": 0.0,
    "auxiliary_loss_weight": 0.4,
    "backbone_out_indices": [5, 11, 17, 23],
    "fusion_hidden_size": 256,
    "head_in_index": -1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-12,
    "model_type": "dpt",
    "neck_hidden_sizes": [256, 512, 1024, 1024],
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 16,
    "qkv_bias": True,
    "readout_type": "project",
    "reassemble_factors": [4, 2, 1, 0.5],
    "semantic_classifier_dropout": 0.1,
    "semantic_loss_ignore_index": 255,
    "torch_dtype": "float32",
    "use_auxiliary_head": True,
    "use_batch_norm_in_fusion_residual": False,
}
DPT_PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True,
    "do_resize": True,
    "ensure_multiple_of": 1,
    "feature_extractor_type": "DPTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "keep_aspect_ratio": False,
    "resample": 2,
    "size": 384,
}

# Layers of the published DPT-Large that its network never runs, and that its file lacks.
DPT_LACKS = "neck.fusion_stage.layers.0.residual_layer1."

TINY_UPERNET: dict[str, Any] = {
    **UPERNET_CONVNEXT_SMALL,
    "auxiliary_channels": 8,
    "auxiliary_in_channels": 24,
    "backbone_config": {
        **UPERNET_CONVNEXT_SMALL["backbone_config"],
        "depths": [1, 1, 2, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "layer_scale_init_value": 0.5,
    },
    "hidden_size": 16,
}
TINY_UPERNET_PREPROCESSOR: dict[str, Any] = {**UPERNET_PREPROCESSOR, "size": {"height": 128, "width": 128}}
TINY_DPT: dict[str, Any] = {
    **DPT_LARGE,
    "backbone_out_indices": [0, 1, 2, 3],
    "fusion_hidden_size": 16,
    "hidden_size": 32,
    "image_size": 96,
    "intermediate_size": 64,
    "neck_hidden_sizes": [8, 16, 32, 32],
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
TINY_DPT_PREPROCESSOR: dict[str, Any] = {**DPT_PREPROCESSOR, "size": 96}
