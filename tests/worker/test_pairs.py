"""Jobs whose rows have several responses: each row becomes the pairs that the job names."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo import RankItem, Triplet
from cwpo.datasets.ranked import RankedPairs, count_pairs
from cwpo.datasets.weighted import weighted_row
from cwpo.types import JobRequest
from cwpo_annotator import Annotator
from cwpo_worker.errors import IdempotencyConflictError, IncompleteJobError
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.steps.shard_rows import numbered_rows, read_shard

PAIRS = ["best_worst", "adjacent", "all"]


def listed(number, count=4, **more):
    responses = [f"answer {number} of {place}" for place in range(count)]
    return {"id": f"list-{number}", "prompt": f"list {number}?", "responses": responses} | more


def expected(rows, pairs, names=(), annotator=None):
    """The dataset, by the annotator and one row after the other."""
    annotator = annotator or Annotator.null()
    dataset = []
    for row in rows:
        extra = {name: row.get(name) for name in names}
        if "responses" not in row:
            triplet = Triplet(**{key: row[key] for key in row if key not in names})
            (label,) = annotator.annotate([triplet])
            dataset.append(weighted_row(triplet, label, extra, 1))
            continue
        item = RankItem(**{key: row[key] for key in row if key not in names})
        (ranking,) = annotator.rank([item])
        found = RankedPairs.of(ranking, pairs, annotator.temperature).pairs
        for pair in found:
            dataset.append(weighted_row(pair.triplet(item), pair.label, extra, len(found)))
    return dataset


def do(house, job_id, shards=None):
    """Plan, annotate and merge, in this process."""
    house.plan(job_id)
    count = house.lifecycle.turns.shards_of(job_id) or 0
    for index in range(count):
        house.annotate(job_id, index)
    if shards is not None:
        assert count == shards
    house.merge(job_id)


def counts(house, job_id):
    progress = house.ledger.get(job_id, owner=None).progress
    return (
        progress.rows_total,
        progress.rows_annotated,
        progress.rows_failed,
        progress.pairs_annotated,
    )


@pytest.fixture(params=PAIRS)
def pairs(request):
    return request.param


@pytest.fixture
def shop(house, monkeypatch):
    """The house, with shards of eight triplets."""
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 8)
    return house


def test_the_dataset_has_the_pairs_of_each_row_in_input_order(shop, pairs):
    rows = [row for n in range(6) for row in (listed(n, 2 + n % 4), *shop.rows(6)[n : n + 1])]
    job_id = shop.submit(rows, pairs=pairs)
    do(shop, job_id)
    dataset = shop.results(job_id)
    assert dataset == expected(rows, pairs)
    of_lists = [count_pairs(2 + n % 4, pairs) for n in range(6)]
    assert counts(shop, job_id) == (12, 12, 0, 6 + sum(of_lists))
    assert len(dataset) == 6 + sum(of_lists)
    assert shop.ledger.get(job_id, owner=None).pairs == pairs


def test_a_pair_says_which_responses_it_is_of_and_how_many_its_prompt_gave(shop):
    row = listed(0, 3)
    job_id = shop.submit([row, *shop.rows(1)], pairs="all")
    do(shop, job_id)
    *pairs, triplet = shop.results(job_id)
    for pair in pairs:
        name, places = pair["id"].split("#")
        chosen, rejected = map(int, places.split("-"))
        assert name == "list-0"
        assert (pair["chosen"], pair["rejected"]) == (
            row["responses"][chosen],
            row["responses"][rejected],
        )
        assert pair["score_chosen"] > pair["score_rejected"]
        assert pair["preferred"] == ("a" if chosen < rejected else "b")
    assert [each["prompt_pairs"] for each in pairs] == [3, 3, 3]
    assert (triplet["id"], triplet["prompt_pairs"]) == ("row-0", 1)
    with shop.ledger.open_results(job_id, "parquet", owner=None).stream as stream:
        assert pq.read_schema(stream).field("prompt_pairs").type == pa.int32()


def test_without_pairs_a_list_is_a_rejected_row_that_says_the_fix(shop):
    job_id = shop.submit([*shop.rows(2), listed(0)])
    do(shop, job_id)
    assert shop.results(job_id) == shop.expected(shop.rows(2))
    (line,) = shop.errors(job_id)
    assert (line["row"], line["id"], line["code"]) == (3, "list-0", "invalid_row")
    assert "name best_worst, adjacent or all with --pairs, or as pairs" in line["detail"]
    assert counts(shop, job_id) == (3, 2, 1, None)


def test_a_bad_list_is_one_line_of_errors_and_rows_add_up(shop, pairs):
    bad = [
        listed(1, 1),
        listed(2, 65),
        listed(3, responses=["x", " "]),
        listed(4, responses=["x", 4]),
    ]
    good = [listed(0, 5), listed(5, 64), listed(6, 3)]
    job_id = shop.submit([good[0], *bad, *good[1:]], pairs=pairs)
    do(shop, job_id)
    assert shop.results(job_id) == expected(good, pairs)
    lines = shop.errors(job_id)
    assert [(line["row"], line["id"]) for line in lines] == [
        (n + 1, f"list-{n}") for n in range(1, 5)
    ]
    assert [line["code"] for line in lines] == [
        "invalid_row",
        "invalid_row",
        "empty_response",
        "invalid_row",
    ]
    assert [line["detail"].split(":")[0] for line in lines] == [
        "responses",
        "responses",
        "responses[1] is empty",
        "responses[1]",
    ]
    rows, annotated, failed, made = counts(shop, job_id)
    assert (rows, annotated, failed) == (7, 3, 4)
    assert made == len(expected(good, pairs))


@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_dataset(shop, encoded, format):
    rows = [listed(n, 2 + n, note=[n]) for n in range(4)]
    job_id = shop.submit(encoded(rows, format), format, pairs="adjacent")
    do(shop, job_id)
    assert jsonl(shop, job_id) == expected(rows, "adjacent", ("note",))


def jsonl(house, job_id):
    with house.ledger.open_results(job_id, "jsonl", owner=None).stream as stream:
        return [json.loads(line) for line in stream]


def test_chat_prompts_give_chat_responses(shop):
    prompt = [{"role": "user", "content": "why?"}]
    row = listed(0, 3, prompt=prompt)
    job_id = shop.submit([row], pairs="all")
    do(shop, job_id)
    dataset = jsonl(shop, job_id)
    assert dataset == expected([row], "all")
    assert dataset[0]["chosen"][0]["role"] == "assistant"


def test_equal_responses_tie_and_stay_with_confidence_0(shop):
    row = listed(0, responses=["x", "y", "x"])
    job_id = shop.submit([row], pairs="all")
    do(shop, job_id)
    dataset = shop.results(job_id)
    (tie,) = [pair for pair in dataset if pair["preferred"] == "tie"]
    assert (tie["id"], tie["confidence"]) == ("list-0#0-2", 0)
    assert tie["chosen"] == tie["rejected"] == "x"
    assert len(dataset) == 3


def test_calibrated_confidence_is_there_for_pairs_that_are_no_neighbours(shop, service):
    annotator = Annotator.null()
    annotator.temperature = 3.0
    service.annotator = annotator
    try:
        rows = [listed(0, 5), *shop.rows(1)]
        job_id = shop.submit(rows, pairs="all")
        do(shop, job_id)
        names = ("confidence", "calibrated_confidence")
        found = [[row[name] for name in names] for row in shop.results(job_id)]
        wanted = [[row[name] for name in names] for row in expected(rows, "all", (), annotator)]
        assert found == [pytest.approx(each) for each in wanted]
    finally:
        service.annotator = Annotator.null()


def test_a_shard_is_closed_by_its_work_and_by_its_pairs(shop):
    def shards(rows, pairs):
        job_id = shop.submit(rows, pairs=pairs)
        shop.plan(job_id)
        folder = JobFolder(job_id)
        return [
            [row.row for row in numbered_rows(read_shard(shop.store.read(key)))]
            for key in shop.store.list(folder.shards)
        ]

    # Four responses are as much work as two triplets, and six pairs.
    rows = [listed(n) for n in range(6)]
    assert shards(rows, "best_worst") == [[1, 2, 3, 4], [5, 6]]
    assert shards(rows, "adjacent") == [[1, 2, 3], [4, 5, 6]]
    assert shards(rows, "all") == [[1, 2], [3, 4], [5, 6]]


def test_a_shard_of_long_texts_is_closed_by_what_the_dataset_will_have(shop, monkeypatch):
    monkeypatch.setattr("cwpo_worker.steps.plan.SHARD_CHARACTERS", 10_000)
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 1000)
    # 1,000 characters as they are sent, and of ten pairs 9,000 of the prompt alone.
    rows = [listed(n, 5, prompt="p" * 900) for n in range(3)]
    for pairs, count in (("best_worst", 1), ("all", 2)):
        job_id = shop.submit(rows, pairs=pairs)
        do(shop, job_id, shards=count)
        assert shop.results(job_id) == expected(rows, pairs)


def test_a_row_whose_pairs_alone_are_too_much_is_rejected(shop, monkeypatch):
    monkeypatch.setattr("cwpo_worker.steps.plan.SHARD_CHARACTERS", 10_000)
    rows = [listed(0), listed(1, 8, prompt="p" * 900), listed(2)]
    job_id = shop.submit(rows, pairs="all")
    do(shop, job_id)
    assert shop.results(job_id) == expected([rows[0], rows[2]], "all")
    (line,) = shop.errors(job_id)
    assert (line["row"], line["code"]) == (2, "invalid_row")
    # 28 pairs of a prompt and two responses of 13 characters each.
    assert "its pairs would have 25,928 characters together, of at most 10,000" in line["detail"]


def test_a_row_of_a_later_file_continues_the_open_shard_by_its_size(shop):
    rows = [listed(n) for n in range(8)]
    job_id = shop.submit_files(rows[:4], rows[4:], pairs="adjacent")
    shop.plan(job_id)
    shop.plan(job_id, 1)
    # Three rows have nine pairs.
    sizes = [
        len(read_shard(shop.store.read(key))) for key in shop.store.list(JobFolder(job_id).shards)
    ]
    assert sizes == [3, 3, 2]
    for index in range(3):
        shop.annotate(job_id, index)
    shop.merge(job_id)
    assert shop.results(job_id) == expected(rows, "adjacent")


def test_a_part_that_lacks_a_later_column_is_completed_for_every_pair(shop):
    first = [listed(n) for n in range(3)]
    later = [listed(n, 3, note=n) for n in range(3, 6)]
    job_id = shop.submit_files(first, later, pairs="adjacent")
    shop.plan(job_id)
    shop.annotate(job_id, 0)
    shop.plan(job_id, 1)
    for index in range(1, shop.lifecycle.turns.shards_of(job_id)):
        shop.annotate(job_id, index)
    shop.merge(job_id)
    assert shop.results(job_id) == expected(first + later, "adjacent", ("note",))


def test_a_part_without_a_pair_of_a_row_is_not_merged(shop):
    job_id = shop.submit([listed(n) for n in range(4)], pairs="adjacent")
    shop.plan(job_id)
    for index in range(2):
        shop.annotate(job_id, index)
    path = shop.store_folder / JobFolder(job_id).part(0)
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(
        IncompleteJobError, match="part 0 has 2 annotated and 0 failed rows for the 3"
    ):
        shop.merge(job_id)


def test_progress_counts_rows_and_pairs_while_the_job_runs(shop):
    job_id = shop.submit([listed(n) for n in range(6)], pairs="adjacent")
    shop.plan(job_id)
    assert counts(shop, job_id) == (6, 0, 0, 0)
    shop.annotate(job_id, 0)
    assert counts(shop, job_id) == (6, 3, 0, 9)
    # A twin of the task finds the part, and counts nothing twice.
    shop.annotate(job_id, 0)
    assert counts(shop, job_id) == (6, 3, 0, 9)


def test_a_cancelled_job_has_the_pairs_of_its_finished_shards(shop):
    rows = [listed(n) for n in range(6)]
    job_id = shop.submit(rows, pairs="adjacent")
    shop.plan(job_id)
    shop.annotate(job_id, 0)
    shop.ledger.cancel(job_id, owner=None)
    shop.merge(job_id)
    assert shop.results(job_id) == expected(rows[:3], "adjacent")
    assert counts(shop, job_id) == (6, 3, 0, 9)


def test_rows_that_the_service_fails_on_are_found_among_lists_and_triplets(shop, service):
    rows = [row for n in range(3) for row in (listed(n, 3), *shop.rows(3)[n : n + 1])]
    job_id = shop.submit(rows, pairs="adjacent")
    shop.plan(job_id)
    service.poison = "list 1?"
    for _ in range(2):
        with pytest.raises(Exception, match="on fire"):
            shop.annotate(job_id, 0)
    shop.annotate(job_id, 0)
    for index in range(1, shop.lifecycle.turns.shards_of(job_id)):
        shop.annotate(job_id, index)
    shop.merge(job_id)
    assert shop.results(job_id) == expected(
        [row for row in rows if row["id"] != "list-1"], "adjacent"
    )
    (line,) = shop.errors(job_id)
    assert (line["row"], line["id"], line["code"]) == (3, "list-1", "poison_row")


def test_a_request_has_no_more_responses_than_one_of_triplets(shop, service, monkeypatch):
    monkeypatch.setattr("cwpo_worker.steps.answers.REQUEST_ROWS", 8)
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 1000)
    rows = [listed(n, count) for n, count in enumerate([6, 6, 6, 16, 17, 2])]
    job_id = shop.submit([*rows, *shop.rows(9)], pairs="best_worst")
    service.prompts.clear()
    do(shop, job_id)
    assert shop.results(job_id) == expected([*rows, *shop.rows(9)], "best_worst")
    assert sorted(len(prompts) for prompts in service.prompts) == [1, 1, 1, 1, 1, 2, 8]


def test_requests_of_lists_end_between_prompts(shop, service, monkeypatch):
    monkeypatch.setattr("cwpo_worker.steps.answers.REQUEST_ROWS", 8)
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 1000)
    # A request has room for four lists, or eight triplets, and each prompt has three of both.
    rows = [listed(n, prompt=f"list {n % 4}?") for n in range(12)]
    triplets = shop.rows(12)
    for number, row in enumerate(triplets):
        row["prompt"] = f"list {number % 4}?"
    mixed = [row for both in zip(rows, triplets, strict=True) for row in both]
    job_id = shop.submit(mixed, pairs="best_worst")
    service.prompts.clear()
    do(shop, job_id)
    assert shop.results(job_id) == expected(mixed, "best_worst")
    of_lists = [[f"list {n}?"] * 3 for n in range(4)]
    of_triplets = [of_lists[n] + of_lists[n + 1] for n in (0, 2)]
    assert sorted(service.prompts) == sorted([*of_lists, *of_triplets])


def test_a_job_is_the_same_only_with_the_same_pairs(house):
    file_id = house.upload(json.dumps(listed(0)).encode())
    asked = JobRequest(file_id=file_id, pairs="all")
    first = house.ledger.submit(asked, owner=None, idempotency_key="k")
    assert house.ledger.submit(asked, owner=None, idempotency_key="k").id == first.id
    other = JobRequest(file_id=file_id, pairs="adjacent")
    with pytest.raises(IdempotencyConflictError):
        house.ledger.submit(other, owner=None, idempotency_key="k")


row_of_any_kind = st.one_of(
    st.integers(2, 9).map(lambda count: ("list", count)),
    st.just(("triplet", 2)),
    st.just(("bad", 0)),
)


@settings(
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=st.lists(row_of_any_kind, min_size=1, max_size=20), named=st.sampled_from(PAIRS))
def test_any_mixture_of_rows_adds_up(shop, drawn, named):
    rows = []
    for n, (kind, count) in enumerate(drawn):
        if kind == "triplet":
            rows.append({"id": f"t{n}", "prompt": f"{n}", "response_a": "x", "response_b": f"y{n}"})
        else:
            responses = ["", "x"] if kind == "bad" else [f"{n} of {k}" for k in range(count)]
            rows.append({"id": f"l{n}", "prompt": f"{n}", "responses": responses})
    job_id = shop.submit(rows, pairs=named, max_rejected_share=1)
    do(shop, job_id)
    good = [row for row in rows if row.get("responses") != ["", "x"]]
    wanted = expected(good, named)
    found = shop.results(job_id)
    assert found == wanted
    assert counts(shop, job_id) == (len(rows), len(good), len(rows) - len(good), len(wanted))
    assert sum(1 / row["prompt_pairs"] for row in found) == pytest.approx(len(good))
