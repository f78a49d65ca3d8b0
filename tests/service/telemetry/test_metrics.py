from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cwpo import Triplet
from cwpo_annotator.annotator import Annotator
from harness import TIMEOUT


@pytest.fixture
def scrape(serve, triplet):
    """The samples of a service after a few requests."""
    with serve() as service:
        same = triplet(1, response_b="answer 1")
        service.annotate(triplet(0), same, triplet(2, response_a=""))
        service.http.post("/annotate", json={})
        service.http.get("/nowhere")
        text = service.http.get("/metrics").text
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name, *sorted(sample.labels.values())] = sample.value
    return samples


def test_requests_are_counted_by_route_and_status(scrape):
    assert scrape["cwpo_requests_total", "/annotate", "200", "POST"] == 1
    assert scrape["cwpo_requests_total", "/annotate", "422", "POST"] == 1
    assert scrape["cwpo_requests_total", "404", "GET", "unmatched"] == 1
    assert scrape["cwpo_request_seconds_count", "/annotate"] == 2


def test_failures_are_counted_by_reason(scrape):
    assert scrape["cwpo_failures_total", "empty_response"] == 1
    assert scrape["cwpo_failures_total", "invalid"] == 1


def test_batches_and_stages_are_measured(scrape):
    assert scrape["cwpo_batch_items_sum",] == 2
    assert scrape["cwpo_batch_tokens_sum",] == 4
    for stage in ("tokenise", "queue", "inference"):
        assert scrape[f"cwpo_{stage}_seconds_count",] == 1
    assert scrape["cwpo_queue_tokens",] == 0
    assert scrape["cwpo_queue_age_seconds",] == 0


def test_the_labels_are_summed_up(scrape, triplet):
    assert scrape["cwpo_annotations_total",] == 2
    assert scrape["cwpo_ties_total",] == 1
    assert scrape["cwpo_truncations_total",] == 0
    assert scrape["cwpo_confidence_count",] == 2
    # The tie has confidence 0, which belongs to the lowest bucket.
    assert scrape["cwpo_confidence_bucket", "0.1"] >= 1
    assert scrape["cwpo_confidence_bucket", "+Inf"] == scrape["cwpo_confidence_bucket", "1.0"] == 2
    (label,) = Annotator.null().annotate([Triplet(**triplet(0))])
    assert scrape["cwpo_confidence_sum",] == pytest.approx(label.confidence)


def test_all_that_is_measured_is_there(scrape):
    names = {name for name, *_ in scrape}
    assert names >= {
        *("cwpo_requests_total", "cwpo_request_seconds_count", "cwpo_failures_total"),
        *("cwpo_queue_tokens", "cwpo_queue_age_seconds", "cwpo_queue_seconds_count"),
        *("cwpo_batch_items_count", "cwpo_batch_tokens_count", "cwpo_padding_share"),
        *("cwpo_tokenise_seconds_count", "cwpo_inference_seconds_count"),
        *("cwpo_annotations_total", "cwpo_ties_total", "cwpo_truncations_total"),
        "cwpo_confidence_bucket",
    }
    # Without quantiles in annotator.json there is nothing to compare with.
    assert "cwpo_confidence_drift" not in names


def test_how_old_the_queue_is_can_be_seen(serve, annotator_with, gated, triplet):
    def age(service):
        (line,) = [
            line
            for line in service.http.get("/metrics").text.splitlines()
            if line.startswith("cwpo_queue_age_seconds ")
        ]
        return float(line.split()[1])

    with serve(lambda: annotator_with(gated)) as service, ThreadPoolExecutor() as pool:
        asks = [pool.submit(service.annotate, triplet())]
        assert gated.entered.acquire(timeout=TIMEOUT)
        asks.append(pool.submit(service.annotate, triplet()))
        while not (first := age(service)):
            pass
        assert age(service) > first
        gated.gate.set()
        assert [ask.result().status_code for ask in asks] == [200, 200]
        assert age(service) == 0


def test_padding_is_what_the_model_read_for_nothing(serve, scalar_head, triplet):
    def share(service):
        text = service.http.get("/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith("cwpo_padding_share ")]
        return float(line.split()[1])

    with serve(lambda: Annotator.load(scalar_head("minilm"), device="cpu")) as service:
        assert share(service) == 0
        # Several texts a pass, on however many cores; how many decides how much is padding.
        service.annotate(
            *(triplet(i, response_a="yes", response_b="well, " * i) for i in range(1, 13))
        )
        assert 0 < share(service) < 1
        service.annotate(triplet(0, response_a="yes", response_b="two"))
        assert share(service) == 0
