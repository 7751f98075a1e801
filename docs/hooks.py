"""What the site needs beside its pages: files from outside docs/, notebooks, and the reference of the command line.

A page links to any file of the repository by its relative path, as a forge wants it. Each linked file becomes a page of
the site, too, and the hook turns the link to it into one between pages.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import posixpath
import re
import types
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fdu.cli.options import Settings, grouped, helps, option_names
from fdu.cli.program import COMMANDS
from fdu.config import EraseConfig

ROOT = Path(__file__).parents[1]
HOME = "README.md"
"""The file that is the first page."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#\s])")
"""A relative link, without its anchor."""
LANGUAGES = {".py": "python", ".patch": "diff", ".txt": "text", ".yml": "yaml", ".json": "json", ".toml": "toml"}
HIDDEN = "---\nsearch:\n  exclude: true\n---\n"
"""Before the text of a page that the search leaves out."""
UNSEARCHED = ("CHANGELOG.md",)
"""Pages that would be found before those that explain."""
ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>)")
"""Of reStructuredText, before a name in a docstring."""
CODE, OPTION = re.compile(r"<code>[^<]*</code>"), re.compile(r"--[a-z]\w*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/ as Markdown; files that the navigation does not name come at its end."""
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    media = {f"docs/{file.src_uri}": file.src_uri for file in files.media_files()}
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        _add(files, config, pages, f"{path.relative_to(ROOT)}", path.relative_to(ROOT / "docs").as_posix()[:-5] + "md")
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    _add(files, config, pages, HOME, "index.md")
    named, found = [*_uris(config.nav)], []
    for uri in named:
        source = uri if (ROOT / uri).is_file() else uri.removesuffix(".md")
        if uri not in pages.values() and uri not in GENERATED and (ROOT / source).is_file():
            _add(files, config, pages, source, uri)
    queue = [*pages]
    while queue:
        source = queue.pop()
        for linked in _linked(source):
            if linked in pages or linked in media or not (ROOT / linked).is_file():
                continue
            uri = linked if linked.endswith(".md") else f"{linked}.md"
            _add(files, config, pages, linked, uri)
            queue.append(linked)
            found += [] if uri in named else [{linked: uri}]
    if found:
        config.nav = [*(config.nav or []), {"Files": sorted(found, key=str)}]
    config.extra["places"] = media | pages
    config.extra["sources"] = {uri: source for source, uri in pages.items()}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links between pages in place of links between files."""
    source = config.extra["sources"].get(page.file.src_uri)
    if source is None:
        return markdown

    def link(match: re.Match[str]) -> str:
        uri = config.extra["places"].get(_target(source, match[1]))
        return match[1] if uri is None else os.path.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(link, markdown)


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page without the roles before names in docstrings, and with options that do not break across lines."""
    return CODE.sub(lambda code: OPTION.sub(r'<span class="option">\g<0></span>', code[0]), ROLE.sub("", text))


def _uris(nav: Any) -> Iterator[str]:
    for entry in nav.values() if isinstance(nav, dict) else nav or []:
        yield from [entry] if isinstance(entry, str) else _uris(entry)


def _linked(source: str) -> Iterator[str]:
    if source.endswith(".md"):
        for target in LINK.findall((ROOT / source).read_text()):
            yield _target(source, target)


def _target(source: str, link: str) -> str:
    """The file of the repository that a link in the file ``source`` means; a folder means its README.md."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def _add(files: Files, config: MkDocsConfig, pages: dict[str, str], source: str, uri: str) -> None:
    path = ROOT / source
    if path.suffix == ".md":
        content = HIDDEN * (source in UNSEARCHED) + path.read_text()
    elif path.suffix == ".ipynb":
        content = notebook(json.loads(path.read_text()))
    else:
        content = f"{HIDDEN}# {source}\n\n~~~~{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n~~~~\n"
    files.append(File.generated(config, uri, content=content))
    pages[source] = uri


def notebook(content: dict[str, Any]) -> str:
    """A stored notebook as Markdown, with the text and the pictures that its cells gave."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell["outputs"] if cell["cell_type"] == "code" else ():
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = data["image/png"].strip()
                parts.append(f'<img alt="What this cell draws" src="data:image/png;base64,{picture}">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """The commands with their own options, from what the parser reads; the settings have a page of their own."""
    parts = ["# The command line\n\nThe build writes this page from the parser, as `fdu COMMAND --help` shows it."]
    shared: dict[str, type] = {}
    for name, command in COMMANDS.items():
        _, _, placed = option_names(command)
        own, used = [], []
        for field in dataclasses.fields(command):
            kind = field.default_factory if isinstance(field.default_factory, type) else None
            if kind is not None and issubclass(kind, Settings):
                used.append("the settings of an erasure ([Settings](settings.md))")
            elif kind is not None and dataclasses.is_dataclass(kind):
                title = f"{kind.__name__.removesuffix('Options')} options"
                shared[title] = kind
                used.append(f"[{title}](#{title.lower().replace(' ', '-')})")
            else:
                own.append(field.name)
        examples = "\n".join(command.examples)
        words = [inspect.getdoc(command) or "", f"```console\n{examples}\n```", _options(command, own, placed)]
        parts += [f"## fdu {name}", *words, *([f"Also: {', '.join(used)}."] if used else [])]
    for title, kind in shared.items():
        parts += [f"## {title}", _options(kind, [field.name for field in dataclasses.fields(kind)], set())]
    return "\n\n".join(parts) + "\n"


def settings() -> str:
    """Every setting of an erasure, in the groups of the help."""
    parts = [
        "# Settings of an erasure\n\nThe build writes this page from `fdu.EraseConfig`, in the groups of "
        "`fdu erase --help`. Each setting is an option of the command line, `--NAME`, an argument of `fdu.erase`, and "
        "a line of a `--config` file."
    ]
    for group in dataclasses.fields(grouped()):
        made = group.default_factory
        assert isinstance(made, type)
        parts += [f"## {group.name.capitalize()}", _options(EraseConfig, list(made.__dataclass_fields__), set())]
    return "\n\n".join(parts) + "\n"


def _options(kind: type, names: Iterable[str], placed: Collection[str]) -> str:
    """A list of definitions: the option, what it takes, its default, and what it does."""
    told, hints, fields = helps(kind), get_type_hints(kind), kind.__dataclass_fields__
    lines = []
    for name in names:
        default = fields[name].default
        shown = "" if default in (None, False, "", (), dataclasses.MISSING) else f" = {default}"
        label = name.upper() if name in placed else f"--{name} {_taken(hints[name])}".rstrip()
        meaning = told.get(name, "").replace("<", "&lt;")
        lines.append(f"`{label}`{shown}\n:   {meaning}")
    return "\n\n".join(lines)


def _taken(hint: Any) -> str:
    """What an option takes after its name, in words."""
    if get_origin(hint) in (types.UnionType, Union):
        return "|".join(filter(None, (_taken(one) for one in get_args(hint) if one is not type(None))))
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{_taken(get_args(hint)[0])} ..."
    return {bool: "", Path: "PATH", str: "TEXT", int: "N", float: "X"}.get(hint, "VALUE")


GENERATED = {"reference/command-line.md": command_line, "reference/settings.md": settings}
