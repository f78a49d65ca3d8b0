import pytest
from prometheus_client.parser import text_string_to_metric_families


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


def test_the_labels_are_summed_up(scrape):
    assert scrape["cwpo_annotations_total",] == 2
    assert scrape["cwpo_ties_total",] == 1
    assert scrape["cwpo_truncations_total",] == 0
    assert scrape["cwpo_confidence_count",] == 2
    # The tie has confidence 0, which belongs to the lowest bucket.
    assert scrape["cwpo_confidence_bucket", "0.1"] >= 1
    assert scrape["cwpo_confidence_bucket", "+Inf"] == scrape["cwpo_confidence_bucket", "1.0"] == 2
    assert 0 < scrape["cwpo_confidence_sum",] <= 1
