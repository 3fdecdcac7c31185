"""Settings of `train`, whole: a test says what is special about its own."""

from rwkv_core.config import TrainConfig

SETTINGS = {
    "ctx_len": 8, "rows": "stream", "order": "shuffled", "carry_state": False, "mix": {}, "micro_batch": 1, "accumulate": 1,
    "epochs": 1.0, "steps": None, "tokens": None, "precision": "fp32", "l2_wrap": 0.0,
    "validate_every": 1, "validate_rows": 1, "checkpoint_every": 1, "memory": "refuse",
    "optimizer": {
        "kind": "adamw", "lr": 0.01, "lr_final": 0.01, "schedule": "constant", "decay": None, "decay_form": None,
        "warmup_steps": 0, "warmup_from": None, "layerwise_lr": True, "rates": {}, "weight_decay": 0.0, "betas": (0.9, 0.99),
        "eps": 1e-8, "momentum": None, "grad_clip": 0.0,
    },
    "context": {
        "segment": None, "bptt": "exact", "parts": 1, "grad_cp": False, "initial_ctx_len": None, "ctx_warmup_steps": 0,
    },
    "parallel": {"strategy": "one_device", "devices": None, "nodes": 1, "bucket_mb": 25},
    "saves": {"every": None, "every_epochs": None, "keep_last": None, "keep_best": 0, "result": "last"},
    "guards": {
        "not_finite": "ignore", "spike": "ignore", "spike_z": 8.0, "blow_up": "ignore", "blow_up_times": 20.0, "window": 8,
        "dead_adapter": "ignore", "dead_every": 2, "out_of_memory": "stop", "attempts": 3,
    },
    "halt": None,
    "stop_early": None,
    "samples": None,
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
