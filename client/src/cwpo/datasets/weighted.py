"""The weighted dataset: its row, its schema, and its writers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cwpo import columns
from cwpo.certificates import is_certified
from cwpo.columns import Column
from cwpo.types import (
    Annotation,
    Certificate,
    ModelRef,
    Prompt,
    ResultFormat,
    Triplet,
)

_ANNOTATOR = b"cwpo.annotator"
_CERTIFICATE = b"cwpo.certificate"


class RowWriter(Protocol):
    """Writes rows of the weighted dataset in one format."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows."""


def weighted_row(
    triplet: Triplet,
    annotation: Annotation,
    extra: Mapping[str, Any] | None = None,
    prompt_pairs: int | None = None,
    certificate: Certificate | None = None,
) -> dict[str, Any]:
    """One row of the weighted dataset, with the extra columns last.

    chosen is the preferred response (response_a for a tie). With a chat prompt, responses become
    chat messages too, so that TRL reads the row without conversion.

    Args:
        prompt_pairs: number of pairs of the same input row, as a column; None for no such column.
        certificate: says which labels are certified, as a column; None for no such column.
    """
    prompt = plain_prompt(triplet.prompt)
    b_is_chosen = _b_is_chosen(annotation)
    row = _columns(
        prompt,
        (triplet.response_a, triplet.response_b),
        vars(annotation),
        choose=lambda of_a, of_b: of_b if b_is_chosen else of_a,
        as_response=_same if isinstance(prompt, str) else _turn,
    )
    if prompt_pairs is not None:
        row["prompt_pairs"] = prompt_pairs
    if certificate is not None:
        row["certified"] = is_certified(annotation, certificate)
    return {**row, **extra} if extra else row


def weighted_table(
    prompts: pa.ChunkedArray,
    responses: tuple[pa.ChunkedArray, pa.ChunkedArray],
    annotations: Sequence[Annotation],
    model: ModelRef | None = None,
    extra: Mapping[Column, Sequence[Any]] | None = None,
    prompt_pairs: Sequence[int] | None = None,
    certificate: Certificate | None = None,
) -> pa.Table:
    """The same rows as from `weighted_row`, computed by column, which is many times faster.

    Args:
        prompts: of n triplets; text, or chat messages as `prompt_type` has them.
        responses: all responses a, and all responses b; n texts each.
        annotations: of the triplets, in order.
        model: the annotator, which the metadata of the schema names.
        extra: the columns beside the triplets, n values each.
        prompt_pairs: numbers of pairs of the same input row, n values; None for no such column.
        certificate: says which labels are certified, as a column; None for no such column.
    """
    extra = extra or {}
    is_chat = prompts.type != pa.string()
    is_calibrated = bool(annotations) and annotations[0].calibrated_confidence is not None
    schema = weighted_schema(
        chat=is_chat,
        calibrated=is_calibrated,
        paired=prompt_pairs is not None,
        model=model,
        certificate=certificate,
        extra=[*extra],
    )
    b_is_chosen = pa.array(map(_b_is_chosen, annotations), pa.bool_())
    values = _columns(
        prompts,
        responses,
        _label_columns(annotations, is_calibrated),
        choose=lambda of_a, of_b: pc.if_else(b_is_chosen, of_b, of_a),
        as_response=_turns if is_chat else _same,
    )
    if prompt_pairs is not None:
        values["prompt_pairs"] = prompt_pairs
    if certificate is not None:
        values["certified"] = [is_certified(label, certificate) for label in annotations]
    for column, given in extra.items():
        values[column.name] = columns.stored(column.field(), given)
    return pa.Table.from_pydict(values, schema=schema)


def plain_prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as it is written to files: text, or messages as JSON objects."""
    if isinstance(prompt, str):
        return prompt
    return [message.model_dump() for message in prompt]


def prompt_type(*, chat: bool) -> pa.DataType:
    """The type of prompts in Parquet, and of responses in the weighted dataset."""
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.list_(turn) if chat else pa.string()


def weighted_schema(
    *,
    chat: bool,
    calibrated: bool,
    paired: bool = False,
    model: ModelRef | None = None,
    certificate: Certificate | None = None,
    extra: Sequence[Column] = (),
) -> pa.Schema:
    """The Parquet schema of the weighted dataset; its metadata names annotator and certificate.

    Args:
        paired: whether there is the column prompt_pairs.
        certificate: that of the column certified; None for no such column.
    """
    text = prompt_type(chat=chat)
    fields = [
        pa.field("id", pa.string(), nullable=False),
        *(pa.field(name, text, nullable=False) for name in ("prompt", "chosen", "rejected")),
        *(
            pa.field(name, pa.float32(), nullable=False)
            for name in ("confidence", "score_chosen", "score_rejected")
        ),
        pa.field("preferred", pa.string(), nullable=False),
    ]
    if calibrated:
        fields.append(pa.field("calibrated_confidence", pa.float32(), nullable=False))
    if paired:
        fields.append(pa.field("prompt_pairs", pa.int32(), nullable=False))
    if certificate is not None:
        fields.append(pa.field("certified", pa.bool_(), nullable=False))
    fields += [column.field() for column in extra]
    metadata = {_ANNOTATOR: model, _CERTIFICATE: certificate}
    noted = {name: value.model_dump_json() for name, value in metadata.items() if value is not None}
    return pa.schema(fields, metadata=noted or None)


def columns_beside(schema: pa.Schema) -> list[Column]:
    """The extra columns of a weighted dataset, from the schema that `weighted_schema` gave."""
    own = weighted_schema(
        chat=False,
        calibrated="calibrated_confidence" in schema.names,
        paired="prompt_pairs" in schema.names,
        certificate=certificate_in(schema),
    )
    return [Column.of(field) for field in list(schema)[len(own) :]]


def annotator_of(schema: pa.Schema) -> ModelRef | None:
    """The annotator that wrote a weighted dataset; None if its schema does not name one."""
    noted = (schema.metadata or {}).get(_ANNOTATOR)
    return None if noted is None else ModelRef.model_validate_json(noted)


def certificate_in(schema: pa.Schema) -> Certificate | None:
    """The certificate of a weighted dataset's column certified; None if it has no such column."""
    noted = (schema.metadata or {}).get(_CERTIFICATE)
    return None if noted is None else Certificate.model_validate_json(noted)


def _b_is_chosen(annotation: Annotation) -> bool:
    return annotation.preferred == "b"  # Of a tie, response a is chosen.


def _columns(
    prompt: Any,
    responses: tuple[Any, Any],
    label: Mapping[str, Any],
    *,
    choose: Callable[[Any, Any], Any],
    as_response: Callable[[Any], Any],
) -> dict[str, Any]:
    """The dataset's own columns by name, of one row (values) or of all rows (arrays).

    Args:
        label: the fields of an annotation; without `calibrated_confidence` where there is none.
        choose: takes what belongs to responses a and b, gives what belongs to the chosen one.
        as_response: gives a response's text the form of the prompt.
    """
    a, b = responses
    values = {
        "id": label["id"],
        "prompt": prompt,
        "chosen": as_response(choose(a, b)),
        "rejected": as_response(choose(b, a)),
        "confidence": label["confidence"],
        "score_chosen": choose(label["score_a"], label["score_b"]),
        "score_rejected": choose(label["score_b"], label["score_a"]),
        "preferred": label["preferred"],
    }
    if label.get("calibrated_confidence") is not None:
        values["calibrated_confidence"] = label["calibrated_confidence"]
    return values


def _label_columns(annotations: Sequence[Annotation], is_calibrated: bool) -> dict[str, Any]:
    floats = ["confidence", "score_a", "score_b"]
    if is_calibrated:
        floats.append("calibrated_confidence")
    return {
        "id": [annotation.id for annotation in annotations],
        "preferred": [annotation.preferred for annotation in annotations],
        **{
            name: pa.array([getattr(annotation, name) for annotation in annotations], pa.float32())
            for name in floats
        },
    }


def _same(response: Any) -> Any:
    return response


def _turn(response: str) -> list[dict[str, str]]:
    """A response as a conversation of one assistant's turn."""
    return [{"role": "assistant", "content": response}]


def _turns(responses: pa.ChunkedArray) -> pa.Array:
    """Each response as a conversation of one assistant's turn."""
    contents = responses.combine_chunks()
    roles = pa.array(["assistant"] * len(contents), pa.string())
    turns = pa.StructArray.from_arrays([roles, contents], names=["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(len(contents) + 1), pa.int32()), turns)


class ParquetWriter:
    """Writes weighted rows as Parquet.

    The first rows decide whether prompts are chat messages, and whether there are the columns
    calibrated_confidence and prompt_pairs.

    Args:
        certificate: that of the column certified, which the rows have; None where they have none.
    """

    def __init__(
        self,
        sink: BinaryIO,
        model: ModelRef | None = None,
        extra: Sequence[Column] = (),
        certificate: Certificate | None = None,
    ) -> None:
        self._sink = sink
        self._model = model
        self._extra = extra
        self._certificate = certificate
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows as one row group."""
        if not rows:
            return
        schema = self._schema(rows[0])
        values = {
            field.name: columns.stored(field, [row.get(field.name) for row in rows])
            for field in schema
        }
        self.write_table(pa.Table.from_pydict(values, schema=schema))

    def write_table(self, table: pa.Table) -> None:
        """Append a table that already has the schema."""
        if self._writer is None:
            schema = table.schema
            self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        """Write the footer; a file without rows is still a valid, empty dataset."""
        if self._writer is None:
            schema = weighted_schema(
                chat=False,
                calibrated=False,
                model=self._model,
                certificate=self._certificate,
                extra=self._extra,
            )
            self._writer = pq.ParquetWriter(self._sink, schema)
        self._writer.close()

    def _schema(self, row: Mapping[str, Any]) -> pa.Schema:
        if self._writer is not None:
            return self._writer.schema
        return weighted_schema(
            chat=not isinstance(row["prompt"], str),
            calibrated="calibrated_confidence" in row,
            paired="prompt_pairs" in row,
            model=self._model,
            certificate=self._certificate,
            extra=self._extra,
        )


class JsonlWriter:
    """Writes rows as JSON lines."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows, a line each."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        # A lone surrogate (a rejected row's id may hold one) becomes its JSON escape.
        self._sink.write("".join(lines).encode(errors="backslashreplace"))

    def close(self) -> None:
        """Nothing is buffered."""


@contextmanager
def weighted_writer(
    sink: BinaryIO,
    format: ResultFormat,
    model: ModelRef | None = None,
    extra: Sequence[Column] = (),
    certificate: Certificate | None = None,
) -> Iterator[RowWriter]:
    """A writer of the weighted dataset in `format`, closed when the block ends without an error."""
    writer: ParquetWriter | JsonlWriter = JsonlWriter(sink)
    if format == "parquet":
        writer = ParquetWriter(sink, model, extra, certificate)
    yield writer
    writer.close()
