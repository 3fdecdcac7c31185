"""What is done with a tuned model: how it is judged, which files are made, what it is called."""

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


class ExportConfig(Config):
    """Which files to make for which clients."""

    formats: tuple[Literal["pth", "st"], ...] = Field(min_length=1)
    """pth: the rwkv package and RWKV Runner. st: web-rwkv and Ai00, fp16."""

    dtype: Literal["as_loaded", "bf16", "fp16", "fp32"]
    """Precision of the .pth file."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats names one twice: {', '.join(self.formats)}")
        return self


class TrackingConfig(Config):
    """Names in MLflow. No stage depends on them."""

    experiment: str = Field(min_length=1)
    """Experiment that the runs belong to."""

    registered_model: str = Field(min_length=1)
    """Model under which each merged checkpoint becomes a new version."""

    also: tuple[Literal["tensorboard", "wandb"], ...]
    """Further loggers of the curves, each an extra of the package: pip install 'rwkv-flow[tensorboard]'. Usually []."""
