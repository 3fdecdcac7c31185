"""What `make demo` says at its end: the result in a sentence, and where to look."""

import json

from rwkv_core.verdict import sentence
from tasks import stage


def main() -> None:
    """Print it."""
    comparison = json.loads((stage.EVALUATE / "metrics.json").read_text(encoding="utf-8"))
    exported = json.loads((stage.EXPORT / "conformance.json").read_text(encoding="utf-8"))
    print(f"\n{sentence(comparison).en}\n")
    print(f"report   {stage.EVALUATE / 'report.html'}   (open it in a browser)")
    print(f"adapter  {stage.ADAPTER}")
    print(f"models   {', '.join(str(stage.EXPORT / entry['file']) for entry in exported['formats'].values())}")
    print("next     .venv/bin/rwkvflow up   (Prefect and MLflow in the browser)")


if __name__ == "__main__":
    main()
