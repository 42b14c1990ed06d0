"""The source code and the pickles of a TorchScript program, looked at before torch's parser sees them.

That parser, the compiler after it and torch's unpickler are recursive and have no bounds: some ten thousand parentheses,
or a sum of as many terms, overflow their stack and end the process.
"""

import re

from dmat_ray.formats.opcodes import Budget, check_opcodes
from dmat_ray.formats.stored import RefusedError

MAX_EXPRESSION = 1000  # brackets and operators around one place of an expression; torch ends at some 5000
MAX_BRACKETS, MAX_INDENT = 200, 400
# strings and comments first, as torch's lexer knows them, so that nothing hides behind one; a line may go on inside of both
TOKENS = re.compile(
    rb"(?P<quotes>\"\"\"|''')|\"(?:[^\"\\\n]|\\[\s\S])*\"|'(?:[^'\\\n]|\\[\s\S])*'|#(?! type:)[^\n]*|"
    rb"(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<next>,)|(?P<line>\n[ \t]*)|"
    rb"(?P<operator>[-+*/%@&|^~<>=!.:]+|\b(?:not|and|or|if|else|is|in|lambda)\b)|(?P<elif>\belif\b)"
)


def check_source(code: bytes) -> None:
    """Raise RefusedError for source that is nested deeper, or has longer expressions, than torch itself writes."""
    here, around = 0, 0  # brackets and operators of the expression in the innermost bracket, and of those around it
    brackets: list[int] = []
    for match in TOKENS.finditer(code):
        kind = match.lastgroup
        if kind in ("quotes", "elif"):
            raise RefusedError(f"holds {match[0].decode()}, which torch does not write")
        if kind == "open":
            brackets.append(here + 1)
            around, here = around + here + 1, 0
        elif kind == "close":
            here = brackets.pop() if brackets else 0
            around -= here
        elif kind == "next" or (kind == "line" and not brackets):
            here = 0
        elif kind == "operator":
            here += len(match[0]) if match[0][:1] in b"-+~." else 1
        if len(brackets) > MAX_BRACKETS or around + here > MAX_EXPRESSION or (kind == "line" and len(match[0]) > MAX_INDENT):
            raise RefusedError("holds code that is nested deeper than any decoder's")


def check_program(name: str, content: bytes, budget: Budget) -> None:
    """Raise RefusedError for a record of a TorchScript program, by its name, that would overflow torch's stack."""
    if name.endswith(".py"):
        check_source(content)
    elif name.endswith(".pkl") and check_opcodes(content, budget, strict=True) != len(content):
        raise RefusedError("holds a pickle that goes on after its end")
