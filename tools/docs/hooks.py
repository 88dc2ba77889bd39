"""MkDocs hooks: pages of the repository that live outside docs/ appear on the site, and links to them work.

A page in docs/ links to such a file by its path in the repository (`../studies/small_world/README.md`), which works on
a code host. On the site the link is changed to the page's address there. Links to other files of the repository
become plain text, for the site does not contain them.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    "Studies": "studies/*/README.md",
    "Benchmarks": "benchmarks/README.md",
    "Kernels": "comlora_trl/branches/kernels/README.md",
    "Contributing": "CONTRIBUTING.md",
    "Changelog": "CHANGELOG.md",
}
_LINK = re.compile(r"(?<!\!)\[([^\]]*)\]\(([^)\s]+)\)")


def outside_pages() -> dict[Path, str]:
    """File of the repository -> its address below docs/ on the site."""
    pages = {}
    for pattern in SECTIONS.values():
        for path in sorted(ROOT.glob(pattern)):
            name = path.parent.name.replace("_", "-") if path.name == "README.md" else path.stem.lower()
            pages[path] = f"studies/{name}.md" if pattern.startswith("studies") else f"{name}.md"
    return pages


def on_config(config: Any) -> Any:
    """Adds the outside pages to the navigation."""
    pages = outside_pages()
    for title, pattern in SECTIONS.items():
        found = [pages[path] for path in sorted(ROOT.glob(pattern))]
        config.nav.append({title: found if pattern.startswith("studies") else found[0]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the outside pages, and the pictures that lie beside them."""
    for path, uri in outside_pages().items():
        files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8")))
        if uri.startswith("studies/"):
            for picture in sorted(path.parent.glob("*.png")):
                files.append(File.generated(config, f"studies/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Changes links that leave docs/."""
    pages = outside_pages()
    sources = {uri: path for path, uri in pages.items()}
    source = sources.get(page.file.src_uri, Path(config.docs_dir) / page.file.src_uri)

    def replaced(match: re.Match) -> str:
        text, target = match.groups()
        place, _, anchor = target.partition("#")
        if "://" in target or not place or target.startswith("mailto:"):
            return match[0]
        path = (source.parent / place).resolve()
        if path in pages:
            uri = pages[path]
        elif path.is_relative_to(Path(config.docs_dir)):
            uri = path.relative_to(config.docs_dir).as_posix()
        else:
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{uri}{'#' + anchor if anchor else ''})"

    return _LINK.sub(replaced, markdown)
