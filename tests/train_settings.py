"""Settings of `train`, whole: a test says what is special about its own."""

from rwkv_core.config import TrainConfig

SETTINGS = {
    "ctx_len": 8, "rows": "stream", "order": "shuffled", "carry_state": False, "mix": {}, "micro_batch": 1, "accumulate": 1,
    "epochs": 1.0, "steps": None, "tokens": None, "precision": "fp32", "l2_wrap": 0.0,
    "validate_every": 1, "validate_rows": 1, "checkpoint_every": 1, "memory": "refuse",
    "optimizer": {
        "lr": 0.01, "lr_final": 0.01, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "betas": (0.9, 0.99),
        "eps": 1e-8, "grad_clip": 0.0,
    },
    "context": {},
    "parallel": {},
    "saves": {},
    "guards": {},
}  # fmt: skip


def train_settings(**changes):
    """As a dictionary; a section's changes are of the fields named: optimizer={"lr": 1e-3}."""
    merged = dict(SETTINGS)
    for name, value in changes.items():
        merged[name] = SETTINGS[name] | value if isinstance(SETTINGS[name], dict) and name != "mix" else value
    return merged


def train_config(**changes):
    """As TrainConfig."""
    return TrainConfig(**train_settings(**changes))
