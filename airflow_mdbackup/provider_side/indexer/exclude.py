"""The paths that the gitignore patterns exclude."""

import re
from typing import Any, List, NamedTuple, Optional, Tuple


class Excluded:
    """The paths that gitignore patterns exclude, as far as that is beyond doubt.

    The consumer applies the patterns again, and everything that it would keep must be in the index. So a
    pattern that could be read in different ways excludes nothing, and one that re-includes files and cannot
    be parsed disables all of them. Source: gitignore(5), and pathspec's GitIgnoreSpec.
    """

    def __init__(self, lines: Tuple[str, ...]) -> None:
        self._rules: List[Rule] = []
        self._any: Any = None  # if no pattern re-includes, one expression for all
        rules = []
        for line in lines:
            rule = parsed_pattern(line)
            if rule.expression:
                rules.append(rule)
            elif not rule.excludes:
                return
        if rules and all(rule.excludes for rule in rules):
            self._any = re.compile("|".join(rule.expression for rule in rules))
        self._rules = [rule._replace(search=re.compile(rule.expression).search) for rule in reversed(rules)]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def has(self, path: bytes) -> bool:
        """Whether a file is excluded, by its path with the leading slash."""
        if not self._rules or b"\n" in path:
            return False
        text = path[1:].decode("utf-8", "surrogateescape")
        if self._any is not None:
            return self._any.search(text) is not None
        # The last match decides, but a match of the file itself precedes one of a directory above it.
        by_directory = None
        for rule in self._rules:
            match = rule.search(text)
            if match is not None:
                if rule.contents or match.group(0)[-1:] != "/":
                    return rule.excludes
                if by_directory is None:
                    by_directory = rule.excludes
        return by_directory is True

    def has_all_below(self, directory: bytes) -> bool:
        """Whether everything below a directory is excluded, by its path with slashes at both ends."""
        if self._any is None or b"\n" in directory:
            return False
        match = self._any.search(directory[1:].decode("utf-8", "surrogateescape"))
        return match is not None and match.group(0)[-1:] == "/"


class Rule(NamedTuple):
    """A pattern: whether it excludes or re-includes, and its regular expression, empty if it has none.

    A match that ends in a slash is one of a directory above the file.
    """

    excludes: bool
    expression: str = ""
    contents: bool = False  # of the form ``directory/**``, which matches the files in it
    search: Any = None


def parsed_pattern(line: str) -> Rule:
    """Return the rule for a line of a gitignore file."""
    text = line if line.endswith("\\ ") else line.rstrip()
    if not text or text.startswith("#") or text == "/":
        return Rule(True)
    excludes = not text.startswith("!")
    parts = text[0 if excludes else 1 :].split("/")
    end = "(?:/|$)"
    if parts[-1] == "":
        end = "/"
        parts.pop()
    if parts and parts[0] == "":
        parts = parts[1:]
    elif len(parts) == 1:
        parts = ["**", *parts]
    contents = len(parts) > 1 and parts[-1] == "**" and end != "/"
    if contents:
        end = "/"
        parts.pop()
    # Such as "**" alone: rare, and implementations differ.
    if not parts or "" in parts or parts[-1] == "**":
        return Rule(excludes)
    expression = "^"
    for part in parts[:-1]:
        inner = component_expression(part, excludes)
        if inner is None:
            return Rule(excludes)
        expression += "(?:[^/]+/)*" if part == "**" else inner + "/"
    last = component_expression(parts[-1], excludes)
    return Rule(excludes, f"{expression}{last}{end}" if last is not None else "", contents)


def component_expression(part: str, excludes: bool) -> Optional[str]:
    """Return the regular expression of a component with ``*``, ``?``, ``[...]``, escapes; None in doubt."""
    expression = ""
    for piece in re.findall(r"\\.|\[[!^]?[A-Za-z0-9_.-]+\]|.", part, re.DOTALL):
        if piece == "*":
            expression += "[^/]*"
        elif piece == "?":
            expression += "[^/]"
        elif piece in ("[", "\\", "\n") or "--" in piece[1:]:
            return None
        elif piece.startswith("["):
            inside = ("^" if piece[1] in "!^" else "") + piece[1:-1].lstrip("!^")
            try:
                slash = re.match(f"[{inside}]", "/") is not None
            except re.error:
                return None
            if slash and excludes:
                if inside[0] != "^":
                    return None
                inside += "/"
            expression += f"[{inside}]"
        else:
            expression += re.escape(piece[-1])
    # Asterisks alone match whole names, which are not empty.
    return "[^/]+" if part == "*" else expression
