"""Hub ids to folders."""

from __future__ import annotations

from pathlib import Path

from planish.errors import InputError
from planish.folder.gguf_reader import find_gguf

WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


def find_folder(model: str | Path) -> Path:
    """The folder itself, the GGUF file that it is or holds, or the snapshot of a hub id (safetensors only)."""
    path = Path(model)
    if path.exists():
        return find_gguf(path) or path
    text = str(model)
    neither = InputError(f"no such model: {text} is neither a folder nor a hub id (owner/name)")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise neither
    from huggingface_hub import errors, is_offline_mode, snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.HFValidationError:
        raise neither from None
    except errors.GatedRepoError:
        raise InputError(f"{text} is gated: accept its terms on the hub, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"no such model: {text} is not on the hub, or it is private (`hf auth login`)") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
        raise InputError(f"no such model: {text} is neither a folder nor in the hub's cache, and {why}") from None
    except Exception as error:
        raise InputError(f"cannot download {text} from the hub: {type(error).__name__}: {error}") from None
