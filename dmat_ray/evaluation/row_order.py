"""Evaluation rows by number: which are an attack's, and their order, without a text in Python for each of millions."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

PIECE = 1000  # tables that are put together
PART = 1_000_000  # rows that are sorted into one piece
KEYS = ("model", "source", "set", "attack")


@dataclass(frozen=True)
class Ordered:
    """Where rows come when they are sorted by their keys, then by id; those alike in all of these stay as they are.

    The n-th in this order is row `order[n]` of the table, of the example `examples[n]`, which numbers `ids`. Those of a (model,
    source, set, attack) are the slice `spans` of the order.
    """

    order: np.ndarray
    examples: np.ndarray
    ids: np.ndarray
    spans: dict[tuple[str, str, str, str], slice]


def ordered(rows: pa.Table) -> Ordered:
    """The order of some rows."""
    texts, key = [], np.zeros(rows.num_rows, np.int64)
    for name in KEYS:
        of_name, numbers = _numbered(rows[name])
        texts.append(of_name)
        key *= len(of_name)
        key += numbers
    ids, examples = _numbered(rows["id"])
    order = np.lexsort((examples, key))
    key = key[order]
    begin = np.flatnonzero(np.diff(key, prepend=-1))
    names = np.unravel_index(key[begin], [max(1, len(of_name)) for of_name in texts])
    named = zip(*(of_name[numbers] for of_name, numbers in zip(texts, names, strict=True)), strict=True)
    ends = [*begin.tolist(), rows.num_rows]
    spans = {name: slice(*ends[k : k + 2]) for k, name in enumerate(named)}
    return Ordered(order, examples[order], ids, spans)


def in_order(rows: pa.Table) -> pa.Table:
    """Rows sorted by their keys, then by id."""
    order = ordered(rows).order
    parts = [pa.array(order[begin : begin + PART]) for begin in range(0, len(order), PART)]
    # a column at a time, of which there is one copy more meanwhile
    columns = {field.name: _taken(rows[field.name], parts, field.type) for field in rows.schema}
    return pa.table(columns, schema=rows.schema)


def _taken(column: pa.ChunkedArray, parts: list[pa.Array], kind: pa.DataType) -> pa.ChunkedArray:
    # texts as numbers: those of all rows may be too long for one piece
    whole = (column.dictionary_encode() if pa.types.is_string(kind) else column).combine_chunks()
    return pa.chunked_array([whole.take(part).cast(kind) for part in parts], kind)


def pieces(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of many tables in few: one of a hundred rows takes more memory for itself than for them."""
    while some := list(itertools.islice(tables, PIECE)):
        yield pa.concat_tables(some).combine_chunks()


def _numbered(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The texts of a column, each once and sorted, and which of them each row has, (N) int32."""
    encoded = column.dictionary_encode().combine_chunks()
    texts = encoded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(texts)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return texts[order], rank[encoded.indices.to_numpy()]
