"""The RWKV library: models, adapters, data, training, evaluation, export. It knows no orchestrator."""
