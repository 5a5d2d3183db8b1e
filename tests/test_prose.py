"""Language: first sentences of docstrings, and words of identifiers."""

import ast
import re

import pytest
from harness.paths import ROOT

FOLDERS = ("localsgd_jax", "benchmarks", "examples", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
RIDDLE = re.compile(
    r"\b(what|who|whom|whose|whoever|nobody|somebody|anyone|anybody|everybody|those"
    r"|anew|for ever|ours|theirs)\b",
    re.I,
)
# Words that once had a private meaning here; the glossary has the terms.
PRIVATE = {
    *("agree", "agreed", "agreement", "meet", "meeting", "talk", "talks", "told"),
    *("tell", "hear", "heard", "silent", "noisy", "company", "minutes", "journal"),
    *("rollcall", "desk", "sky", "feed", "convoy", "crew", "contestant", "deal"),
    *("dealt", "deck", "anew", "nobody", "somebody", "verdict", "culprit", "blame"),
    *("apart", "travel", "depart", "whoever", "teach", "beside", "lots", "chooser"),
    *("say", "says", "said", "speak", "hears", "tells", "taught", "talkative", "quiet"),
    *("living", "alive", "dead", "die", "guest", "door", "visitor", "stranger"),
    *("note", "notes", "noted", "news", "look", "looks", "ledger", "deals", "dealing"),
    *("pile", "piles", "entrant", "entrants", "crewed", "mute", "blank", "complaint"),
    *("place", "places", "turn", "turns", "whole", "spread", "together", "begun"),
    *("refuse", "refused", "judge", "judged", "mine", "ours", "theirs", "everybody"),
    *("anyone", "facts", "travels", "travelling", "departs", "arrives", "taken"),
}


def definitions(path):
    """Yields a name and a docstring for the module, each class and each function."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds):
            yield getattr(node, "name", path.stem), ast.get_docstring(node) or ""


def first_sentence(text):
    """Returns a docstring up to its first full stop or blank line."""
    return " ".join(re.split(r"\.\s|\n\s*\n", text)[0].split())


def identifiers(path):
    """Returns the names that a file defines: modules, functions, classes, variables."""
    found = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def words(name):
    """Splits an identifier into lower-case words."""
    return set(re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name.lower().replace("_", " ")))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_first_sentences_name_their_subject(path):
    for name, text in definitions(path):
        assert not RIDDLE.search(first_sentence(text)), f"{name}: {text[:80]!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_identifiers_use_the_terms_of_the_field(path):
    private = {name for name in identifiers(path) if words(name) & PRIVATE}
    assert not private


def test_the_guard_finds_a_riddle_and_a_private_word(tmp_path):
    path = tmp_path / "minutes.py"
    path.write_text('def take():\n    """What processes keep.\n\n    Fine."""\n')
    assert [bool(RIDDLE.search(first_sentence(t))) for _, t in definitions(path)] == [
        False,
        True,
    ]
    assert words("minutesOf_the_crew") >= {"crew"}
    assert {name for name in identifiers(path) if words(name) & PRIVATE} == {"minutes"}
