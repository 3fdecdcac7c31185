"""A run with other parameters, apart from the working copy: in a git worktree of its own, kept as a DVC experiment.

DVC's own `dvc exp save` and `dvc exp run --temp` are not used: all runs of a repository share the names under refs/exps/exec,
so that two at once spoil each other's; and what was begun cannot be continued. An experiment is a commit under a name that
DVC has a form for; git makes both, in one step, whoever else does so.
"""

import io
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, overload

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import whole_file
from tasks import params
from tasks.record import main_root

EXPERIMENTS = Path(".rwkvflow/experiments")
"""Where checkouts lie that are not saved yet, in the main checkout."""

_PARAMS = "params.yaml"
_AS_BEGUN, _AS_SAVED = "refs/worktree/begun", "refs/worktree/saved"  # such names are a worktree's own
_IN_DVC = threading.Lock()  # two threads at once in DVC, and it has called a sound dvc.yaml invalid
_GIT_PATIENCE = 600.0  # seconds for others that make or remove a checkout at the same time


@contextmanager
def checkout(root: Path, name: str, overrides: Mapping[str, Any], *, begun: str | None = None) -> Iterator[Path]:
    """A checkout of its own, with `overrides` in its params.yaml, to run stages in.

    It has what the working copy has: HEAD, all uncommitted changes of tracked files, as of params.yaml, and dvc.lock; the
    outputs that it names, from the shared DVC cache; and the inputs that params.yaml names, tracked or not. The working copy is
    only read.

    The same name again continues in the same checkout: it begins as it began, whatever the working copy has become, with
    these overrides. Left without an error, it goes if its state was saved; else it stays, to be continued.

    Args:
        root: the working copy: a git repository's root, with at least one commit.
        name: of the experiment: letters, digits, ".", "_", "-".
        overrides: values by dotted name: {"train.optimizer.lr": 1e-3}.
        begun: what it begins with instead: a revision that `snapshot` returned.

    Raises:
        InputError: the name or a value is not valid; nothing was made.
        WorldError: another process is in this checkout; or git fails.
    """
    root = root.resolve()
    folder = main_root(root) / EXPERIMENTS / _checked(root, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{name}.lock"), thread_local=False)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        raise WorldError(
            f"experiment {name}", "another process works on it", "wait until it has ended, or take another name"
        ) from None
    with held:
        if _is_whole(folder):
            text = overridden(text_of(folder, _AS_BEGUN), overrides)
            git(folder, "update-ref", "-d", _AS_SAVED)
        else:
            begun = begun or snapshot(root)
            text = overridden(text_of(root, begun), overrides)  # refused before anything is made
            _make(root, folder, begun)
        with whole_file(folder / _PARAMS) as temporary:
            temporary.write_text(text, encoding="utf-8")
        with _IN_DVC:
            _link_inputs(root, folder)
        yield folder
        if git(folder, "rev-parse", "--verify", "--quiet", _AS_SAVED, check=False):
            with _worktrees(root):
                _discard(root, folder)


def save(folder: Path, name: str) -> str:
    """Make the present state of a checkout the DVC experiment `name`, in the place of an earlier one of the same baseline.

    What `dvc exp show`, `apply`, `branch`, `push` and `diff` need is in it: params, code, dvc.lock.

    Args:
        folder: from `checkout`.
        name: of the experiment.

    Returns:
        Its revision.

    Raises:
        InputError: the name is not valid.
        WorldError: git fails.
    """
    revision = snapshot(folder, f"rwkvflow: experiment {_checked(folder, name)}")
    git(folder, "update-ref", reference(baseline(folder), name), revision)
    git(folder, "update-ref", _AS_SAVED, revision)
    return revision


def remove(root: Path, name: str) -> None:
    """Give up the checkout of an experiment, if there is one; what was saved of it stays.

    Raises:
        InputError: the name is not valid.
    """
    folder = main_root(root) / EXPERIMENTS / _checked(root, name)
    with _worktrees(root):
        _discard(root, folder)


def hold(root: Path, name: str, revision: str) -> None:
    """Keep git from dropping a revision that no branch has, under a name of ours."""
    git(root, "update-ref", f"refs/rwkvflow/{name}", revision)


def text_of(root: Path, revision: str) -> str:
    """The params.yaml of a revision."""
    return git(root, "show", f"{revision}:{_PARAMS}")


def baseline(folder: Path) -> str:
    """The commit that a checkout was made from."""
    return git(folder, "rev-parse", "HEAD")


def environment(folder: Path, name: str) -> dict[str, str]:
    """Variables that tell a stage which experiment it is run for, as `dvc exp run` sets them."""
    return {"DVC_EXP_NAME": name, "DVC_EXP_BASELINE_REV": baseline(folder)}


def reference(base: str, name: str) -> str:
    """The git reference that DVC keeps the experiment `name` of the commit `base` under."""
    return f"refs/exps/{base[:2]}/{base[2:]}/{name}"


def snapshot(root: Path, message: str = "rwkvflow: as it was") -> str:
    """The tracked files of a checkout as they are now, and dvc.lock, as a commit after HEAD that no branch has; its revision.

    Raises:
        InputError: there is no commit yet.
        WorldError: git fails.
    """
    if git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False) is None:
        raise InputError(str(root), "an experiment is made from a commit, and there is none", "git commit")
    index = root / git(root, "rev-parse", "--git-path", "index")
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary) / "index"  # of the person's nothing changes, nor is it locked
        shutil.copyfile(index, own)
        in_it = {"GIT_INDEX_FILE": str(own)}
        git(root, "add", "--update", ":/", variables=in_it)
        pipelines = git(root, "ls-files", "dvc.yaml", "*/dvc.yaml", variables=in_it).splitlines()
        locks = [
            lock for lock in (str(Path(file).with_name("dvc.lock")) for file in pipelines) if (root / lock).exists()
        ]
        if locks:
            git(root, "add", "--force", "--", *locks, variables=in_it)
        tree = git(root, "write-tree", variables=in_it)
    return git(root, "commit-tree", tree, "-p", "HEAD", "-m", message, variables=_identity(root))


def overridden(text: str, overrides: Mapping[str, Any]) -> str:
    """The params.yaml in `text` with other values, its comments kept.

    Args:
        text: of the file.
        overrides: values by dotted name; a section may be given as a whole.

    Raises:
        InputError: there is no such setting, or a value is not valid; all mistakes are named at once.
    """
    yaml = YAML()
    yaml.width = 4096  # lines stay as they are
    yaml.indent(mapping=2, sequence=4, offset=2)
    values = yaml.load(text)
    for dotted, value in overrides.items():
        *sections, last = dotted.split(".")
        section = values
        for at, part in enumerate(sections, 1):
            section = section.get(part)
            if not isinstance(section, dict):
                where = ".".join(sections[:at])
                raise InputError(
                    f"{dotted} = {value!r}",
                    f"there is no section {where}",
                    f"correct the name, or give {where} as a whole",
                )
        section[last] = value
    sink = io.StringIO()
    yaml.dump(values, sink)
    params.check(sink.getvalue(), f"{_PARAMS} with {', '.join(overrides) or 'no changes'}")
    return sink.getvalue()


def _checked(root: Path, name: str) -> str:
    """DVC's rule and git's, and a file name."""
    plain = name.replace(".", "").replace("_", "").replace("-", "")
    right = plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 200
    if not right or git(root, "check-ref-format", reference("0" * 40, name), check=False) is None:
        raise InputError(
            f"experiment {name!r}",
            "a name begins with a letter or digit, and goes on with those, '.', '_' and '-'; not '..', nor '.lock' at the end",
            "take another",
        )
    return name


def _is_whole(folder: Path) -> bool:
    return (folder / ".git").exists() and (
        git(folder, "rev-parse", "--verify", "--quiet", _AS_BEGUN, check=False) is not None
    )


def _make(root: Path, folder: Path, begun: str) -> None:
    with _worktrees(root):
        _discard(root, folder)  # what a killed process had half made
        git(root, "worktree", "add", "--quiet", "--detach", "--no-checkout", str(folder), f"{begun}^")
    git(folder, "read-tree", "HEAD")
    git(folder, "restore", "--source", begun, "--worktree", "--", ":/")
    with _IN_DVC:
        _configure_dvc(root, folder)
    git(folder, "update-ref", _AS_BEGUN, begun)  # last: without it the checkout is not whole


def _discard(root: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    git(root, "worktree", "prune")


def _worktrees(root: Path) -> FileLock:
    """Git's list of worktrees is read and written by several of its commands without a lock."""
    return FileLock(main_root(root) / EXPERIMENTS.with_name("worktrees.lock"), timeout=_GIT_PATIENCE)


def _configure_dvc(root: Path, folder: Path) -> None:
    """The working copy's own settings of DVC, its cache, and from there the outputs that dvc.lock names."""
    from dvc.config import Config
    from dvc.exceptions import CheckoutError
    from dvc.logger import set_loggers_level
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        local, cache = repo.config.read("local"), repo.cache.local_cache_dir
    with Config(str(folder / ".dvc")).edit("local") as settings:
        settings.update(local)
        # stages replace their outputs and never write into them: a link will do, and takes no room
        settings["cache"] = local.get("cache", {}) | {"dir": cache, "type": "reflink,hardlink,symlink,copy"}
        # what DVC notes about files, else in a folder of the system that nobody empties
        settings["core"] = local.get("core", {}) | {"site_cache_dir": str(folder / ".dvc" / "tmp" / "site")}
    # it would warn of each output that dvc.lock does not name; what the cache has lost is made again
    with set_loggers_level(logging.CRITICAL), suppress(CheckoutError), Repo(str(folder)) as repo:
        repo.checkout(allow_missing=True)


def _link_inputs(root: Path, folder: Path) -> None:
    """Give each dependency that no stage makes what it has in the working copy, and git does not: data, models."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        made = {out.fs_path for out in repo.index.outs}
        needed = {dep.fs_path for dep in repo.index.deps if dep.protocol == "local" and dep.is_in_repo} - made
        for path in sorted(needed):
            _link(root / Path(path).relative_to(folder), Path(path), repo.dvcignore)


def _link(there: Path, here: Path, rules: Any) -> None:
    ignored = rules.is_ignored_dir if there.is_dir() else rules.is_ignored_file
    if ignored(str(here)):
        return
    if there.is_dir() and here.is_dir():
        for child in there.iterdir():
            _link(child, here / child.name, rules)
    elif there.exists() and not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.unlink(missing_ok=True)  # a link to what was there before
        here.symlink_to(there)


def _identity(root: Path) -> dict[str, str]:
    """Of commits, for a person who has told git no name."""
    if git(root, "var", "GIT_COMMITTER_IDENT", check=False) and git(root, "var", "GIT_AUTHOR_IDENT", check=False):
        return {}
    return {f"GIT_{who}_{what}": "rwkvflow" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@overload
def git(root: Path, *words: str, check: Literal[True] = True, variables: Mapping[str, str] | None = None) -> str: ...


@overload
def git(root: Path, *words: str, check: Literal[False], variables: Mapping[str, str] | None = None) -> str | None: ...


def git(root: Path, *words: str, check: bool = True, variables: Mapping[str, str] | None = None) -> str | None:
    """What git prints; None if it refuses, with `check` a WorldError."""
    # a hook that this runs in has told git of its own repository
    kept = {
        name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    done = subprocess.run(["git", *words], cwd=root, env={**kept, **(variables or {})}, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.removesuffix("\n")
    if not check:
        return None
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise WorldError(f"git {words[0]} in {root}", said[-1], "put that right, and run again")
