"""Upload a folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from planish.errors import InputError
from planish.folder.config import load_config
from planish.folder.weights import index_tensors

PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py", "*.gguf", "*.tiktoken"]


def push(folder: str | Path, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Create `repo` (owner/name) if it does not exist and upload the folder; returns the commit's address.

    Only what belongs to a model goes up; a folder that does not load is refused before anything is created.
    """
    from huggingface_hub import HfApi

    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"no such folder: {folder}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"hub repository must be owner/name, got {repo!r}")
    load_config(path)
    index_tensors(path)
    api = HfApi(library_name="planish")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=PATTERNS,
            commit_message=message or "Upload with planish push",
        )
    except Exception as error:  # the library raises many kinds: not logged in, no permission, no network
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(f"cannot upload to {repo}: {type(error).__name__}: {first}; check `hf auth login`") from None
    return str(getattr(info, "commit_url", info))
