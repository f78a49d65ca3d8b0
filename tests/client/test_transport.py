"""What is sent and when it is sent again: no socket and no clock is needed for it."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from cwpo.errors import APIError, ConnectionFailedError, CwpoError, api_error
from cwpo.transport import MAX_DELAY_SECONDS, Request, Retries, error_of
from cwpo.types import Problem, ScoreItem


def refusal(status, retry_after=None, reason=None):
    problem = Problem(title="t", status=status, detail="d", reason=reason)
    return api_error(problem, retry_after=retry_after)


def test_delays_double_less_up_to_half_by_chance_and_have_an_end():
    retries = Retries(12)
    for failure in range(12):
        longest = min(0.25 * 2**failure, MAX_DELAY_SECONDS)
        assert longest / 2 <= retries.delay(ConnectionFailedError("gone")) <= longest
    with pytest.raises(ConnectionFailedError, match="gone"):
        retries.delay(ConnectionFailedError("gone"))


def test_the_service_says_when_it_wants_to_be_asked_again():
    retries = Retries(4)
    answer = httpx2.Response(429, headers={"Retry-After": "7"}, content=b"busy")
    assert retries.delay(error_of(answer)) == 7.0
    assert retries.delay(refusal(503, 86_400.0)) == MAX_DELAY_SECONDS
    assert retries.delay(refusal(503, -1.0)) == 0.0


def test_a_date_to_be_asked_again_is_as_good_as_seconds():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    answer = httpx2.Response(503, headers={"Retry-After": soon}, content=b"busy")
    assert 15 < Retries(4).delay(error_of(answer)) <= 20
    past = httpx2.Response(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert Retries(4).delay(error_of(past)) == 0.0
    unclear = httpx2.Response(503, headers={"Retry-After": "soon"})
    assert 0.125 <= Retries(4).delay(error_of(unclear)) <= 0.25


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailedError("gone"),
        *(refusal(status) for status in (408, 429, 500, 502, 503, 504, 520)),
        refusal(409, reason="loading"),
    ],
)
def test_what_time_may_mend_is_tried_again(error):
    assert 0.125 <= Retries(1).delay(error) <= 0.25


def test_a_success_gives_all_retries_back():
    retries = Retries(1)
    retries.delay(refusal(503))
    retries.succeeded()
    retries.delay(refusal(503))
    with pytest.raises(APIError):
        retries.delay(refusal(503))


@pytest.mark.parametrize(
    "error",
    [
        CwpoError("no"),
        *(refusal(status, 1.0) for status in (400, 401, 404, 409, 413, 422, 501, 505, 507)),
        refusal(409, reason="conflict"),
        refusal(500, reason="backend"),
    ],
)
def test_what_time_does_not_mend_is_raised_at_once(error):
    with pytest.raises(type(error)):
        Retries(4).delay(error)


def test_a_request_sends_no_parameter_that_was_not_given():
    body = ScoreItem(prompt="p", response="r")
    arguments = Request(
        "POST", "/x", body=body, params={"limit": 3, "cursor": None}, headers={"A": "b"}
    ).arguments()
    assert arguments == {
        "method": "POST",
        "url": "/x",
        "params": {"limit": 3},
        "headers": {"A": "b", "Content-Type": "application/json"},
        "content": '{"prompt":"p","response":"r"}',
    }
