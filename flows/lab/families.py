"""Tiny random models of many families, made by transformers on the spot, and the table of families.

Every tensor matters to the answers: norms lie away from 1, biases away from 0, and the weights are
wide enough that two models never answer alike.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from agent.config import load
from agent.errors import UserError
from agent.home import Home, write_atomically
from agent.population.certify import Certificate, certify
from agent.population.placement import EngineOptions
from agent.population.process import EngineLauncher
from agent.population.schedule import Engine, Way
from agent.population.vllm_arguments import vllm_version
from agent.store.tensorfile import dtype_name
from flows.service import Service
from flows.session import Session, certificate_key
from flows.show.terminal import Reporter

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
        {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN, "init_std": SPREAD},
        TIED,
        without=("intermediate_size", "num_key_value_heads", "initializer_range"),
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
        vision={"vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}},
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        LINEAR,
        text="Qwen3_5TextConfig",
        vision={"vision_config": QWEN_VISION},
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


# --- the table of families ----------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16)
TOOLS = {  # vLLM's parser of a family's tool calls
    "llama": "llama3_json",
    "mistral": "mistral",
    "mixtral": "mistral",
    "phi3": "phi4_mini_json",
    "granite": "granite",
    "cohere": "cohere_command3",
    "gpt_oss": "openai",
    "qwen3_5_text": "qwen3_xml",
    "qwen3_5": "qwen3_xml",
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "qwen2_moe", "qwen3_moe", "qwen3_vl"), "hermes"),
}
PLAIN = ("phi", "gpt2", "opt", "bloom", "falcon", "gpt_neox", "starcoder2")  # no chat template
HEAD = "| Family | Kind | Tied | Exact | Member | Load | Swap back | Way | Template | Tools |"
START_MARK, END_MARK = "<!-- families -->", "<!-- end of families -->"


@dataclass(frozen=True, slots=True)
class Trial:
    """One tiny model against cold starts: its certificate, or why it could not be started."""

    tied: bool
    dtype: str
    certificate: Certificate | None
    error: str = ""

    def passed(self, what: str) -> bool:
        """Whether a check (member, theta, load, reload) equals a cold start."""
        measured = self.certificate
        return measured is not None and all(
            check.passed(measured.allowed) for check in measured.checks if check.what == what
        )


def certify_tiny(
    names: Sequence[str], progress: Reporter, dtypes: Sequence[torch.dtype] = DTYPES
) -> Iterator[tuple[str, list[Trial]]]:
    """Certify tiny models of these families, tied or not, each dtype: one family after another.

    Args:
        names: Of families; none: all.
        progress: Shown one step a model.
        dtypes: Of the models.

    Raises:
        UserError: A family that is not listed.
    """
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise UserError(f"family {unknown[0]!r}: allowed: {', '.join(FAMILIES)}")
    kinds = {
        name: [(tied, dtype) for tied in FAMILIES[name].ties for dtype in dtypes]
        for name in names or FAMILIES
    }
    advance = progress.track("families against cold starts", sum(map(len, kinds.values())))
    launcher, done = EngineLauncher(), 0
    try:
        for name, each in kinds.items():
            trials = []
            for tied, dtype in each:
                trials.append(_tried(launcher, name, tied, dtype))
                advance(done := done + 1)
            yield name, trials
    finally:
        launcher.close()


def _tried(launcher: EngineLauncher, name: str, tied: bool, dtype: torch.dtype) -> Trial:
    """One tiny model, in a folder of its own."""

    def start(directory: Path, way: Way) -> Engine:
        return launcher.engine(
            EngineOptions(
                model=directory,
                dtype=dtype_name(dtype),
                max_model_len=256,
                max_num_seqs=16,
                kv_cache_mib=64,
                way=way,
            )
        )

    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny(Path(scratch) / "model", name, tied=tied, dtype=dtype)
        try:
            certificate = certify(start, model, Path(scratch) / "members")
        except UserError as error:  # the engine does not start: that is the finding
            return Trial(tied, dtype_name(dtype), None, str(error))
        return Trial(tied, dtype_name(dtype), certificate)


def certify_model(path: str, progress: Reporter) -> tuple[str, Certificate]:
    """Certify one model as the settings' defaults start it: the certificate's key, and it."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Home.at(Path(folder)), load(None, model={"path": path}))
        session = Session(service, progress)
        try:
            return certificate_key(service), session.measured_certificate()
        finally:
            session.close()


def row(name: str, trials: Sequence[Trial]) -> str:
    """One line of the table: a family, over all its tiny models."""
    family = FAMILIES[name]

    def share(what: str) -> str:
        return f"{sum(trial.passed(what) for trial in trials)} of {len(trials)}"

    ways = sorted({trial.certificate.way for trial in trials if trial.certificate})
    exact = sum(all(map(trial.passed, ("member", "theta", "load", "reload"))) for trial in trials)
    errors = [
        f"{', '.join(_kind(trial) for trial in trials if trial.error == error)}: {error}"
        for error in sorted({trial.error for trial in trials} - {""})
    ]
    cells = [
        name,
        "experts" if family.moe else "dense",
        ", ".join("yes" if tied else "no" for tied in sorted({trial.tied for trial in trials})),
        "yes" if exact == len(trials) else f"{exact} of {len(trials)}",
        share("member"),
        share("load"),
        share("reload"),
        "; ".join([*([", ".join(ways)] if ways else []), *errors]),
        "to be set" if name in PLAIN else "own",
        TOOLS.get(name, "none"),
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _kind(trial: Trial) -> str:
    return f"{'tied' if trial.tied else 'untied'} {trial.dtype}"


def update_table(path: Path, trials: dict[str, list[Trial]]) -> None:
    """Write the rows of these families into the table of a document; other rows stay.

    Raises:
        UserError: The document has no place for it.
    """
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START_MARK)
    table, end, after = rest.partition(END_MARK)
    if not start or not end:
        raise UserError(f"{path}: {START_MARK} ... {END_MARK} is missing")
    rows = {line[1]: line[0] for line in re.finditer(r"^\| (\w+) \|.*$", table, re.MULTILINE)}
    rows |= {name: row(name, each) for name, each in trials.items()}
    known = [rows[name] for name in FAMILIES if name in rows]
    measured = f"vLLM {vllm_version()}, {datetime.now(UTC):%Y-%m-%d}, float32 and bfloat16."
    lines = [measured, "", HEAD, "|---" * HEAD.count(" |") + "|", *known]
    write_atomically(path, before + start + "\n" + "\n".join(lines) + "\n" + end + after)
