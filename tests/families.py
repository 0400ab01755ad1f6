"""Every model family that is tried, as tiny models from configurations, and the cases made of them.

A case is a base model saved in one form (bare, as a language model, as a classifier), trained for one task on one
choice of layers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedModel, Qwen2Tokenizer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from . import tiny
from .tiny_recipe import COMMON, TOPIC, tokenizer

WORDS = " ".join([COMMON, *TOPIC.values()]).split()

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
TEXT = {**WIDTH, **TOKENS, "max_position_embeddings": 32}
NO_PAD = {name: value for name, value in TOKENS.items() if name != "pad_token_id"}  # as GPT and LLaMA come
GROUPED = {**WIDTH, **NO_PAD, "max_position_embeddings": 32, "num_key_value_heads": 1}
GPT = {**NO_PAD, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {**WIDTH, "image_size": 32, "patch_size": 8}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}

BERT_LIKE = "query, value"
LLAMA_LIKE = "q_proj, v_proj"


class Family(NamedTuple):
    """A model of a configuration and the layers that usually get an adapter; `size` is that of its images."""

    config: Mapping[str, Any]
    targets: str
    model_type: str | None = None  # the family's name, if None
    size: int = 32
    bare: str = "AutoModel"  # the class of the model without a head


ENCODERS = {
    "bert": Family(TEXT, BERT_LIKE),
    "roberta": Family(TEXT, BERT_LIKE),
    "xlm-roberta": Family(TEXT, BERT_LIKE),
    "camembert": Family(TEXT, BERT_LIKE),
    "distilbert": Family(
        {**TOKENS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32},
        "q_lin, v_lin",
    ),
    "albert": Family({**TEXT, "embedding_size": 8}, BERT_LIKE),
    "electra": Family({**TEXT, "embedding_size": 8}, BERT_LIKE),
    "deberta": Family({**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "in_proj"),
    "deberta-v2": Family(
        {**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        "query_proj, value_proj",
    ),
    "mpnet": Family(TEXT, "q, v"),
    "modernbert": Family(
        {**TEXT, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 8, "global_attn_every_n_layers": 2}, "Wqkv"
    ),
    "longformer": Family({**TEXT, "attention_window": [4, 4]}, BERT_LIKE),
    "big_bird": Family({**TEXT, "attention_type": "original_full"}, BERT_LIKE),
    "fnet": Family(TEXT, "dense"),
    "roformer": Family({**TEXT, "embedding_size": 16}, BERT_LIKE),
    "convbert": Family({**TEXT, "embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}, BERT_LIKE),
    "squeezebert": Family(
        {**TEXT, "embedding_size": 16, **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention")}},
        BERT_LIKE,
    ),
    "xlnet": Family({**TOKENS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, "layer_1"),
    "funnel": Family(
        {**TOKENS, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
        "q_head, v_head",
        bare="FunnelBaseModel",
    ),
    "nystromformer": Family({**TEXT, "num_landmarks": 4, "segment_means_seq_len": 4}, BERT_LIKE),
    "megatron-bert": Family(TEXT, BERT_LIKE),
    "rembert": Family({**TEXT, "input_embedding_size": 8, "output_embedding_size": 12}, BERT_LIKE),
    "ernie": Family(TEXT, BERT_LIKE),
    "esm": Family({**TEXT, "mask_token_id": 2, "position_embedding_type": "rotary"}, BERT_LIKE),
    "mobilebert": Family(
        {
            **TEXT,
            "embedding_size": 8,
            "intra_bottleneck_size": 16,
            "true_hidden_size": 16,
            "num_feedforward_networks": 2,
        },
        BERT_LIKE,
    ),
    "roberta-prelayernorm": Family(TEXT, BERT_LIKE),
    "data2vec-text": Family(TEXT, BERT_LIKE),
    "ibert": Family(TEXT, "dense"),
    "xlm": Family(
        {**TOKENS, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}, "q_lin, v_lin"
    ),
    "flaubert": Family(
        {**TOKENS, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}, "q_lin, v_lin"
    ),
    "yoso": Family(TEXT, BERT_LIKE),
    "mra": Family(TEXT, BERT_LIKE),
    "eurobert": Family(TEXT, LLAMA_LIKE),
    "nomic_bert": Family(TEXT, LLAMA_LIKE),
    "luke": Family({**TEXT, "entity_vocab_size": 4, "entity_emb_size": 8}, BERT_LIKE),
    "canine": Family(
        {
            **TEXT,
            "num_hash_buckets": 40,
            "local_transformer_stride": 8,
            "max_position_embeddings": 64,
            "downsampling_rate": 2,
        },
        BERT_LIKE,
    ),
    "layoutlm": Family(TEXT, BERT_LIKE),
    "reformer": Family(
        {
            **TOKENS,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "attention_head_size": 8,
            "feed_forward_size": 24,
            "attn_layers": ["local", "local"],
            "local_attn_chunk_length": 4,
            "axial_pos_embds": False,
            "max_position_embeddings": 32,
            "is_decoder": False,
        },
        BERT_LIKE,
    ),
}
DECODERS = {
    "gpt2": Family(GPT, "c_attn"),
    "gpt_neo": Family(
        {
            **NO_PAD,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
            "window_size": 4,
        },
        LLAMA_LIKE,
    ),
    "gpt_neox": Family(TEXT, "query_key_value"),
    "gptj": Family({**GPT, "rotary_dim": 4}, LLAMA_LIKE),
    "gpt_bigcode": Family(GPT, "c_attn"),
    "openai-gpt": Family(GPT, "c_attn"),
    "opt": Family({**TEXT, "word_embed_proj_dim": 16, "ffn_dim": 24}, LLAMA_LIKE),
    "bloom": Family({**NO_PAD, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "query_key_value"),
    "mpt": Family({**NO_PAD, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}, "Wqkv"),
    "llama": Family(GROUPED, LLAMA_LIKE),
    "llama, tied": Family({**GROUPED, "tie_word_embeddings": True}, LLAMA_LIKE, "llama"),
    "mistral": Family({**GROUPED, "sliding_window": 4}, LLAMA_LIKE),
    "qwen2": Family({**GROUPED, "vocab_size": 128, "tie_word_embeddings": True}, LLAMA_LIKE),
    "qwen3": Family({**GROUPED, "head_dim": 8}, LLAMA_LIKE),
    "gemma": Family({**GROUPED, "head_dim": 8}, LLAMA_LIKE),
    "gemma2": Family({**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, LLAMA_LIKE),
    "gemma3_text": Family({**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, LLAMA_LIKE),
    "gemma3": Family(
        {
            "text_config": {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
            "vision_config": IMAGE,
            "mm_tokens_per_image": 4,
        },
        LLAMA_LIKE,
    ),
    "phi": Family({**TEXT, "partial_rotary_factor": 0.5}, "q_proj, v_proj, fc1, fc2"),
    "phi3": Family({**GROUPED, "pad_token_id": 0, "original_max_position_embeddings": 32}, "qkv_proj"),
    "stablelm": Family({**GROUPED, "partial_rotary_factor": 0.5}, LLAMA_LIKE),
    "falcon": Family(
        {**NO_PAD, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, "query_key_value"
    ),
    "mixtral": Family({**GROUPED, **EXPERTS}, LLAMA_LIKE),
    "qwen2_moe": Family(
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        LLAMA_LIKE,
    ),
    "qwen3_moe": Family(
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, LLAMA_LIKE
    ),
    "gpt_oss": Family({**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": 4}, LLAMA_LIKE),
    "olmo": Family(GROUPED, LLAMA_LIKE),
    "olmo2": Family(GROUPED, LLAMA_LIKE),
    "smollm3": Family({**GROUPED, "pad_token_id": 0}, LLAMA_LIKE),
    "starcoder2": Family({**GROUPED, "sliding_window": None}, LLAMA_LIKE),
    "helium": Family({**GROUPED, "head_dim": 8}, LLAMA_LIKE),
    "glm": Family({**GROUPED, "pad_token_id": 0, "head_dim": 8}, LLAMA_LIKE),
    "deepseek_v3": Family(
        {
            **TEXT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "q_b_proj, kv_b_proj",
    ),
    "ctrl": Family({**NO_PAD, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24}, "Wq, Wv"),
    "persimmon": Family(TEXT, "query_key_value"),
    "biogpt": Family(TEXT, LLAMA_LIKE),
}
# without a sequence classifier in transformers
LANGUAGE_MODELS = {
    "codegen": Family({**GPT, "n_ctx": 32, "n_head": 4, "rotary_dim": 4}, "qkv_proj"),
    "granite": Family(GROUPED, LLAMA_LIKE),
    "cohere": Family(GROUPED, LLAMA_LIKE),
    "olmoe": Family({**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}, LLAMA_LIKE),
    "mamba": Family({**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, "in_proj, x_proj"),
    "mamba2": Family(
        {
            **TOKENS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "in_proj",
    ),
    "rwkv": Family({**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}, "key, value"),
    "xglm": Family({**TOKENS, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}, LLAMA_LIKE),
}
TWO_STACKS = {
    **TOKENS,
    "d_model": 16,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
T5 = {**TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
ENCODER_DECODERS = {
    "t5": Family(T5, "q, v"),
    "mt5": Family(T5, "q, v"),
    "umt5": Family(T5, "q, v"),
    "bart": Family(TWO_STACKS, LLAMA_LIKE),
    "mbart": Family(TWO_STACKS, LLAMA_LIKE),
    "mvp": Family(TWO_STACKS, LLAMA_LIKE),
    "plbart": Family(TWO_STACKS, LLAMA_LIKE),
}
VISION = {
    "vit": Family(IMAGE, LLAMA_LIKE),
    "deit": Family(IMAGE, LLAMA_LIKE),
    "vit_msn": Family(IMAGE, LLAMA_LIKE),
    "beit": Family(IMAGE, LLAMA_LIKE),
    "data2vec-vision": Family(IMAGE, BERT_LIKE),
    "dinov2": Family(IMAGE, LLAMA_LIKE),
    "dinov2_with_registers": Family(IMAGE, LLAMA_LIKE),
    "ijepa": Family(IMAGE, LLAMA_LIKE),
    "swin": Family(
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        LLAMA_LIKE,
    ),
    "swinv2": Family(
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        BERT_LIKE,
    ),
    "convnext": Family({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pwconv1, pwconv2"),
    "convnextv2": Family({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pwconv1, pwconv2"),
    "resnet": Family({**STAGES, "layer_type": "basic"}, "convolution"),
    "regnet": Family({**STAGES, "groups_width": 4}, "convolution"),
    "bit": Family({**STAGES, "num_groups": 4}, "conv1"),
    "levit": Family(
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        "linear",
        size=64,
    ),
    "mobilevit": Family(
        {
            "image_size": 64,
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [4, 4, 8, 12, 16, 20, 24],
            "num_attention_heads": 2,
        },
        BERT_LIKE,
        size=64,
    ),
    "mobilenet_v2": Family({"image_size": 32, "depth_multiplier": 0.25}, "convolution"),
    "pvt": Family(
        {
            "image_size": 32,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        BERT_LIKE,
    ),
    "segformer": Family(
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        LLAMA_LIKE,
    ),
    "swiftformer": Family(
        {"image_size": 32, "embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, "to_query, to_key"
    ),
    "poolformer": Family(
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        "conv1",
    ),
    "hiera": Family(
        {
            "embed_dim": 8,
            "image_size": [32, 32],
            "patch_stride": [4, 4],
            "patch_size": [7, 7],
            "patch_padding": [3, 3],
            "masked_unit_size": [8, 8],
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "query_stride": [2, 2],
        },
        "qkv",
    ),
    "clip": Family({"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 8}, LLAMA_LIKE),
    "siglip": Family({"vision_config": IMAGE, "text_config": TEXT}, LLAMA_LIKE),
}
DUAL = {
    "clip": VISION["clip"],
    "siglip": VISION["siglip"],
    "metaclip_2": Family({"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 8}, LLAMA_LIKE),
    "chinese_clip": Family(
        {"vision_config": IMAGE, "text_config": {**TEXT, "type_vocab_size": 2}, "projection_dim": 8},
        "query, value, q_proj",
    ),
    "blip": Family({"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 8}, BERT_LIKE),
    "vit and bert": Family({}, "q_proj, query", "vision-text-dual-encoder"),
}
ALL = {**ENCODERS, **DECODERS, **LANGUAGE_MODELS, **ENCODER_DECODERS, **DUAL, **VISION}
# how a base model may have been saved -> the class that does it, and what its configuration says besides
FORMS = {
    "bare": ("AutoModel", {}),
    "masked LM": ("AutoModelForMaskedLM", {}),
    "LM": ("AutoModelForCausalLM", {}),
    "decoder LM": ("AutoModelForCausalLM", {"is_decoder": True}),
    "seq2seq LM": ("AutoModelForSeq2SeqLM", {}),
    "classifier of 3 labels": ("AutoModelForSequenceClassification", {"num_labels": 3}),
    "classifier of 2 labels": ("AutoModelForSequenceClassification", {"num_labels": 2}),
    "multi-label classifier": (
        "AutoModelForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "regression": ("AutoModel", {"num_labels": 1, "problem_type": "regression"}),
    "image classifier of 3 labels": ("AutoModelForImageClassification", {"num_labels": 3}),
    "image classifier of 2 labels": ("AutoModelForImageClassification", {"num_labels": 2}),
}
SECOND_FORM = {"xlnet": "LM", "canine": "bare"}  # of encoders that transformers has no masked language model of


class Case(NamedTuple):
    """`refused` holds words of the one line in which the run refuses the case, if it should."""

    family: str
    form: str
    task: str
    targets: str
    refused: str | None = None

    @property
    def name(self) -> str:
        return " | ".join(self[:4])


TEXTS, LM, IMAGES = "text-classification", "causal-lm", "image-classification"
EVERY = "all-linear"
NO_LINEAR = "is not linear, Conv1D or embedding"
NO_CLASS = "transformers has no AutoModelFor"
NO_DECODER = "is no decoder: it sees the tokens that it is asked for"
NO_DUAL = "is no encoder of images and texts"
REFUSED: dict[tuple[str, str, str], str] = {  # (family, task, targets) -> words of the refusal
    ("squeezebert", TEXTS, BERT_LIKE): NO_LINEAR,
    ("ibert", TEXTS, "dense"): "QuantLinear",
    ("ibert", TEXTS, EVERY): "match nothing",
    ("esm", TEXTS, EVERY): "exclude_modules",
    ("qwen2_moe", TEXTS, EVERY): "exclude_modules",
    ("qwen2_moe", LM, EVERY): "exclude_modules",
    **{(name, LM, EVERY): "is incompatible with Mamba-based models" for name in ("mamba", "mamba2")},
    **{(name, IMAGES, EVERY): "match nothing" for name in ("resnet", "regnet", "bit", "poolformer", "mobilenet_v2")},
    ("resnet", IMAGES, "convolution"): NO_LINEAR,
    ("regnet", IMAGES, "convolution"): "Conv2d",
    ("mobilenet_v2", IMAGES, "convolution"): "Conv2d",
    ("bit", IMAGES, "conv1"): NO_LINEAR,
    ("poolformer", IMAGES, "conv1"): NO_LINEAR,
    ("siglip", "image-text", LLAMA_LIKE): NO_DUAL,
    ("siglip", "image-text", EVERY): NO_DUAL,
}


def case(family: str, form: str, task: str, targets: str, refused: str | None = None) -> Case:
    return Case(family, form, task, targets, refused or REFUSED.get((family, task, targets)))


def cases() -> dict[str, list[Case]]:
    """Group -> its cases: the usual layers from one form of saving, all linear layers from another."""
    return {
        "encoders": [
            case(name, form, TEXTS, targets)
            for name, family in ENCODERS.items()
            for form, targets in (("bare", family.targets), (SECOND_FORM.get(name, "masked LM"), EVERY))
        ],
        "encoder-decoders": [
            case(name, form, TEXTS, targets)
            for name, family in ENCODER_DECODERS.items()
            for form, targets in (("bare", family.targets), ("seq2seq LM", EVERY))
        ],
        "decoders as classifiers": [
            case(name, form, TEXTS, targets)
            for name, family in DECODERS.items()
            for form, targets in (("bare", family.targets), ("LM", EVERY))
        ],
        "language models": [
            case(name, "LM", LM, targets)
            for name, family in {**DECODERS, **LANGUAGE_MODELS}.items()
            for targets in (family.targets, EVERY)
        ],
        "images": [
            case(name, "bare", IMAGES, targets)
            for name, family in VISION.items()
            for targets in (family.targets, EVERY)
        ],
        "images and texts": [
            case(name, "bare", "image-text", targets)
            for name, family in DUAL.items()
            for targets in (family.targets, EVERY)
        ],
        "other forms": [case(*other) for other in OTHERS],
    }


OTHERS = [
    ("bert", "classifier of 3 labels", TEXTS, BERT_LIKE),
    ("bert", "classifier of 2 labels", TEXTS, BERT_LIKE, "is not for 3 labels"),
    ("bert", "multi-label classifier", TEXTS, BERT_LIKE),
    ("roberta", "regression", TEXTS, BERT_LIKE),
    ("gpt2", "classifier of 3 labels", TEXTS, "c_attn"),
    ("gpt2", "classifier of 2 labels", TEXTS, "c_attn", "is not for 3 labels"),
    ("llama", "regression", TEXTS, LLAMA_LIKE),
    ("vit", "image classifier of 3 labels", IMAGES, LLAMA_LIKE),
    ("vit", "image classifier of 2 labels", IMAGES, LLAMA_LIKE, "is not for 3 labels"),
    ("swin", "image classifier of 3 labels", IMAGES, EVERY),
    *(
        (name, "LM", LM, ENCODERS[name].targets, NO_DECODER)
        for name in ("bert", "roberta", "electra", "xlnet", "rembert")
    ),
    ("xlm", "LM", LM, "q_lin, v_lin", "XLMWithLMHeadModel cannot be judged"),  # transformers' own fault
    *((name, "decoder LM", LM, ENCODERS[name].targets) for name in ("bert", "roberta", "big_bird", "roformer")),
    ("bart", "bare", LM, LLAMA_LIKE),
    ("bart", "LM", LM, LLAMA_LIKE),
    *((name, "bare", LM, DECODERS[name].targets) for name in ("llama", "llama, tied", "gpt2", "opt", "bloom")),
    ("t5", "seq2seq LM", LM, "q, v", NO_CLASS),
    ("distilbert", "masked LM", LM, "q_lin, v_lin", NO_CLASS),
    ("vit", "bare", TEXTS, LLAMA_LIKE, NO_CLASS),
    ("bert", "bare", IMAGES, BERT_LIKE, NO_CLASS),
    ("mamba", "LM", TEXTS, "in_proj, x_proj", NO_CLASS),
    ("bert", "bare", "image-text", BERT_LIKE, NO_DUAL),
]


def model_of(family: str, form: str) -> PreTrainedModel:
    """A model of random weights in one of `FORMS`."""
    torch.manual_seed(0)
    model_type = ALL[family].model_type or family
    if model_type == "vision-text-dual-encoder":
        return tiny.dual_encoder(torch.float32)
    name, changes = FORMS[form]
    config = AutoConfig.for_model(model_type, **ALL[family].config, **changes)
    name = ALL[family].bare if form == "bare" else name
    made_by = getattr(transformers, name)
    model = (made_by.from_config(config) if name.startswith("Auto") else made_by(config)).float()
    spread = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights as drawn are so small that a tiny model says the same of every input
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=spread) * 0.2)
    return model


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One that knows the words of the texts after a space; transformers gives this class to every Qwen2."""
    vocabulary, merges = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2}, []
    for word in (f"Ġ{word}" for word in WORDS):
        for letter in word:
            vocabulary.setdefault(letter, len(vocabulary))
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, **special)


def write_base(folder: Path, family: str, form: str) -> None:
    """A model and what reads its inputs."""
    model_of(family, form).save_pretrained(folder)
    size = tiny.PIXELS if family == "vit and bert" else ALL[family].size
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    reads = qwen_tokenizer() if family == "qwen2" else tokenizer("[EOS]", eos_token="[EOS]")
    if family in ENCODER_DECODERS or family in DUAL:  # they look where a text ends
        reads.backend_tokenizer.post_processor = TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 1)])
    reads.save_pretrained(folder)
