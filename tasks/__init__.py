"""Stages: files in, files out, metrics back. `python -m tasks.<stage>` is what dvc.yaml calls."""
