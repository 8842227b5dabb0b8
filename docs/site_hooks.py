"""What mkdocs needs beside the pages: files of the root as pages, and links that leave docs/.

The pages are written for GitHub, where a relative link may name any file of the repository. The
site has only what lies in docs/ and the pages of ROOT_PAGES. There a link to another file, or to a
folder, becomes its text. The README's picture is HTML, for its dark form, and its paths change too.
``tests/docs/test_links.py`` checks that each link leads to a file.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
#: A link or a picture: its text, its relative target, its anchor.
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
#: The start of a path in the HTML of a page of the root.
_SOURCE = re.compile(r'\b(src|srcset)="docs/')


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for source, page in ROOT_PAGES.items():
        text = (root / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = _LINK.sub(lambda found: rewritten(found, page.file.src_uri), markdown)
    return _SOURCE.sub(r'\1="', markdown)


def rewritten(found: re.Match, page: str) -> str:
    """The link as the site needs it; ``page`` is the place of its page in docs/."""
    text, target, anchor = found.groups()
    sources = {name: source for source, name in ROOT_PAGES.items()}
    source = sources.get(page, f"docs/{page}")  # its place in the repository
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in ROOT_PAGES:
        place = ROOT_PAGES[path]
    elif path.startswith("docs/") and posixpath.splitext(path)[1]:
        place = path.removeprefix("docs/")
    else:
        return text
    start = posixpath.dirname(page) or "."
    return f"[{text}]({posixpath.relpath(place, start)}{anchor or ''})"
