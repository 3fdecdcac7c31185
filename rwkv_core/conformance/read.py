"""Which reader reads a file."""

from pathlib import Path

from rwkv_core.conformance import gguf_file, hf, pth, web_rwkv
from rwkv_core.conformance.contents import Contents, Unreadable

FORMATS = ("pth", "st", "gguf", "hf")


def form(path: Path) -> str:
    """The format of a model's file, by what it is called.

    Raises:
        Unreadable: there is no reader for it.
    """
    if path.is_dir():
        return "hf"
    found = {".pth": "pth", ".pt": "pth", ".bin": "pth", ".st": "st", ".state": "st", ".gguf": "gguf"}.get(path.suffix)
    if found is None and path.suffix == ".safetensors":
        return "hf" if path.with_name("config.json").is_file() else "st"
    if found is None:
        raise Unreadable(
            f"{path.suffix or path.name} is no format that clients of RWKV read: .pth, .st, .gguf, a folder"
        )
    return found


def read(path: Path, lora: tuple[Path, float] | None = None) -> Contents:
    """A model's file, as clients of its format find it.

    Args:
        path: the file or folder.
        lora: for web-rwkv: a LoRA's file, and the alpha that its recipe says.

    Raises:
        Unreadable: they would not load it.
    """
    made = {"pth": pth.read, "st": web_rwkv.read, "gguf": gguf_file.read, "hf": hf.read}[form(path)](path)
    return made if lora is None else web_rwkv.with_lora(made, *lora)


def read_state(path: Path) -> Contents:
    """A tuned state's file, as its clients find it; rows are values.

    Raises:
        Unreadable: they would not load it.
    """
    readers = {"pth": pth.read_state, "st": web_rwkv.read_state, "hf": hf.read_state}
    found = "hf" if path.name.endswith(".fla.safetensors") else form(path)
    if found not in readers:
        raise Unreadable(f"{found}: clients of that format mount no state")
    return readers[found](path)
