"""Files that are annotated by requests, and what is told of them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cwpo import Client
from cwpo.annotated_file import AnnotatedFile, annotate_file
from cwpo.errors import ModelRevisionError
from cwpo.types import ModelRef
from cwpo_annotator import Annotator
from harness import House, serving

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


def test_a_file_is_of_one_revision_or_not_written_at_all(tmp_path):
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in House.rows(300)))

    def load(name):
        annotator = Annotator.null()
        annotator.model = ModelRef(name="null", revision=name)
        return annotator

    class Overtaken(Client):
        """A client after whose first request, of two for the rows, the annotator changes."""

        def annotate(self, *arguments, **options):
            answer = super().annotate(*arguments, **options)
            assert service.http.post("/model", json={"annotator": "next"}).status_code == 200
            return answer

    with serving(loader=load) as service, Overtaken(service.url, max_retries=0) as client:
        with pytest.raises(ModelRevisionError, match=r"at revision next,.* revision null"):
            annotate_file(client, source, output)
        assert list(tmp_path.iterdir()) == [source]
        with Client(service.url) as steady:
            assert annotate_file(steady, source, output).rows == 300


def test_rows_of_a_prompt_are_sent_together_and_written_in_order(tmp_path):
    rows = House.rows(600)
    for number, row in enumerate(rows):
        row["prompt"] = f"question {number % 200}"
    rows[7]["response_a"] = ""
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    class Watched(Client):
        def annotate(self, triplets, **options):
            asked.append({triplet.prompt for triplet in triplets})
            return super().annotate(triplets, **options)

    with serving() as service, Watched(service.url) as client:
        assert annotate_file(client, source, output).rejected == {"empty_response": 1}
    written = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert written == [row["id"] for row in rows if row is not rows[7]]
    # Three requests for two hundred prompts: two of them may be in two.
    assert sum(map(len, asked)) <= 202
