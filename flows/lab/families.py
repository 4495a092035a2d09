"""Tiny random models of many families, made by transformers on the spot.

Every tensor matters to the answers: norms lie away from 1, biases away from 0, and the weights are
wide enough that two models never answer alike.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agent.errors import UserError
from agent.store.tensorfile import dtype_name

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
VOCABULARY = 264  # 256 bytes, one end, and rows that no token uses
HIDDEN, LENGTH, SPREAD = 64, 512, 0.1
ENDS: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 256}
COMMON: dict[str, Any] = ENDS | {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "initializer_range": SPREAD,
    "pad_token_id": 256,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": SPREAD, **ENDS}
LINEAR: dict[str, Any] = {  # Qwen3.5: three of four layers are recurrent
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
BOTH, TIED, UNTIED = (False, True), (True,), (False,)


@dataclass(frozen=True, slots=True)
class Family:
    """How transformers makes a model: class and config by name, what the config gets."""

    causal: str
    config: str
    options: dict[str, Any]
    ties: tuple[bool, ...] = BOTH
    without: tuple[str, ...] = ()  # what of COMMON its config does not know
    moe: bool = False
    text: str = ""  # config class of the text part, where the model also reads pictures
    vision: dict[str, Any] = field(default_factory=dict)

    def built(self, tied: bool) -> Any:
        """A model with random weights."""
        import transformers

        common = {} if "vocab_size" in self.options else COMMON
        options = {k: v for k, v in common.items() if k not in self.without} | self.options
        options["tie_word_embeddings"] = tied
        if self.text:
            text = getattr(transformers, self.text)(**options).to_dict()
            options = {"text_config": text, "tie_word_embeddings": tied, **self.vision}
        return getattr(transformers, self.causal)(getattr(transformers, self.config)(**options))


def _simple(name: str, ties: tuple[bool, ...] = BOTH, **options: Any) -> Family:
    """A family whose classes are called after it and whose config takes COMMON."""
    return Family(f"{name}ForCausalLM", f"{name}Config", options, ties)


def _experts(name: str, **options: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", options, moe=True)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
FAMILIES: dict[str, Family] = {
    "llama": _simple("Llama"),
    "mistral": _simple("Mistral", sliding_window=None),
    "qwen2": _simple("Qwen2"),
    "qwen3": _simple("Qwen3", head_dim=32),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", LINEAR),
    "gemma2": _simple("Gemma2", TIED, **GEMMA),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, TIED),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        GEMMA,
        TIED,
        text="Gemma3TextConfig",
        vision={"vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "phi": Family("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 2}, UNTIED),
    "phi3": _simple("Phi3"),
    "olmo2": _simple("Olmo2"),
    "granite": _simple("Granite"),
    "cohere": _simple("Cohere", TIED),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT, "n_positions": LENGTH, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2},
        TIED,
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **ENDS,
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "word_embed_proj_dim": HIDDEN,
            "init_std": SPREAD,
            "pad_token_id": 256,
        },
        TIED,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {**GPT, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 2, "pad_token_id": 256},
        TIED,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {**GPT, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2},
        TIED,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {}, UNTIED, without=("num_key_value_heads",)
    ),
    "stablelm": _simple("StableLm"),
    "starcoder2": _simple("Starcoder2", sliding_window=None),
    "smollm3": _simple("SmolLM3"),
    "qwen2_moe": _experts("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": _experts("Qwen3Moe", **EXPERTS, head_dim=32),
    "mixtral": _experts("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "olmoe": _experts("Olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _experts(
        "GptOss",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"head_dim": 32, "rope_parameters": ROPE},
        text="Qwen3VLTextConfig",
        vision={"vision_config": QWEN_VISION},
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        LINEAR,
        text="Qwen3_5TextConfig",
        vision={
            "vision_config": {
                k: v for k, v in QWEN_VISION.items() if k != "deepstack_visual_indexes"
            }
        },
    ),
}


def make_tiny(
    folder: Path, family: str, *, tied: bool, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write a random model of some 100,000 parameters with a byte tokenizer; the folder.

    Raises:
        UserError: The family is not listed, or never comes tied (or untied).
    """
    if family not in FAMILIES:
        raise UserError(f"family {family!r}: allowed: {', '.join(FAMILIES)}")
    if tied not in FAMILIES[family].ties:
        raise UserError(f"family {family!r}: tied {tied}, allowed: {not tied}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = FAMILIES[family].built(tied)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * SPREAD)
    model.config.dtype = dtype_name(dtype)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """One token a byte, an end, and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, END])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
