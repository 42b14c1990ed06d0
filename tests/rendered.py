"""Markdown as a reader sees it, by a parser of others."""

from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token


class Rendered:
    """Tables as texts of their cells, blocks of code with their languages, all text outside of them, and tags taken as such."""

    def __init__(self, text: str) -> None:
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        every = [token for one in tokens for token in (one, *(one.children or ()))]
        self.code = [(token.info, token.content) for token in every if token.type in ("fence", "code_block")]
        self.tags = [token.content for token in every if token.type in ("html_block", "html_inline")]
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        for before, token in pairwise(tokens):
            if before.type == "table_open":
                self.tables.append([])
            if token.type == "tr_open":
                self.tables[-1].append([])
            if token.type == "inline":
                self.texts.append(_text(token))
                if before.type in ("th_open", "td_open"):
                    self.tables[-1][-1].append(_text(token))


def _text(inline: Token) -> str:
    return "".join(token.content for token in inline.children or ())
