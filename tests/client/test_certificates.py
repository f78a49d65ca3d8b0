from __future__ import annotations

import pytest

from cwpo.certificates import certificate_of, is_certified
from cwpo.errors import ConfigError
from cwpo.types import Annotation, Certificate


def certificate(max_error, delta=0.05, threshold=0.5):
    return Certificate(
        max_error=max_error, delta=delta, threshold=threshold, coverage=0.3, pairs=300, errors=12
    )


def label(preferred, confidence):
    return Annotation(id="0", preferred=preferred, confidence=confidence, score_a=1, score_b=0)


def test_the_certificate_is_found_by_its_promise():
    several = [certificate(0.1), certificate(0.2), certificate(0.1, delta=0.01)]
    assert certificate_of(several, 0.1).delta == 0.01
    assert certificate_of(several, 0.2).max_error == 0.2


def test_without_one_those_that_exist_are_listed():
    with pytest.raises(ConfigError, match=r"max_error 0\.05: it has 0\.1 \(delta 0\.05, 30% of"):
        certificate_of([certificate(0.1)], 0.05)
    with pytest.raises(ConfigError, match="it has none at all; `cwpo evaluate annotator"):
        certificate_of([], 0.05)


def test_while_it_does_not_hold_it_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="do not hold at present: drifted far"):
        certificate_of([certificate(0.1)], 0.1, void="drifted far")
    # That there is none is the better answer.
    with pytest.raises(ConfigError, match="it has none at all"):
        certificate_of([], 0.1, void="drifted far")


def test_labels_above_the_threshold_are_certified():
    given = certificate(0.1, threshold=0.5)
    assert is_certified(label("b", 0.51), given)
    assert not is_certified(label("b", 0.5), given)
    assert not is_certified(label("tie", 0.0), certificate(0.1, threshold=0.0))
