"""What a run can be told, as closed, immutable, typed sections of params.yaml.

Types, ranges and meanings live here; values live in params.yaml only, so no field has a default. Nothing in here
imports torch: a mistake in params.yaml is reported before anything slow is loaded.
"""

from rwkv_core.config.data import Column, DataConfig, HoldoutConfig, PartConfig
from rwkv_core.config.model import (
    AdapterConfig,
    BatConfig,
    BoneConfig,
    FullConfig,
    LoraConfig,
    ModelConfig,
    Patterns,
    PeftConfig,
    PissaConfig,
    StateConfig,
)
from rwkv_core.config.result import (
    AnswersConfig,
    CardConfig,
    EvaluateConfig,
    ExportConfig,
    FormatsConfig,
    HuggingFaceConfig,
    LmEvalConfig,
    MemorisedConfig,
    PromoteConfig,
    QuestionsConfig,
    RetentionConfig,
    SampleConfig,
    TrackingConfig,
)
from rwkv_core.config.section import Config
from rwkv_core.config.train import (
    ContextConfig,
    GuardsConfig,
    OptimizerConfig,
    ParallelConfig,
    SavesConfig,
    StopEarlyConfig,
    TrainConfig,
    TrainSamplesConfig,
)

__all__ = [
    "AdapterConfig",
    "AnswersConfig",
    "BatConfig",
    "BoneConfig",
    "CardConfig",
    "Column",
    "Config",
    "ContextConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FormatsConfig",
    "FullConfig",
    "GuardsConfig",
    "HoldoutConfig",
    "HuggingFaceConfig",
    "LmEvalConfig",
    "LoraConfig",
    "MemorisedConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PartConfig",
    "Patterns",
    "PeftConfig",
    "PissaConfig",
    "PromoteConfig",
    "QuestionsConfig",
    "RetentionConfig",
    "SampleConfig",
    "SavesConfig",
    "StateConfig",
    "StopEarlyConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainSamplesConfig",
]
