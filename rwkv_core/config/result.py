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


class QuestionsConfig(Config):
    """What held-out rows ask: every answer in them is asked for, after all that stands before it."""

    count: int = Field(ge=1)
    """Held-out rows that are asked, drawn at random from those with an answer. All of their answers are."""

    max_tokens: int = Field(ge=1)
    """Longest answer, in tokens. The likeliest token is always taken."""


class MemorisedConfig(Config):
    """How much of its training rows a model recites, see rwkv_core/evaluation/memorised.py."""

    count: int = Field(ge=1)
    """Training rows that are looked at, drawn at random from those that are long enough."""

    prompt: int = Field(ge=1)
    """Tokens of a row that the model is given."""

    continuation: int = Field(ge=1)
    """Tokens that it must write after them, each the very one that is there."""


class LmEvalConfig(Config):
    """Tasks of lm-eval, the package of EleutherAI: pip install 'rwkv-flow[lm-eval]'."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups, as lm-eval has them: lambada_openai, arc_easy, mmlu, ... Their data comes from the network."""

    include: Path | None
    """A folder in evaluation/ with task files of one's own, whose data may lie beside them. null: none."""

    limit: int | None = Field(ge=1)
    """Only so many samples of each task. null: all."""

    num_fewshot: int | None = Field(ge=0)
    """Examples before each question. null: as each task says."""


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

    general: Path | None
    """A file or folder in evaluation/ of text like what must not be forgotten: jsonl, csv, parquet, .txt, ... null: none."""

    answers: QuestionsConfig | None
    """Right answers, and answers in the right form. null: none are asked for."""

    memorised: MemorisedConfig | None
    """null: not measured."""

    tasks: dict[str, Path]
    """Test sets in files in evaluation/, by a name for each: LAMBADA's form, or questions with choices. {}: none."""

    lm_eval: LmEvalConfig | None
    """null: none."""

    samples: SampleConfig


class CardConfig(Config):
    """What only its owner can say of a model, for its card."""

    license: str | None
    """Under which it may be used, by Hugging Face's name: apache-2.0, cc-by-nc-4.0, ... null: the card names none."""

    languages: tuple[str, ...]
    """It was tuned for, by their ISO 639-1 codes: en, zh, ... Empty: the card names none."""

    base_model: str | None
    """The base's name on Hugging Face: BlinkDL/rwkv7-g1, ... null: that of BlinkDL's release, if its file is named as one."""

    datasets: tuple[str, ...]
    """Names on Hugging Face of the data it was tuned on. Empty: the card names the source's file alone."""


class HuggingFaceConfig(Config):
    """The folder for Hugging Face's libraries."""

    dtype: Literal["as_loaded", "bf16", "fp16", "fp32"]
    """Precision of all its tensors."""

    part_gb: float = Field(gt=0)
    """Largest part of the weights, in gigabytes. A larger model is in several, with an index."""


class FormatsConfig(Config):
    """Which files to make for which clients."""

    formats: tuple[Literal["pth", "st", "gguf", "hf"], ...] = Field(min_length=1)
    """pth: the rwkv package and RWKV Runner. st: web-rwkv and Ai00, fp16. gguf: llama.cpp and what is built on it, RWKV-6 and
    7. hf: a folder for fla, RWKV-6 and 7, or transformers, RWKV-4."""

    dtype: Literal["as_loaded", "bf16", "fp16", "fp32"]
    """Precision of the .pth file."""

    gguf: tuple[Literal["f32", "f16", "bf16", "q8_0"], ...] = Field(min_length=1)
    """A file for each: how the matrices are stored. f16 is read everywhere; q8_0 is half of it."""

    hf: HuggingFaceConfig

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name, chosen in (("formats", self.formats), ("gguf", self.gguf)):
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} names one twice: {', '.join(chosen)}")
        return self


class ExportConfig(FormatsConfig):
    """Which files to make for which clients, how they are checked, and what is said of them; see docs/export.md."""

    conformance: Literal["full", "structure"]
    """full: the clients of each file, or readers that know no more than they do, compute logits of three prompts, in float32:
    4 bytes a parameter of memory. structure: tensors, values and tokens alone, for models that this machine can't hold."""

    card: CardConfig


class RetentionConfig(Config):
    """What a model must not forget."""

    margin: float = Field(ge=0)
    """Most that the loss of evaluate.general may rise, in nats a token: the interval's upper end, above base and champion."""


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
