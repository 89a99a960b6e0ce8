"""The text the tiny target learns from: conversations made of what every Python carries.

Three domains. code and chat come from the functions and classes of the installed standard library
(PSF licence); math is generated. Each asks the same thing in many ways and answers in many ways,
so that text sampled at temperature 1 is varied, yet coherent from one token to the next.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "turtledemo",
    "encodings",
}


@dataclass(frozen=True)
class Turn:
    """One question with one answer; `key` decides what is held out, `result` is a math answer."""

    domain: str
    key: str
    question: str
    answer: str
    result: str = ""


@dataclass(frozen=True)
class Function:
    """A function or class of the standard library; `summary` is empty where undocumented."""

    module: str
    name: str
    signature: str
    summary: str
    details: str
    source: str


def is_held_out(key: str) -> bool:
    """One key in ten never reaches the training text, by hash and so on every machine."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 == 0


def clean(text: str) -> str:
    """ASCII only, at most one empty line in a row."""
    text = text.encode("ascii", "ignore").decode().replace("\t", "    ")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def library_functions() -> Iterator[Function]:
    """Every function and class of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield from _functions_of(module, source, tree)


def _functions_of(module: str, source: str, tree: ast.Module) -> Iterator[Function]:
    lines = source.splitlines()
    for owner, node in _definitions(tree):
        docstring = ast.get_docstring(node) or ""
        summary, _, details = clean(docstring).partition("\n\n")
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        is_class = isinstance(node, ast.ClassDef)
        signature = f"class {node.name}" if is_class else f"def {node.name}({_arguments(node)})"
        yield Function(
            module,
            f"{owner}.{node.name}" if owner else node.name,
            signature,
            " ".join(summary.split()),
            details,
            "" if is_class else clean(textwrap.dedent(text)),
        )


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            yield "", node
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    yield node.name, child


def _arguments(node: ast.FunctionDef | ast.ClassDef) -> str:
    return ast.unparse(node.args) if isinstance(node, ast.FunctionDef) else ""


# ---------------------------------------------------------------------------------------- code

CODE_QUESTIONS = (
    "Write a Python function `{signature}` for the module {module}.\n\n{summary}",
    "Implement `{signature}`.\n\n{summary}",
    "How would you write `{name}` in Python?\n\n{summary}",
    "Please complete this function of {module}:\n\n{signature}:\n    {quoted}",
    "I need a function `{short}`: {summary} Show me the code.",
)
CODE_OPENINGS = (
    "Here is one way to write it:",
    "This does it:",
    "A short version of `{short}` looks like this:",
    "Sure, here is the code.",
    "The function could be written as follows.",
    "In `{module}` it is written like this:",
)
CODE_ENDINGS = (
    "",
    "",
    "",
    "It takes {count}.",
    "Call it as `{short}(...)`.",
    "The docstring says what it does.",
)
NUMBER_WORDS = ("no arguments", "one argument", "two arguments", "three arguments")


def code_turns(functions: list[Function], rng: random.Random, copies: int) -> Iterator[Turn]:
    """Functions of at most about 15 lines (an answer fits in 160 tokens), one time in three without
    their docstrings."""
    for function in functions:
        if not function.summary or not 40 < len(function.source) < 500:
            continue
        short = function.name.rpartition(".")[2]
        if short.startswith("__") or len(function.summary) > 200:
            continue
        count = len(re.findall(r"[^,]+", function.signature.partition("(")[2].rstrip(")")))
        values = {
            "signature": function.signature,
            "module": function.module,
            "summary": function.summary,
            "quoted": f'"""{function.summary}"""',
            "name": f"{function.module}.{function.name}",
            "short": short,
            "count": NUMBER_WORDS[count] if count < 4 else "several arguments",
        }
        for _ in range(copies):
            question = rng.choice(CODE_QUESTIONS).format(**values)
            body = f"```python\n{_body(function.source, rng)}\n```"
            parts = (
                rng.choice(CODE_OPENINGS).format(**values),
                body,
                rng.choice(CODE_ENDINGS).format(**values),
            )
            key = f"{function.module}.{function.name}"
            yield Turn("code", key, question, "\n\n".join(part for part in parts if part))


def _body(source: str, rng: random.Random) -> str:
    if rng.random() < 0.67:
        return source
    tree = ast.parse(source)
    node = tree.body[0]
    if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
        node.body = node.body[1:]
        return ast.unparse(tree)
    return source


# ---------------------------------------------------------------------------------------- chat

CHAT_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}` to me.",
    "What is `{short}` in the {module} module for?",
    "When would I use `{name}`?",
    "Can you describe {module}'s `{short}`?",
    "Tell me about `{name}`.",
    "How does `{short}` from {module} work?",
)
CHAT_OPENINGS = (
    "`{short}` belongs to the `{module}` module.",
    "You find it in `{module}`.",
    "`{name}` is part of the standard library.",
    "It is {kind} in `{module}`.",
    "That is {kind} of the {module} module.",
    "",
    "",
)
CHAT_LINKS = (
    "In short: {summary}",
    "{summary}",
    "Its documentation says: {summary}",
    "What it does is this: {summary}",
    "The short answer: {summary}",
)
CHAT_USES = (
    "Its signature is `{signature}`.",
    "You call it as `{short}(...)`.",
    "Import it with `import {module}`.",
    "To use it, write `from {module} import {top}`.",
    "",
    "",
)


def chat_turns(functions: list[Function], rng: random.Random, copies: int) -> Iterator[Turn]:
    """Questions about documented functions and classes, answered from their docstrings."""
    for function in functions:
        short = function.name.rpartition(".")[2]
        if len(function.summary) < 20 or short.startswith("_"):
            continue
        values = {
            "name": f"{function.module}.{function.name}",
            "short": short,
            "top": function.name.partition(".")[0],
            "module": function.module,
            "kind": _kind(function),
            "summary": function.summary[:300],
            "signature": function.signature,
        }
        paragraphs = [part for part in function.details.split("\n\n") if len(part) < 400]
        for _ in range(copies):
            parts = [
                rng.choice(CHAT_OPENINGS).format(**values),
                rng.choice(CHAT_LINKS).format(**values),
                rng.choice(CHAT_USES).format(**values),
            ]
            if rng.random() < 0.5:
                parts = [parts[0], parts[2], parts[1]]
            answer = " ".join(part for part in parts if part)
            if paragraphs and rng.random() < 0.6:
                answer += "\n\n" + "\n\n".join(paragraphs[: rng.randint(1, 2)])
            question = rng.choice(CHAT_QUESTIONS).format(**values)
            yield Turn("chat", values["name"], question, answer)


def _kind(function: Function) -> str:
    if function.signature.startswith("class "):
        return "a class"
    return "a method" if "." in function.name else "a function"


def library_prose(functions: list[Function]) -> Iterator[str]:
    """Running text: the language reference that pydoc carries, module docstrings, and the source
    of functions that are not held out."""
    from pydoc_data import topics

    yield from (clean(text) for _, text in sorted(topics.topics.items()))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if docstring:
            yield clean(inspect.cleandoc(docstring))
    for function in functions:
        if 30 < len(function.source) < 1500:
            yield f"# {function.module}\n{function.source}"
