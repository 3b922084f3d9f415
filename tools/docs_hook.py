"""What mkdocs calls while it builds the site: generated pages, the list of methods, drawings in the page's own colours."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import docs_pages

_pages: dict[str, str] = {}


def on_config(config: Any) -> Any:
    """Generate the pages and put those of the methods into the navigation."""
    _pages.clear()
    _pages.update(docs_pages.make_pages())
    methods = sorted(p for p in _pages if p.startswith("methods/"))
    dates = sorted((f"log/{p.name}" for p in (docs_pages.DOCS / "log").glob("20*.md")), reverse=True)
    for section in config.nav:
        if "Methods" in section:
            section["Methods"] += [{Path(p).stem: p} for p in methods]
        if "Log" in section:
            section["Log"] += [{Path(p).stem: p} for p in dates]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, text in _pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Drawings are put into the page itself, so that they follow its light or dark colours."""

    def draw(match: re.Match[str]) -> str:
        file = Path(config.docs_dir, Path(page.file.src_uri).parent, match[1])
        return re.sub(r"<style>.*?</style>", "", file.read_text(encoding="utf-8"), flags=re.S).strip()

    return re.sub(r'<img [^>]*src="([^"]*drawings/[\w-]+\.svg)"[^>]*>', draw, html)
