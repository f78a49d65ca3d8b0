"""Files that are annotated by requests, and what is told of them."""

import itertools
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cwpo import Client, RankItem, Triplet
from cwpo.annotated_file import AnnotatedFile, annotate_file, errors_path
from cwpo.datasets.ranked import RankedPairs
from cwpo.datasets.triplets import read_rows
from cwpo.datasets.weighted import certificate_in, weighted_row
from cwpo.errors import ConfigError, ModelRevisionError
from cwpo.types import AnnotateRequest, ModelRef
from cwpo_annotator import Annotator
from harness import House, certified_annotator, labels_of, serving

OUTPUT = Path("runs/weighted.parquet")
SEE = "see runs/weighted.errors.jsonl"
FLAG = "`--truncation prompt_left` of `cwpo annotate` or `cwpo jobs submit`"


@pytest.mark.parametrize(
    ("rows", "rejected", "told"),
    [
        (1435, {}, []),
        (
            1435,
            {"too_long": 44},
            [f"44 of 1,479 rows rejected: 44 too_long. Keep them with {FLAG}; {SEE}"],
        ),
        (
            3,
            {"empty_response": 1, "too_long": 2},
            [
                "3 of 6 rows rejected: 2 too_long, 1 empty_response. Keep those too_long with "
                f"{FLAG}; {SEE}"
            ],
        ),
        (3, {"invalid_row": 1}, [f"1 of 4 rows rejected: 1 invalid_row; {SEE}"]),
    ],
)
def test_rejected_rows_are_summed_up_by_reason_with_the_flag_that_keeps_them(rows, rejected, told):
    summary = AnnotatedFile(OUTPUT, rows, Counter(rejected)).summary()
    assert summary.splitlines() == [f"runs/weighted.parquet: {rows:,} rows", *told]


def test_pairs_are_summed_up_beside_the_rows_that_they_are_of():
    summary = AnnotatedFile(OUTPUT, 3, Counter(invalid_row=1), pairs=9).summary()
    assert summary.splitlines() == [
        "runs/weighted.parquet: 9 pairs of 3 rows",
        f"1 of 4 rows rejected: 1 invalid_row; {SEE}",
    ]


LISTS = [
    {"id": f"list-{n}", "prompt": f"list {n}?", "responses": [f"{n} of {k}" for k in range(2 + n)]}
    for n in range(4)
]


@pytest.mark.parametrize("pairs", ["best_worst", "adjacent", "all"])
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_lists_of_responses_become_pairs_by_requests(tmp_path, pairs, format):
    source, output = tmp_path / "lists.jsonl", tmp_path / f"weighted.{format}"
    rows = [row for pair in zip(LISTS, House.rows(4), strict=True) for row in pair]
    rows.insert(2, {"id": "bad", "prompt": "p", "responses": ["one"], "note": "dropped"})
    rows.insert(5, {"id": "empty", "prompt": "p", "responses": ["one", " "]})
    rows[0]["note"] = "kept"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[0] = {name: value for name, value in rows[0].items() if name != "note"}
    with serving() as service, Client(service.url) as client:
        annotated = annotate_file(client, source, output, pairs=pairs)
    expected = []
    for row in rows:
        if row["id"] in ("bad", "empty"):
            continue
        note = {"note": "kept" if row["id"] == "list-0" else None}
        if "responses" in row:
            item = RankItem(**row)
            (ranking,) = Annotator.null().rank([item])
            made = RankedPairs.of(ranking, pairs, None).pairs
            triplets = [(pair.triplet(item), pair.label) for pair in made]
        else:
            triplets = [(Triplet(**row), *labels_of([Triplet(**row)]))]
        expected += [weighted_row(*each, note, len(triplets)) for each in triplets]
    with output.open("rb") as stream:
        written = [row for _, row in read_rows(stream, format)]
    assert written == expected
    assert (annotated.rows, annotated.pairs) == (8, len(expected))
    assert annotated.rejected == Counter(invalid_row=1, empty_response=1)
    errors = [json.loads(line) for line in errors_path(output).read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in errors] == [(3, "bad"), (6, "empty")]


def test_lists_of_a_prompt_are_sent_together_and_written_in_order(tmp_path, monkeypatch):
    # Sixteen lists have as many responses as 32 triplets.
    monkeypatch.setattr("cwpo.annotated_file._WINDOW_ROWS", 32)
    rows = [
        {"id": str(n), "prompt": f"{n % 4}", "responses": [f"{n} of {k}" for k in range(4)]}
        for n in range(32)
    ]
    source, output = tmp_path / "lists.jsonl", tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    class Watched(Client):
        def rank_iter(self, items, **options):
            asked.append([item.prompt for item in items])
            return super().rank_iter(items, **options)

    with serving() as service, Watched(service.url) as client:
        assert annotate_file(client, source, output, pairs="best_worst").pairs == 32
    written = [json.loads(line)["id"].split("#")[0] for line in output.read_text().splitlines()]
    assert written == [row["id"] for row in rows]
    assert asked == [[prompt for prompt in "0123" for _ in range(4)]] * 2


def test_without_pairs_lists_are_rejected_with_the_fix(tmp_path):
    source, output = tmp_path / "lists.jsonl", tmp_path / "weighted.jsonl"
    source.write_text(json.dumps(LISTS[0]) + "\n" + json.dumps(House.rows(1)[0]) + "\n")
    with serving() as service, Client(service.url) as client:
        annotated = annotate_file(client, source, output)
    assert (annotated.rows, annotated.pairs) == (1, None)
    (line,) = errors_path(output).read_text().splitlines()
    assert "--pairs" in json.loads(line)["detail"]
    assert "prompt_pairs" not in json.loads(output.read_text())


def test_a_file_is_of_one_revision_or_not_written_at_all(tmp_path):
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in House.rows(4000)))

    def load(name):
        annotator = Annotator.null()
        annotator.model = ModelRef(name="null", revision=name)
        return annotator

    class Overtaken(Client):
        """A client after whose first label, when not all is sent, the annotator changes."""

        def annotate_iter(self, *arguments, **options):
            labels = super().annotate_iter(*arguments, **options)
            yield next(labels)
            assert service.http.post("/model", json={"annotator": "next"}).status_code == 200
            yield from labels

    with serving(loader=load) as service, Overtaken(service.url, max_retries=0) as client:
        with pytest.raises(ModelRevisionError, match=r"at revision next,.* revision null"):
            annotate_file(client, source, output)
        assert list(tmp_path.iterdir()) == [source]
        with Client(service.url) as steady:
            assert annotate_file(steady, source, output).rows == 4000


def test_rows_of_a_prompt_are_sent_together_and_written_in_order(tmp_path):
    rows = House.rows(600)
    for number, row in enumerate(rows):
        row["prompt"] = f"question {number % 200}"
    rows[7]["response_a"] = ""
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    class Watched(Client):
        def annotate_iter(self, triplets, **options):
            asked.extend(prompt for prompt, _ in groupby(triplet.prompt for triplet in triplets))
            return super().annotate_iter(triplets, **options)

    with serving() as service, Watched(service.url) as client:
        assert annotate_file(client, source, output).rejected == {"empty_response": 1}
    written = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert written == [row["id"] for row in rows if row is not rows[7]]
    assert len(asked) == len(set(asked)) == 200


@contextmanager
def answering_together(requests):
    """The url of a service whose first so many answers come when as many requests have arrived."""
    together = threading.Barrier(requests, timeout=60)
    numbers = itertools.count()
    null = Annotator.null()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            limits = {"max_length": 1, "max_triplets": 1024, "max_body_bytes": 1 << 30}
            backend = {"backend": "null", "device": "cpu", "dtype": "float32"}
            self.answer({**null.model.model_dump(), **backend, **limits})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            triplets = AnnotateRequest.model_validate_json(body).triplets
            if next(numbers) < requests:
                together.wait()
            labels = [label.model_dump(exclude_none=True) for label in null.annotate(triplets)]
            usage = {"triplets": len(triplets), "tokens": 0}
            self.answer({"annotations": labels, "model": null.model.model_dump(), "usage": usage})

        def answer(self, content):
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_several_requests_are_in_flight_and_the_rows_stay_in_order(tmp_path):
    rows = House.rows(5 * 256)
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with answering_together(3) as url, Client(url, max_retries=0) as client:
        assert annotate_file(client, source, output).rows == len(rows)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == House.expected(rows)


def test_a_certificate_is_void_once_confidences_have_drifted(tmp_path):
    source, output = tmp_path / "rows.jsonl", tmp_path / "weighted.parquet"
    source.write_text("".join(json.dumps(row) + "\n" for row in House.rows(300)))

    def sure_of_nothing():
        annotator = certified_annotator()
        annotator.confidence_quantiles = [0.0] * 11
        return annotator

    with serving(sure_of_nothing) as service, Client(service.url) as client:
        assert client.model().certificates_void is None
        annotated = annotate_file(client, source, output, max_error=0.1)
        assert "differ by" in annotated.as_dict()["certificates_void"]
        assert "certified promises nothing of this data" in annotated.summary()
        for job_above in (5000, 0):
            with pytest.raises(ConfigError, match="do not hold at present: the last 300 conf"):
                annotate_file(client, source, output, max_error=0.1, job_above=job_above)
        # Without the column, labels are as good as they are.
        again = annotate_file(client, source, tmp_path / "again.parquet")
        assert again.certificates_void is None


def test_labels_are_certified_by_the_annotators_certificate(tmp_path):
    source, output = tmp_path / "rows.jsonl", tmp_path / "weighted.parquet"
    rows = [*House.rows(20), {"id": "tie", "prompt": "p", "response_a": "x", "response_b": "x"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(certified_annotator) as service, Client(service.url) as client:
        (certificate,) = client.model().certificates
        annotate_file(client, source, output, max_error=0.1)
        with pytest.raises(ConfigError, match=r"no certificate of max_error 0\.2: it has 0\.1"):
            annotate_file(client, source, tmp_path / "other.parquet", max_error=0.2)
        with pytest.raises(ConfigError, match=r"no certificate of max_error 0\.2"):
            annotate_file(client, source, tmp_path / "other.parquet", max_error=0.2, job_above=0)
    assert not (tmp_path / "other.parquet").exists()
    with output.open("rb") as stream:
        written = [row for _, row in read_rows(stream, "parquet")]
    assert [row["certified"] for row in written] == [row["confidence"] > 0.6 for row in written]
    assert {row["certified"] for row in written} == {True, False}
    assert certificate_in(pq.read_schema(output)) == certificate
