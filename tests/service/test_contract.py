"""The running service answers only what its contract documents, whatever it is asked."""

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyStrategyDefinition, Unsatisfiable

from cwpo.resources.files import CONTENT_TYPES

pytestmark = pytest.mark.slow

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

SETTINGS = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
# What has not answered by then hangs.
PATIENCE = 60.0
ROW = b'{"prompt": "why", "response_a": "so", "response_b": "never"}\n'


@schemathesis.serializer(*CONTENT_TYPES.values())
def upload(context, value):
    """A file that is one, where a file is wanted."""
    return value if isinstance(value, bytes) and value else ROW


@pytest.fixture(scope="module")
def contract(furnish, tmp_path_factory):
    with furnish(tmp_path_factory.mktemp("contract")) as house:
        # As if a worker were there all the time, which readiness for jobs asks for.
        house.reconcile()
        house.redis.persist("cwpo:reconciled")
        yield schemathesis.openapi.from_url(f"{house.url}/openapi.json")


def patient(case):
    """The case without a deadline or a revision, which nearly all would rightly fail with."""
    if case.headers is not None:
        case.headers.pop("X-Request-Timeout", None)
        case.headers.pop("X-Model-Revision", None)
    return case


def can_ask(operation, mode):
    """Ask in many ways, if there is one."""

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        patient(case).call_and_validate(checks=CHECKS, timeout=PATIENCE)

    try:
        ask()
    except Unsatisfiable:
        return False
    return True


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_every_call_answers_only_what_it_documents(contract, mode):
    operations = [found.ok() for found in contract.get_all_operations()]
    passed_over = {operation.label for operation in operations if not can_ask(operation, mode)}
    # What takes no argument cannot be asked wrongly.
    without = {"GET /health/live", "GET /metrics"}
    assert passed_over == (without if mode.is_negative else set())


def test_calls_that_follow_from_each_other_answer_only_what_they_document(contract):
    # Nobody works on the jobs, so that none ends, and neither would the stream of its events.
    machine = contract.exclude(path_regex="events$").as_state_machine()
    answered = []

    class Machine(machine):
        def before_call(self, case):
            # The same calls have to be answered alike, however often they are made.
            (patient(case).headers or {}).pop("Idempotency-Key", None)

        def get_call_kwargs(self, case):
            return {"timeout": PATIENCE}

        def validate_response(self, response, case, **_):
            answered.append(case.operation.label)
            case.validate_response(response, checks=CHECKS)

    # Hypothesis minds if the same calls are not answered alike; every answer was looked at, though.
    with suppress(FlakyStrategyDefinition):
        Machine.run(settings=settings(SETTINGS, max_examples=25, stateful_step_count=8))
    # Which calls they are changes with the contract.
    assert answered
