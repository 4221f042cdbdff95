"""Check the text of the project: banned words, private names, and the form of docstrings.

Run by `make check`. Prints `file:line: problem` for each problem and exits with 1 if there are any.

    python scripts/check_prose.py [FILE ...]

Three rules:

- Prose (comments, docstrings, messages, Markdown, YAML) uses no word of `WORDS`: newcomers had
  to look them up, or they mean something else in this field.
- Code uses no name of `NAMES`.
- A docstring starts with a verb of the imperative, and the docstring of a public function with two
  or more parameters has a section `Args:`.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Word (a regular expression without case) and what to write instead.
WORDS = {
    r"aright": "correctly",
    r"at work": "active, running",
    r"for want of": "without",
    r"hence": "so",
    r"house": "package",
    r"doors?": "entry point",
    r"(?:held|holds?) against": "compared with",
    r"how manieth": "index",
    r"in hand": "in progress",
    r"(?:is|was|are|were|be) told": "is reported, logged, shown",
    r"mend(?:s|ed|ing)?": "fix",
    r"nobody|somebody|whoever": "another process, a user, code that",
    r"takes? up": "continues, resumes",
    r"tell(?:s|ing)? of": "names, reports",
    r"thereof|therein|thereby|whereby|wherein|albeit|lest|amid": "a plain word",
    r"wish(?:es|ed)?": "request",
}

# Names that say nothing to a newcomer, or that a plain name has replaced.
NAMES = {
    "Background": "PrefetchIterator",
    "Examiner": "QaEvaluator",
    "Listing": "SourceSnapshot",
    "Loads": "PipelineLoad",
    "Look": "QaResult",
    "Looked": "QaResult",
    "Patience": "WaitPolicy",
    "Room": "ByteBudget",
    "_Weighed": "a snapshot",
    "ahead": "prefetched",
    "at_work": "is_running",
    "forget_prepared": "cancel",
    "found": "what it is",
    "garbage": "unreferenced",
    "give_back": "release",
    "give_up": "cancel",
    "given_up": "failed, cancelled",
    "is_there": "exists",
    "looked": "evaluated",
    "patience": "wait_policy",
    "place": "position",
    "settle": "calibrate",
    "settled": "resolved",
    "there": "existing",
    "told": "reported",
    "twice": "duplicates",
    "void": "removed",
    "voided": "removed",
    "wanted": "requested, expected",
    "weigh": "diff_snapshot",
}

# First words of docstrings that describe where a verb should instruct.
NO_VERBS = {"A", "All", "An", "Give", "Gives", "Of", "Say", "Says", "Tell", "Tells", "The", "What"}

_WORD = re.compile("|".join(rf"\b(?:{word})\b" for word in WORDS), re.IGNORECASE)


def main(files: list[Path]) -> int:
    """Check files and print what is wrong; return the exit status."""
    problems = [problem for path in files for problem in check(path)]
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems: see scripts/check_prose.py for what to write instead")
    return int(bool(problems))


def tracked_files() -> list[Path]:
    """Return the files of the repository that hold prose, without this one."""
    command = ["git", "ls-files", "*.py", "*.md", "*.yaml", "*.yml", "Makefile", "*Dockerfile"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.splitlines() if name != "scripts/check_prose.py"]


def check(path: Path) -> Iterator[str]:
    """Yield the problems of one file as `file:line: problem`."""
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    text = path.read_text()
    problems = _banned_words(text, 1)
    if path.suffix == ".py":
        problems = [*_check_tokens(text), *_check_docstrings(ast.parse(text), name.parts[0])]
    for line, problem in sorted(problems):
        yield f"{name}:{line}: {problem}"


def _banned_words(text: str, first_line: int) -> list[tuple[int, str]]:
    problems = []
    for match in _WORD.finditer(text):
        instead = next(w for word, w in WORDS.items() if re.fullmatch(word, match[0], re.I))
        line = first_line + text.count("\n", 0, match.start())
        problems.append((line, f"{match[0]!r}: write {instead}"))
    return problems


def _check_tokens(text: str) -> Iterator[tuple[int, str]]:
    """Check the words of comments and strings, and the names of the code."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.NAME and token.string in NAMES:
            yield line, f"name {token.string}: use {NAMES[token.string]}"
        elif token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
            yield from _banned_words(token.string, line)


def _check_docstrings(tree: ast.Module, folder: str) -> Iterator[tuple[int, str]]:
    """Check the form of the docstrings of functions; tests need none."""
    if folder == "tests":
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None or _is_property(node):
            continue
        first = text.split()[0].strip("`.,:")
        if first in NO_VERBS:
            yield node.lineno, f"{node.name}: begin the docstring with a verb, not {first!r}"
        parameters = [arg for arg in _arguments(node) if arg.arg not in ("self", "cls")]
        is_public = not node.name.startswith("_")
        if _is_command(node):
            continue  # Typer prints the docstring as help, and its options describe themselves.
        if is_public and len(parameters) > 1 and "Args:" not in text and folder == "src":
            yield node.lineno, f"{node.name}: {len(parameters)} parameters and no `Args:`"


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return not {"property", "cached_property"}.isdisjoint(_decorators(node))


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "command" in _decorators(node)


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [
        d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "")
        for d in node.decorator_list
    ]


if __name__ == "__main__":
    sys.exit(main([Path(name).resolve() for name in sys.argv[1:]] or tracked_files()))
