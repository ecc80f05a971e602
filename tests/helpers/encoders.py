"""Tiny models of many architectures, made from configurations alone, by the kind of their input."""

import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from zoo import TEXT, VISION, WIDTH

from hf_mmst.cut.example_inputs import dummy_inputs

FOUR = {"depths": [2, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": 5}
PYRAMID = {**FOUR, "num_attention_heads": [1, 1, 2, 2], "image_size": 32}
SHIFTED = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 4, 4]}
SHIFTED |= {"window_size": 4, "num_labels": 5}
BIAS = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
T5 = {"vocab_size": 99, "d_model": 32, "num_heads": 4, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0}
TOWER = {name: value for name, value in VISION.items() if name != "num_labels"}
PAIR = {"vision_config": TOWER, "text_config": {**WIDTH, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}}
DEBERTA = {"relative_attention": True, "max_relative_positions": -1}
SPEECH = {**WIDTH, "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4), "num_labels": 5}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3}
SPEECH |= {"classifier_proj_size": 16, "layerdrop": 0.0, "mask_time_prob": 0.0}


class Vgg(tf.PreTrainedModel):
    """A VGG as timm makes it: one sequence of convolutions, norms, activations in place and pooling."""

    config_class = tf.PreTrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        modules, channels = [], 3
        for width in (8, 8, "pool", 16, 16, "pool", 16):
            if width == "pool":
                modules.append(nn.MaxPool2d(2))
                continue
            modules += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def forward(self, pixel_values, labels=None, **_):
        logits = self.classifier(self.features(pixel_values).mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


VGG = "VGG (one sequence of single modules, as in timm)"
IMAGE = {
    "ViT": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
    "DeiT": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**VISION)),
    "BEiT": lambda: tf.BeitForImageClassification(tf.BeitConfig(**VISION, **BIAS)),
    "Data2Vec (images)": lambda: tf.Data2VecVisionForImageClassification(tf.Data2VecVisionConfig(**VISION, **BIAS)),
    "DINOv2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION)),
    "DINOv2 with registers": lambda: tf.Dinov2WithRegistersForImageClassification(
        tf.Dinov2WithRegistersConfig(**VISION)
    ),
    "I-JEPA": lambda: tf.IJepaForImageClassification(tf.IJepaConfig(**VISION)),
    "ViT-MSN": lambda: tf.ViTMSNForImageClassification(tf.ViTMSNConfig(**VISION)),
    "CLIP": lambda: tf.CLIPForImageClassification(tf.CLIPConfig(**PAIR, num_labels=5)),
    "SigLIP": lambda: tf.SiglipForImageClassification(tf.SiglipConfig(**PAIR, num_labels=5)),
    "MetaCLIP 2": lambda: tf.MetaClip2ForImageClassification(tf.MetaClip2Config(**PAIR, num_labels=5)),
    "Swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(**SHIFTED)),
    "Swin v2": lambda: tf.Swinv2ForImageClassification(tf.Swinv2Config(**SHIFTED)),
    "Donut's Swin": lambda: tf.DonutSwinForImageClassification(tf.DonutSwinConfig(**SHIFTED)),
    "Hiera": lambda: tf.HieraForImageClassification(
        tf.HieraConfig(
            embed_dim=16,
            image_size=[32, 32],
            patch_size=[3, 3],
            patch_stride=[2, 2],
            patch_padding=[1, 1],
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 2, 2],
            masked_unit_size=[8, 8],
            num_labels=5,
        )
    ),
    "PVT": lambda: tf.PvtForImageClassification(tf.PvtConfig(**PYRAMID)),
    "PVT v2": lambda: tf.PvtV2ForImageClassification(tf.PvtV2Config(**PYRAMID)),
    "SegFormer": lambda: tf.SegformerForImageClassification(tf.SegformerConfig(**PYRAMID)),
    "FocalNet": lambda: tf.FocalNetForImageClassification(
        tf.FocalNetConfig(image_size=32, embed_dim=16, depths=[1, 1, 2, 1], num_labels=5)
    ),
    "LeViT": lambda: tf.LevitForImageClassification(
        tf.LevitConfig(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[2, 2, 2],
            key_dim=[8, 8, 8],
            num_labels=5,
        )
    ),
    "PoolFormer": lambda: tf.PoolFormerForImageClassification(tf.PoolFormerConfig(**FOUR)),
    "ResNet": lambda: tf.ResNetForImageClassification(tf.ResNetConfig(embedding_size=8, layer_type="basic", **FOUR)),
    "RegNet": lambda: tf.RegNetForImageClassification(tf.RegNetConfig(embedding_size=8, groups_width=8, **FOUR)),
    "BiT": lambda: tf.BitForImageClassification(
        tf.BitConfig(embedding_size=8, hidden_sizes=[32, 32, 32, 64], depths=[1, 1, 2, 1], num_groups=4, num_labels=5)
    ),
    VGG: lambda: Vgg(tf.PreTrainedConfig(num_labels=5, image_size=32)),
    "ConvNeXt": lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(**FOUR)),
    "ConvNeXt v2": lambda: tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(**FOUR)),
    "MobileViT v2": lambda: tf.MobileViTV2ForImageClassification(
        tf.MobileViTV2Config(image_size=64, width_multiplier=0.25, num_labels=5)
    ),
    "MobileNet v2": lambda: tf.MobileNetV2ForImageClassification(
        tf.MobileNetV2Config(depth_multiplier=0.25, num_labels=5)
    ),
}
OF_TEXT = {
    "BERT": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)),
    "RoBERTa": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT)),
    "XLM-RoBERTa": lambda: tf.XLMRobertaForSequenceClassification(tf.XLMRobertaConfig(**TEXT)),
    "XLM-RoBERTa-XL": lambda: tf.XLMRobertaXLForSequenceClassification(tf.XLMRobertaXLConfig(**TEXT)),
    "CamemBERT": lambda: tf.CamembertForSequenceClassification(tf.CamembertConfig(**TEXT)),
    "DistilBERT": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=64, num_labels=5)
    ),
    "ELECTRA": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**TEXT, embedding_size=16)),
    "DeBERTa": lambda: tf.DebertaForSequenceClassification(tf.DebertaConfig(**TEXT, **DEBERTA, pos_att_type="c2p|p2c")),
    "DeBERTa v2": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **TEXT, **DEBERTA, pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm"
        )
    ),
    "ModernBERT": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(
            **TEXT,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            global_attn_every_n_layers=2,
            local_attention=8,
        )
    ),
    "EuroBERT": lambda: tf.EuroBertForSequenceClassification(tf.EuroBertConfig(**TEXT, num_key_value_heads=2)),
    "GTE": lambda: tf.GteForSequenceClassification(tf.GteConfig(**TEXT)),
    "Nomic BERT": lambda: tf.NomicBertForSequenceClassification(tf.NomicBertConfig(**TEXT)),
    "Jina v3": lambda: tf.JinaEmbeddingsV3ForSequenceClassification(tf.JinaEmbeddingsV3Config(**TEXT)),
    "X-MOD": lambda: tf.XmodForSequenceClassification(
        tf.XmodConfig(**TEXT, languages=["en_XX"], default_language="en_XX")
    ),
    "MPNet": lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**{**TEXT, "pad_token_id": 1})),
    "MobileBERT": lambda: tf.MobileBertForSequenceClassification(
        tf.MobileBertConfig(**TEXT, embedding_size=32, intra_bottleneck_size=32)
    ),
    "ConvBERT": lambda: tf.ConvBertForSequenceClassification(tf.ConvBertConfig(**TEXT, embedding_size=32)),
    "RoFormer": lambda: tf.RoFormerForSequenceClassification(tf.RoFormerConfig(**TEXT, embedding_size=32)),
    "FNet": lambda: tf.FNetForSequenceClassification(
        tf.FNetConfig(**{k: v for k, v in TEXT.items() if k != "num_attention_heads"})
    ),
    "Megatron-BERT": lambda: tf.MegatronBertForSequenceClassification(tf.MegatronBertConfig(**TEXT)),
    "ERNIE": lambda: tf.ErnieForSequenceClassification(tf.ErnieConfig(**TEXT)),
    "LayoutLM": lambda: tf.LayoutLMForSequenceClassification(tf.LayoutLMConfig(**TEXT)),
    "LayoutLM v3": lambda: tf.LayoutLMv3ForSequenceClassification(
        tf.LayoutLMv3Config(**TEXT, visual_embed=False, coordinate_size=4, shape_size=8)
    ),
    "LUKE": lambda: tf.LukeForSequenceClassification(tf.LukeConfig(**TEXT, entity_vocab_size=9, entity_emb_size=16)),
    "Data2Vec (text)": lambda: tf.Data2VecTextForSequenceClassification(tf.Data2VecTextConfig(**TEXT)),
    "ESM": lambda: tf.EsmForSequenceClassification(tf.EsmConfig(**TEXT, mask_token_id=1)),
    "ESM C": lambda: tf.EsmcForSequenceClassification(tf.EsmcConfig(**TEXT)),
    "BigBird": lambda: tf.BigBirdForSequenceClassification(tf.BigBirdConfig(**TEXT, attention_type="original_full")),
    "RemBERT": lambda: tf.RemBertForSequenceClassification(tf.RemBertConfig(**TEXT, input_embedding_size=16)),
    "Funnel": lambda: tf.FunnelForSequenceClassification(
        tf.FunnelConfig(vocab_size=99, block_sizes=[2, 2], d_model=32, n_head=4, d_head=8, d_inner=64, num_labels=5)
    ),
    "CANINE": lambda: tf.CanineForSequenceClassification(tf.CanineConfig(**TEXT)),
    "Longformer": lambda: tf.LongformerForSequenceClassification(tf.LongformerConfig(**TEXT, attention_window=8)),
}
AUDIO = {
    "wav2vec 2.0": lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SPEECH)),
    "HuBERT": lambda: tf.HubertForSequenceClassification(tf.HubertConfig(**SPEECH)),
    "WavLM": lambda: tf.WavLMForSequenceClassification(tf.WavLMConfig(**SPEECH)),
    "UniSpeech": lambda: tf.UniSpeechForSequenceClassification(tf.UniSpeechConfig(**SPEECH)),
    "UniSpeech-SAT": lambda: tf.UniSpeechSatForSequenceClassification(tf.UniSpeechSatConfig(**SPEECH)),
    "SEW": lambda: tf.SEWForSequenceClassification(tf.SEWConfig(**SPEECH, squeeze_factor=1)),
    "Data2Vec (audio)": lambda: tf.Data2VecAudioForSequenceClassification(tf.Data2VecAudioConfig(**SPEECH)),
    "wav2vec 2.0-BERT": lambda: tf.Wav2Vec2BertForSequenceClassification(
        tf.Wav2Vec2BertConfig(
            **WIDTH,
            feature_projection_input_dim=16,
            num_labels=5,
            layerdrop=0.0,
            mask_time_prob=0.0,
            classifier_proj_size=16,
            conv_depthwise_kernel_size=3,
        )
    ),
    "wav2vec 2.0-Conformer": lambda: tf.Wav2Vec2ConformerForSequenceClassification(
        tf.Wav2Vec2ConformerConfig(**SPEECH)
    ),
    "Whisper (encoder)": lambda: tf.WhisperForAudioClassification(
        tf.WhisperConfig(
            d_model=32,
            encoder_layers=4,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            num_mel_bins=16,
            max_source_positions=30,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            vocab_size=99,
            num_labels=5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            classifier_proj_size=16,
        )
    ),
    "AST": lambda: tf.ASTForAudioClassification(
        tf.ASTConfig(
            **WIDTH, patch_size=4, frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=16, num_labels=5
        )
    ),
}
ENCODERS = {"images": IMAGE, "text": OF_TEXT, "audio": AUDIO}
MODELS = {name: build for kind in ENCODERS.values() for name, build in kind.items()}

PLAIN = {name: value for name, value in TEXT.items() if name != "num_labels"}
DECODER = {**PLAIN, "num_key_value_heads": 2}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4}
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODERN |= {"global_attn_every_n_layers": 2, "local_attention": 8}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64}
TOKEN_CLASSIFIERS = {
    "BERT": lambda: tf.BertForTokenClassification(tf.BertConfig(**TEXT)),
    "RoBERTa": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**TEXT)),
    "DistilBERT": lambda: tf.DistilBertForTokenClassification(tf.DistilBertConfig(**DISTIL, num_labels=5)),
    "DeBERTa v2": lambda: tf.DebertaV2ForTokenClassification(
        tf.DebertaV2Config(**TEXT, **DEBERTA, pos_att_type=["c2p"])
    ),
    "ModernBERT": lambda: tf.ModernBertForTokenClassification(tf.ModernBertConfig(**TEXT, **MODERN)),
    "ELECTRA": lambda: tf.ElectraForTokenClassification(tf.ElectraConfig(**TEXT, embedding_size=16)),
    "Llama": lambda: tf.LlamaForTokenClassification(tf.LlamaConfig(**DECODER, num_labels=5)),
}
MASKED = {
    "BERT": lambda: tf.BertForMaskedLM(tf.BertConfig(**PLAIN)),
    "RoBERTa": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**PLAIN)),
    "DistilBERT": lambda: tf.DistilBertForMaskedLM(tf.DistilBertConfig(**DISTIL)),
    "DeBERTa v2": lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**PLAIN, **DEBERTA)),
    "ModernBERT": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**PLAIN, **MODERN)),
    "ELECTRA": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**PLAIN, embedding_size=16)),
    "MPNet": lambda: tf.MPNetForMaskedLM(tf.MPNetConfig(**{**PLAIN, "pad_token_id": 1})),
}
CAUSAL = {
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "GPT-NeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**PLAIN)),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=4,
            ffn_dim=64,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
    "BLOOM": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=4, n_head=4)),
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "Mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)),
    "Qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "Gemma 2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=0.5)),
    "Phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**DECODER)),
    "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=2)),
}
OF_TOKENS = {"tokens": TOKEN_CLASSIFIERS, "masked tokens": MASKED, "next tokens": CAUSAL}

# What cannot be cut: how it is made, the reason, and a part of the message.
REFUSED = {
    "ALBERT": (
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16)),
        "one layer, run many times",
        "holds one layer only",
    ),
    "GPT-2, Llama and other decoders, as classifiers of sequences": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT)),
        "attend causally: a head would judge what most tokens have not seen",
        "attend causally",
    ),
    "T5": (
        lambda: tf.T5ForSequenceClassification(tf.T5Config(**T5, num_layers=4, eos_token_id=0)),
        "its longest list of layers is a decoder",
        "attend causally",
    ),
    "XLM, FlauBERT": (
        lambda: tf.XLMForSequenceClassification(
            tf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=4, n_heads=4, num_labels=5)
        ),
        "attention and feed-forward parts are in separate lists, so that their residual stream goes around each cut",
        "by a way around the end of that stage",
    ),
    "XLNet": (
        lambda: tf.XLNetForSequenceClassification(
            tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=4, n_head=4, d_inner=64, num_labels=5)
        ),
        "hidden states have the tokens first, not the samples",
        "not one row for each",
    ),
    "MobileViT": (
        lambda: tf.MobileViTForImageClassification(
            tf.MobileViTConfig(
                image_size=32,
                hidden_sizes=[16, 24, 32],
                neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
                num_labels=5,
            )
        ),
        "its longest list of layers sees patches, not samples",
        "not one row for each",
    ),
    "LiLT": (
        lambda: tf.LiltForTokenClassification(tf.LiltConfig(**{**TEXT, "hidden_size": 96})),
        "a second stream, of the layout, goes from layer to layer past all heads",
        "hands on a second stream beside its hidden states",
    ),
    "SqueezeBERT": (
        lambda: tf.SqueezeBertForSequenceClassification(
            tf.SqueezeBertConfig(**TEXT, embedding_size=32, q_groups=1, k_groups=1, v_groups=1)
        ),
        "its layers are called other than as modules",
        "ran 0 times",
    ),
    "SwiftFormer": (
        lambda: tf.SwiftFormerForImageClassification(
            tf.SwiftFormerConfig(num_labels=5, depths=[1, 1, 2, 1], embed_dims=[8, 16, 24, 32])
        ),
        "its stages alternate with other modules in one list",
        "holds one layer only",
    ),
    "Reformer": (
        lambda: tf.ReformerForMaskedLM(
            tf.ReformerConfig(
                attn_layers=["local"] * 4,
                vocab_size=99,
                hidden_size=32,
                axial_pos_shape=[4, 4],
                axial_pos_embds_dim=[8, 24],
                local_attn_chunk_length=8,
                feed_forward_size=64,
                attention_head_size=8,
                num_attention_heads=4,
            )
        ),
        "its reversible layers make their gradients in a way of their own",
        "has no graph",
    ),
    "wav2vec 2.0 with `use_weighted_layer_sum`": (
        lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SPEECH, use_weighted_layer_sum=True)),
        "its classifier sees all layers",
        "by a way around the end of that stage",
    ),
}


def build(name: str, models: dict = MODELS) -> nn.Module:
    """A model in train mode without dropout, whose weights depend on nothing but the name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models[name]()
    for module in model.modules():
        for field in ("p", "drop_prob", "dropout_prob", "attention_dropout", "activation_dropout", "dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model.train()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Three samples with labels; texts are padded."""
    chance = torch.Generator().manual_seed(0)
    found = {}
    for name, value in dummy_inputs(model, 3, seq_len=12).items():
        found[name] = torch.randn(value.shape, generator=chance)
        if name == "input_ids":
            found["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [7], [9]])).long()
            found[name] = torch.randint(3, 99, value.shape, generator=chance) * found["attention_mask"]
    return {**found, "labels": torch.randint(5, (3,), generator=chance)}
