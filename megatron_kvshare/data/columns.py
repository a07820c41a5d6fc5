"""Text columns of tables: Parquet and Arrow files, data sets of the library ``datasets``.

Rows are read in small batches: of a long column memory holds a page or a batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kvshare.errors import DataError, Fault

if TYPE_CHECKING:
    import pyarrow

Rows = tuple[int, list[list[bytes | None]]]
"""The number of the first row, from 0, and its values per key, in UTF-8."""

_ROWS = 64
"""Rows read at once. Few: in a crafted file each can be as long as a page allows."""
_BATCH_BYTES = 1 << 18
_PAGE_BYTES = 1 << 20


def check_columns(where: str, schema: pyarrow.Schema, keys: Sequence[str]) -> None:
    """Refuse a table without text under each key.

    Raises:
        DataError: naming every such column.
    """
    faults = []
    for key in keys:
        if key not in schema.names:
            names = ", ".join(schema.names)
            fix = f"name the column of the text with --json-keys; there are: {names[:200]}"
            faults.append(Fault(where, key, "the table has no such column", fix))
        elif not _is_text(schema.field(key).type):
            rule = f"the column holds {schema.field(key).type}, not text"
            faults.append(Fault(where, key, rule, "name a column of text with --json-keys"))
    if faults:
        raise DataError(faults)


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def parquet_rows(path: Path, where: str, keys: Sequence[str], start: int) -> Iterator[Rows]:
    """Rows of a Parquet file from number ``start`` on."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=_PAGE_BYTES, pre_buffer=False) as file:
        check_columns(where, file.schema_arrow, keys)
        first = 0
        groups = list(range(file.num_row_groups))
        while groups and start >= first + file.metadata.row_group(groups[0]).num_rows:
            first += file.metadata.row_group(groups.pop(0)).num_rows
        if groups:
            batches = file.iter_batches(_ROWS, groups, columns=list(keys), use_threads=False)
            yield from _grouped(batches, keys, first, start)


def arrow_rows(path: Path, where: str, keys: Sequence[str], start: int) -> Iterator[Rows]:
    """Rows of an Arrow file, of either of its two forms, from number ``start`` on."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        check_columns(where, reader.schema, keys)
        whole = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        )
        batches = (
            batch.slice(i, _ROWS)
            for batch in map(_sound, whole)
            for i in range(0, len(batch), _ROWS)
        )
        yield from _grouped(batches, keys, 0, start)


def dataset_rows(dataset: Any, where: str, keys: Sequence[str], start: int) -> Iterator[Rows]:
    """Rows of a data set of the library ``datasets``, in memory, mapped or streamed."""
    tables = dataset.skip(start).with_format("arrow").iter(batch_size=_ROWS)

    def batches() -> Iterator[pyarrow.Table]:
        for number, table in enumerate(tables):
            if number == 0:
                check_columns(where, table.schema, keys)
            yield _sound(table)

    yield from _grouped(batches(), keys, start, start)


def _grouped(batches: Iterator[Any], keys: Sequence[str], first: int, start: int) -> Iterator[Rows]:
    """Rows from ``start`` on in batches of some size; the first of ``batches`` is ``first``."""
    columns: list[list[bytes | None]] = [[] for _ in keys]
    size, begin = 0, start
    for batch in batches:
        skipped = min(max(0, start - first), len(batch))
        first += len(batch)
        if skipped == len(batch):
            continue
        for key, column in zip(keys, columns, strict=True):
            values = _values(batch.column(key).slice(skipped))
            column += values
            size += sum(len(value) for value in values if value)
        if size >= _BATCH_BYTES:
            yield begin, columns
            columns, size, begin = [[] for _ in keys], 0, first
    if columns and columns[0]:
        yield begin, columns


def _sound(batch: Any) -> Any:
    """A batch whose columns are as long as it says; a damaged one may claim billions of rows."""
    batch.validate()
    return batch


def _values(column: Any) -> list[bytes | None]:
    import pyarrow

    # As bytes: a file may claim to hold UTF-8 that is none. Where a value ends, Arrow believes too.
    values = column.cast(pyarrow.large_binary())
    values.validate(full=True)
    found: list[bytes | None] = values.to_pylist()
    return found


TABLES: dict[str, Callable[[Path, str, Sequence[str], int], Iterator[Rows]]] = {
    "Parquet": parquet_rows,
    "Arrow": arrow_rows,
}
"""How the rows of a file are read, by its form."""
