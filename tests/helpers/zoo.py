"""Tiny encoders and batches of them, made from configurations alone."""

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

NUM_LABELS = 5
WIDTH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**WIDTH, "image_size": 32, "patch_size": 8, "num_labels": NUM_LABELS}
TEXT = {**WIDTH, "vocab_size": 99, "max_position_embeddings": 64, "num_labels": NUM_LABELS, "pad_token_id": 0}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 4, 4]}

MODELS = {
    "vit": lambda **kw: ViTForImageClassification(ViTConfig(**VISION | kw)),
    "deit": lambda **kw: DeiTForImageClassification(DeiTConfig(**VISION | kw)),
    "dinov2": lambda **kw: Dinov2ForImageClassification(Dinov2Config(**VISION | kw)),
    "swin": lambda **kw: SwinForImageClassification(
        SwinConfig(**SWIN | {"window_size": 4, "num_labels": NUM_LABELS, "drop_path_rate": 0.0} | kw)
    ),
    "bert": lambda **kw: BertForSequenceClassification(BertConfig(**TEXT | kw)),
    "roberta": lambda **kw: RobertaForSequenceClassification(RobertaConfig(**TEXT | kw)),
    "distilbert": lambda **kw: DistilBertForSequenceClassification(
        DistilBertConfig(
            **{"vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "num_labels": NUM_LABELS}
            | kw
        )
    ),
}
EXTRA = {
    "beit": lambda **kw: BeitForImageClassification(
        BeitConfig(
            **VISION
            | {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.0}
            | kw
        )
    ),
}
DECODER = {
    **{k: v for k, v in TEXT.items() if k != "num_labels"},
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TOKENS = {  # a label for each token
    "bert-tokens": lambda **kw: BertForTokenClassification(BertConfig(**TEXT | kw)),
    "bert-mlm": lambda **kw: BertForMaskedLM(BertConfig(**TEXT | kw)),
    "gpt2": lambda **kw: GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4} | kw)
    ),
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**DECODER | kw)),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**DECODER | kw)),
}
NUM_LAYERS = dict.fromkeys(MODELS, 4) | {"swin": 6}
IMAGE_MODELS = ("vit", "deit", "dinov2", "swin", "beit")


def make(name: str, seed: int = 0, dropout: bool = False, **config) -> nn.Module:
    """A model in train mode; the weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (MODELS | EXTRA | TOKENS)[name](**config)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
        if isinstance(getattr(module, "dropout_prob", None), float) and not dropout:
            module.dropout_prob = 0.0
    return model.train()


def batch(name: str, size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs with labels; text is padded, and padding has no label where each token has one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_LABELS, (size,), generator=generator)
    if name in IMAGE_MODELS:
        return {"pixel_values": torch.randn(size, 3, 32, 32, generator=generator), "labels": labels}
    ids = torch.randint(3, 99, (size, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(5, 13, (size, 1), generator=generator)).long()
    if name in TOKENS:
        labels = {"bert-tokens": ids % NUM_LABELS, "bert-mlm": torch.where(ids % 3 == 0, ids, -100)}.get(name, ids)
        labels = torch.where(mask > 0, labels, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class Samples(torch.utils.data.Dataset):
    """A dataset of `size` samples for the named model."""

    def __init__(self, name: str, size: int = 32, seed: int = 0):
        self.columns = batch(name, size, seed)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: column[index] for key, column in self.columns.items()}


class Noisy(Samples):
    """Images with random augmentation."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "pixel_values": sample["pixel_values"] + torch.rand(())}
