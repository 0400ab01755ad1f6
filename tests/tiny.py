"""Models, data and trainers small enough for a test."""

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForSequenceClassification,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from decaf_hf import DecentralizedConfig, DecentralizedTrainer

VOCABULARY, LABELS = 40, 3
PIXELS = 8  # height and width of images
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float64) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=LABELS, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).to(dtype)


def opt(dtype: torch.dtype = torch.float64) -> OPTForSequenceClassification:
    """Its layers call dropout as a function, by their own flag and rates."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=LABELS,
        pad_token_id=0,
        dropout=0.3,
        attention_dropout=0.3,
    )
    return OPTForSequenceClassification(config).to(dtype)


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **ENCODER, vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2_lm(dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    """Learned positions, which padding on the left would shift."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config).to(dtype)


def vit(dtype: torch.dtype = torch.float64) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(**ENCODER, image_size=PIXELS, patch_size=4, num_labels=LABELS)
    return ViTForImageClassification(config).to(dtype)


def clip(dtype: torch.dtype = torch.float64) -> CLIPModel:
    torch.manual_seed(0)
    text = {
        **ENCODER,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {**ENCODER, "image_size": PIXELS, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).to(dtype)


def dual_encoder(dtype: torch.dtype = torch.float64) -> VisionTextDualEncoderModel:
    torch.manual_seed(0)
    vision = ViTModel(ViTConfig(**ENCODER, image_size=PIXELS, patch_size=4))
    text = BertModel(BertConfig(**ENCODER, vocab_size=VOCABULARY, max_position_embeddings=16))
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    return model.to(dtype)


def texts(count: int, seed: int) -> Dataset:
    """Token ids of uneven lengths whose first token tells the label."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(count):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        label = int(torch.randint(0, LABELS, (1,), generator=generator))
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        rows["input_ids"].append([label + 1, *ids[1:]])
        rows["attention_mask"].append([1] * length)
        rows["labels"].append(label)
    return Dataset.from_dict(rows)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch, as DataCollatorWithPadding does."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])
        for key in ("input_ids", "attention_mask")
    }
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def lora(**changes) -> LoraConfig:
    usual = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": TaskType.SEQ_CLS}
    return LoraConfig(**{**usual, **changes})


def arguments(folder, **changes) -> DecentralizedConfig:
    """Four agents on a ring; SGD, two local steps, three rounds."""
    usual = {
        "output_dir": str(folder),
        "num_agents": 4,
        "local_steps": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return DecentralizedConfig(**{**usual, **changes})


def trainer(folder, model=None, lora_config=None, sites=None, **changes) -> DecentralizedTrainer:
    """Agents of 9 to 15 texts with the usual `arguments`."""
    sites = [texts(9 + 2 * agent, agent) for agent in range(changes.get("num_agents", 4))] if sites is None else sites
    extra = {name: changes.pop(name) for name in ("eval_dataset", "compute_metrics", "callbacks") if name in changes}
    return DecentralizedTrainer(
        model=bert() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=sites,
        data_collator=collate,
        peft_config=lora_config or lora(),
        **extra,
    )


def adapters(trainer: DecentralizedTrainer) -> dict[int, dict[str, torch.Tensor]]:
    """The hosted agents' trained tensors."""
    own = trainer.decaf_network.parameters
    return {agent: {name: p.detach().clone() for name, p in tensors.items()} for agent, tensors in own.items()}


def assert_same(got: dict, expected: dict, atol: float = 0.0) -> None:
    """All agents' tensors equal, exactly unless a tolerance is given."""
    assert got.keys() == expected.keys()
    for agent, tensors in expected.items():
        for name, tensor in tensors.items():
            where = f"agent {agent}, {name}: "
            torch.testing.assert_close(got[agent][name], tensor, rtol=0, atol=atol, msg=where.__add__)
