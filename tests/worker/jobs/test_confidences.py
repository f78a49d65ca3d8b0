import pyarrow as pa
import pytest

from cwpo.types import Triplet
from cwpo_worker.errors import DatasetFormError
from cwpo_worker.jobs.confidences import Confidences
from cwpo_worker.jobs.dataset import Dataset
from harness import House, labels_of


def places(found):
    return [(place.part, place.row) for place in found]


def test_a_part_is_counted_in_twentieths():
    values = pa.chunked_array([pa.array([0.0, 0.049, 0.05, 0.51], pa.float32()), [0.999, 1.0]])
    found = Confidences.of(3, values.cast(pa.float32()))
    assert found.counts == [2, 1, *[0] * 8, 1, *[0] * 8, 2]
    assert places(found.highest) == [(3, 5), (3, 4), (3, 3), (3, 2), (3, 1)]
    assert places(found.lowest) == [(3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]


def test_several_parts_are_counted_as_one():
    first = Confidences.of(0, pa.chunked_array([[0.2, 0.9]], pa.float32()))
    second = Confidences.of(1, pa.chunked_array([[0.1, 0.3]], pa.float32()))
    found = Confidences.joined([first, second])
    assert sum(found.counts) == 4
    assert places(found.highest) == [(0, 1), (1, 1), (0, 0), (1, 0)]
    assert places(found.lowest) == [(1, 0), (0, 0), (1, 1), (0, 1)]


def test_no_part_has_no_rows():
    assert Confidences.joined([]) == Confidences(counts=[0] * 20, highest=[], lowest=[])


@pytest.fixture
def house(service, tmp_path):
    house = House(tmp_path, service)
    yield house
    house.close()


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["auto", "never"])
def test_a_job_knows_the_rows_at_the_ends_over_all_its_parts(house, merge):
    rows = house.rows(5000)
    job_id = house.submit(rows, merge=merge)
    house.work()
    found = house.ledger.confidences(job_id, owner=None)
    labels = labels_of([Triplet(**row) for row in rows])
    values = sorted(label.confidence for label in labels)
    assert found.rows == sum(found.counts) == 5000
    assert found.counts[0] == sum(value < 0.05 for value in values)
    of_id = {label.id: label.confidence for label in labels}
    assert [row.confidence for row in found.least_confident] == pytest.approx(values[:5])
    assert [row.confidence for row in found.most_confident] == pytest.approx(values[:-6:-1])
    for row in [*found.least_confident, *found.most_confident]:
        assert row.confidence == pytest.approx(of_id[row.id])
        assert row.prompt == f"question {row.id.removeprefix('row-')}?"


@pytest.mark.slow
def test_what_an_earlier_version_published_has_none(house):
    job_id = house.submit(house.rows(10))
    house.work()
    key = house.registry.get(job_id).folder.dataset
    dataset = Dataset(house.store, house.registry.get(job_id).folder)
    old = dataset.summary().model_dump_json(exclude={"confidences"})
    house.store.put(key, old.encode())
    with pytest.raises(DatasetFormError, match="did not count its confidences"):
        house.ledger.confidences(job_id, owner=None)
