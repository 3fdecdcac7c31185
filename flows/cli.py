"""The command line: `rwkvflow up`, `rwkvflow run`, `rwkvflow sync`.

Prefect, MLflow and DVC are imported by the commands that use them: they take seconds, and `--help` should not.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rwkv_core.errors import Problem

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def rwkvflow() -> None:
    """Fine-tune RWKV models reproducibly: DVC stages, Prefect runs, MLflow records."""


@app.command()
def up(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Where Prefect listens.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Where MLflow listens.")] = 5000,
) -> None:
    """Start Prefect, MLflow and the deployments on this machine; Ctrl+C stops them."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    from flows import up as servers
    from flows.environment import LOGS
    from tasks.record import main_root

    console = Console(highlight=False)
    root = Path.cwd()

    def announce(prefect: str, mlflow: str) -> None:
        lines = Table.grid(padding=(0, 2))
        lines.add_row("Prefect", prefect, "start runs, watch them, cancel them")
        lines.add_row("MLflow", mlflow, "compare what they measured")
        lines.add_row("logs", str(main_root(root) / LOGS), "")
        console.print(Panel(lines, title="rwkvflow", subtitle="Ctrl+C stops everything", expand=False))

    console.print("Starting Prefect and MLflow; the first time takes up to a minute …")
    servers.up(root, prefect_port, mlflow_port, announce)
    console.print("Stopped.")


@app.command()
def run(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; all, if none.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run them even if nothing has changed.")] = False,
) -> None:
    """Bring the pipeline up to date: shown in Prefect where `rwkvflow up` runs, else by `dvc repro` alone."""
    from flows import run as runs

    raise typer.Exit(runs.run(Path.cwd(), targets or [], force=force, say=typer.echo))


@app.command()
def sync() -> None:
    """Put into MLflow what DVC's outputs say and MLflow does not know yet."""
    from flows.environment import set_defaults
    from tasks import params, tracking

    root = Path.cwd()
    set_defaults(root)
    tracking.publish(root, params.load().tracking)


def main() -> None:
    """Run the command line; a problem that a person can put right is shown without a traceback."""
    try:
        app()
    except Problem as problem:
        typer.echo(f"rwkvflow: {problem}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
