"""The site that `make docs` builds from these pages and from the docstrings of rljax (Sphinx, furo, MyST)."""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REFERENCE = DOCS / "api"  # written anew by each build, one page a room
ROOMS = ("types", "ops", "algorithms", "models", "envs", "data", "rollouts", "rewards", "train")

project = "rljax"
html_title = "rljax"
html_theme = "furo"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
add_module_names = False
smartquotes = False  # quotes in messages and code are what the program prints
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
suppress_warnings = ["misc.highlighting_failure"]  # examples of formats that are no language
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False


def setup(app):
    write_reference()
    app.connect("source-read", adapt_page)


# ------------------------------------------------------------------------------------------------------------ the pages


def adapt_page(app, name: str, source: list[str]) -> None:
    """What GitHub does by itself: links to files of the repository. And contents from the links of index.md."""
    source[0] = re.sub(r"\]\(\.\./rljax/([\w/]+)\.py\)", lambda m: f"](#{_label(m[1])})", source[0])
    source[0] = re.sub(r"\]\(\.\./([\w/.]+)\)", r"](path:../\1)", source[0])
    if name == "index":
        source[0] += contents(source[0])


def contents(index: str) -> str:
    """Hidden tables of contents: one for each heading of the page that has links under it."""
    tables = []
    for heading, text in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", index, flags=re.MULTILINE):
        pages = re.findall(r"\]\(([\w/]+\.md)\)", text)
        if pages:
            tables.append(_toctree(heading, pages))
    return "".join([*tables, _toctree("Reference", [f"api/{room}.md" for room in ROOMS])])


def _toctree(caption: str, pages: list[str]) -> str:
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


# -------------------------------------------------------------------------------------------------------- the reference


def write_reference() -> None:
    """A Markdown page for each room: every public function and class with its signature and its docstring."""
    REFERENCE.mkdir(exist_ok=True)
    for room in ROOMS:
        files = sorted((ROOT / "rljax").glob(f"{room}.py")) or sorted((ROOT / "rljax" / room).glob("**/*.py"))
        sections = [_module(file) for file in files if file.name != "__init__.py"]
        title = "" if sections == sections[:1] else f"# rljax.{room}\n\n"  # a room of one file has that file's
        text = title + "\n".join(filter(None, sections))
        page = REFERENCE / f"{room}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:  # pages that stay are not read again
            page.write_text(text, encoding="utf-8")


def _module(file: Path) -> str:
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    path = file.relative_to(ROOT / "rljax").with_suffix("").as_posix()
    dotted = "rljax." + path.replace("/", ".")
    members = [_member(node, source) for node in tree.body if _is_public(node)]
    if not members:
        return ""
    head = [
        f"({_label(path)})=",
        f"{'##' if '/' in path else '#'} {dotted}",
        "",
        f"```{{py:currentmodule}} {dotted}\n```",
        "",
    ]
    return "\n".join([*head, _markdown(ast.get_docstring(tree) or ""), "", *members])


def _is_public(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def _member(node: ast.FunctionDef | ast.ClassDef, source: str) -> str:
    """A directive of Sphinx's Python domain, whose content is Markdown."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    signature = node.name
    fields = ""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature += f"({ast.unparse(node.args)}){returns}"
    else:
        fields = _fields(node, source)
        methods = [part for part in node.body if _is_public(part)]
        fields += "".join(f"\n- `{m.name}({ast.unparse(m.args)})` {_first_line(m)}" for m in methods)
    body = _markdown(ast.get_docstring(node) or "")
    return f"````{{py:{kind}}} {signature}\n\n{body}\n{fields}\n````\n"


def _first_line(node: ast.FunctionDef) -> str:
    return _escape((ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "))


def _fields(node: ast.ClassDef, source: str) -> str:
    """The annotated fields of a class as they stand in the source, comments included."""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    if not fields:
        return ""
    lines = source.splitlines()[fields[0].lineno - 1 : fields[-1].end_lineno]
    return "\n```python\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n```\n"


def _markdown(docstring: str) -> str:
    """A docstring as Markdown: `Args:` and its like become lists, what is neither code nor example is escaped."""
    lines = []
    inside_list = False
    inside_example = False
    for line in docstring.splitlines():
        inside_example = line.startswith(">>>") or (inside_example and bool(line.strip()))
        if inside_example:
            lines.append("    " + line)
        elif re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            lines += [f"**{line[:-1]}**", ""]
            inside_list = True
        elif inside_list and line.startswith("  "):
            entry = re.fullmatch(r"  (\*{0,2}\w[\w, *]*): (.*)", line)
            lines.append(f"- `{entry[1]}`: {_escape(entry[2])}" if entry else "  " + _escape(line.strip()))
        elif line.startswith("    "):
            lines.append(line)
        else:
            inside_list = inside_list and not line.strip()
            lines.append(_escape(line))
    return "\n".join(lines)


def _escape(line: str) -> str:
    """Outside of backticks, `<`, `_`, brackets and a single `*` stand for themselves."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<_\[\]]|(?<!\*)\*(?!\*))", r"\\\1", part) for part in parts
    )


def _label(path: str) -> str:
    return "module-" + re.sub(r"[/_.]", "-", path)
