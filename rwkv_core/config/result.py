"""What is done with a tuned model: how it is judged, which files are made, what it is called."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rwkv_core.config.section import Config


class SampleConfig(Config):
    """Texts to generate for a person to read."""

    prompts: tuple[str, ...]
    """Beginnings to continue, beside those taken from held-out rows."""

    held_out: int = Field(ge=0)
    """How many held-out rows to take a prompt from: their text up to the first answer."""

    max_tokens: int = Field(ge=1)
    """Longest continuation, in tokens."""

    temperature: float = Field(ge=0)
    """0: always the likeliest token."""

    top_p: float = Field(gt=0, le=1)
    """Draw only from the likeliest tokens that together have this probability."""


class EvaluateConfig(Config):
    """How to judge the tuned model against its base."""

    ctx_len: int = Field(ge=1)
    """Tokens per slice. The state is carried from slice to slice, so every document is scored whole."""

    batch: int = Field(ge=1)
    """Documents scored together."""

    resamples: int = Field(ge=100)
    """Bootstrap draws over documents."""

    confidence: float = Field(gt=0.5, lt=1)
    """Coverage of the interval, e.g. 0.95."""

    samples: SampleConfig


class HuggingFaceConfig(Config):
    """The folder for Hugging Face's libraries."""

    dtype: Literal["as_loaded", "bf16", "fp16", "fp32"]
    """Precision of all its tensors."""

    part_gb: float = Field(gt=0)
    """Largest part of the weights, in gigabytes. A larger model is in several, with an index."""


class ExportConfig(Config):
    """Which files to make for which clients; see docs/export.md."""

    formats: tuple[Literal["pth", "st", "gguf", "hf"], ...] = Field(min_length=1)
    """pth: the rwkv package and RWKV Runner. st: web-rwkv and Ai00, fp16. gguf: llama.cpp and what is built on it, RWKV-6 and
    7. hf: a folder for fla, RWKV-6 and 7, or transformers, RWKV-4."""

    dtype: Literal["as_loaded", "bf16", "fp16", "fp32"]
    """Precision of the .pth file."""

    gguf: tuple[Literal["f32", "f16", "bf16", "q8_0"], ...] = Field(min_length=1)
    """A file for each: how the matrices are stored. f16 is read everywhere; q8_0 is half of it."""

    hf: HuggingFaceConfig

    conformance: Literal["full", "structure"]
    """full: the clients of each file, or readers that know no more than they do, compute logits of three prompts, in float32:
    4 bytes a parameter of memory. structure: tensors, values and tokens alone, for models that this machine can't hold."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name, chosen in (("formats", self.formats), ("gguf", self.gguf)):
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} names one twice: {', '.join(chosen)}")
        return self


class RetentionConfig(Config):
    """What a model must not forget."""

    text: Path
    """A file or folder of general text, 10 documents or more: jsonl, csv, parquet, .txt, ... Nothing of it is masked."""

    margin: float = Field(ge=0)
    """Most that its loss may rise, in nats a token: the interval's upper end, above the base and above the champion."""


class AnswersConfig(Config):
    """Whether a model answers in the form that clients expect."""

    count: int = Field(ge=1)
    """Held-out questions that it answers, drawn as evaluate.samples says."""

    max_tokens: int = Field(ge=1)
    """Longest answer, in tokens."""

    ended: float = Field(ge=0, le=1)
    """Least share of the answers that end by themselves: with token 0, or with the beginning of the user's next turn."""


class PromoteConfig(Config):
    """What a model must be to become the champion. All of it must hold; see docs/promotion.md."""

    held_out: float = Field(ge=0)
    """How much lower its held-out loss must be, in nats a token: the interval of the difference lies below -held_out, from the
    base and from the champion. At 0 an equal model is still no better."""

    retention: RetentionConfig | None
    """null: forgetting is not measured."""

    answers: AnswersConfig | None
    """null: answers are not looked at. Held-out rows without a dialogue have none."""


class TrackingConfig(Config):
    """Names in MLflow. No stage depends on them."""

    experiment: str = Field(min_length=1)
    """Experiment that the runs belong to."""

    registered_model: str = Field(min_length=1)
    """Model under which each merged checkpoint becomes a new version."""

    also: tuple[Literal["tensorboard", "wandb"], ...]
    """Further loggers of the curves, each an extra of the package: pip install 'rwkv-flow[tensorboard]'. Usually []."""
