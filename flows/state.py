import typer

app = typer.Typer()


@app.command()
def check() -> None: ...
@app.command()
def x() -> None: ...
