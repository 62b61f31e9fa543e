"""Reading untrusted tensor files with safetensors only, never by unpickling."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_tensors(path: str | Path, pickle_hint: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Args:
        path: path of the file.
        pickle_hint: advice in the message if the file is a pickle.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another kind, is damaged, or has a dtype that PyTorch lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); {_hint(path, pickle_hint)}") from None
    except (TypeError, AttributeError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} holds a tensor that cannot be read ({type(error).__name__}: {error})") from None


def _hint(path: Path, pickle_hint: str) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(PICKLES):
        return pickle_hint or "it is a pickle, which is not read because it can run code"
    return "it is a GGUF file" if start == b"GGUF" else "copy it from its source again"
