"""Models that other packages change: quantised weights, and PEFT's adapters."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from transformers import AutoModel, BertConfig, LlamaConfig

from packages.huggingface import IDS, MASK, TEXT
from packages.subject import images, subject, texts

INPUTS = {"input_ids": IDS, "attention_mask": MASK}

quantised = subject(None, texts(99), package="torchao", inputs=INPUTS)
vectors = subject((16,), images(16), package="bitsandbytes")
adapted = subject(None, texts(99), package="peft", inputs=INPUTS)


def _bert() -> Any:
    return AutoModel.from_config(BertConfig(**TEXT))


def _quantised(config: Any) -> nn.Module:
    net = _bert().eval()
    quantize_(net, config)
    return net


def _around(layer: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), layer, nn.ReLU(), nn.Linear(64, 5))
    return net.to("cpu")  # Which quantises the weights.


@quantised
def int8_weights() -> nn.Module:
    return _quantised(Int8WeightOnlyConfig())


@quantised
def int8_activations() -> nn.Module:
    return _quantised(Int8DynamicActivationInt8WeightConfig())


@quantised
def small_integers() -> nn.Module:
    return _quantised(IntxWeightOnlyConfig())


@vectors
def four_bits() -> nn.Module:
    return _around(bnb.nn.Linear4bit(64, 64))


@vectors
def eight_bits() -> nn.Module:
    return _around(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))


@adapted
def lora() -> nn.Module:
    targets = ["query", "value", "dense"]
    return get_peft_model(_bert(), LoraConfig(target_modules=targets, init_lora_weights=False))


@adapted
def dora() -> nn.Module:
    targets = ["query", "value"]
    config = LoraConfig(target_modules=targets, init_lora_weights=False, use_dora=True)
    return get_peft_model(_bert(), config)


@adapted
def lora_of_llama() -> nn.Module:
    net = AutoModel.from_config(LlamaConfig(**TEXT, use_cache=False))
    targets = ["q_proj", "v_proj"]
    return get_peft_model(net, LoraConfig(target_modules=targets, init_lora_weights=False))


@adapted
def ia3() -> nn.Module:
    return get_peft_model(_bert(), IA3Config(target_modules=["key", "dense"],
                                             feedforward_modules=["dense"]))  # fmt: skip
