"""Data sets of the Hugging Face hub, brought onto the disk."""

import shutil
from pathlib import Path

from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import explain, write_json

RECORD = ".hub.json"
"""What a fetched folder has beside the data set's own files: its name, and the commit that it is at."""


def fetch(name: str, folder: Path, revision: str | None = None) -> str:
    """Copy a data set's files, as they are at one commit, into a new folder, which appears whole or not at all.

    What is downloaded lies beside the folder till then, and a repeated call goes on from there. The environment says where the
    hub is, and has the token for what is not public: HF_ENDPOINT, HF_TOKEN.

    Args:
        name: as on the hub: owner/name.
        folder: must not exist.
        revision: a branch, a tag or a commit; None: the newest.

    Returns:
        The commit, which is in the folder's `RECORD` too.

    Raises:
        InputError: the folder is there already; or there is no such data set or revision, or it is not public.
        WorldError: huggingface_hub is missing, or the hub can't be reached, or the disk can't be written to.
    """
    if folder.exists():
        raise InputError(str(folder), "something is there already", "name another folder, or remove it")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise WorldError("huggingface_hub", "is not installed", "pip install 'rwkv-flow[hub]'") from None
    api = HfApi()
    try:
        about = api.dataset_info(name, revision=revision, files_metadata=True)
        commit = str(about.sha)
        partial = folder.with_name(f".{folder.name}.{commit[:12]}.partial")
        api.snapshot_download(name, repo_type="dataset", revision=commit, local_dir=partial)
    except GatedRepoError:
        raise InputError(
            name, "its owner must let you in", "ask on its page, then set HF_TOKEN to your token"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            name, f"{api.endpoint} has no such data set that is public", "correct it, or set HF_TOKEN to your token"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{name} at {revision}", "has no such branch, tag or commit", "correct the revision") from None
    except HFValidationError as error:
        raise InputError(
            name, f"can't be a data set's name ({' '.join(str(error).split())})", "write owner/name"
        ) from None
    except Exception as error:  # of whichever HTTP library is below it
        if isinstance(error, OSError) and error.errno is not None:
            raise explain(error, folder) from error
        said = " ".join(str(error).split())[:200]
        raise WorldError(
            f"{name} from {api.endpoint}",
            f"can't be fetched ({type(error).__name__}: {said})",
            "see to the connection, or set HF_ENDPOINT to a mirror, and run again",
        ) from error
    for file in (
        about.siblings or ()
    ):  # where the connection breaks in between, the library may take what is there for all
        path = partial / file.rfilename
        if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
            raise WorldError(f"{name}: {file.rfilename}", "it is not whole", "run again")
    try:
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # what the library would go on from
        write_json(partial / RECORD, {"dataset": name, "revision": revision, "commit": commit})
        partial.rename(folder)
    except OSError as error:
        raise explain(error, folder) from error
    return commit
