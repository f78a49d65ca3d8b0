"""Certificates of an annotator, and the labels that they are of."""

from __future__ import annotations

from collections.abc import Sequence

from cwpo.errors import ConfigError
from cwpo.types import Annotation, Certificate


def certificate_of(
    certificates: Sequence[Certificate], max_error: float, *, void: str | None = None
) -> Certificate:
    """The annotator's certificate of this max_error; of several, the one that is false most seldom.

    Args:
        void: why none holds at present, as in `ModelInfo.certificates_void`.
    Raises: ConfigError that lists those that there are, or says why they do not hold.
    """
    found = [each for each in certificates if each.max_error == max_error]
    if found and void is not None:
        raise ConfigError(f"the annotator's certificates do not hold at present: {void}")
    if found:
        return min(found, key=lambda each: each.delta)
    there = ", ".join(
        f"{each.max_error:g} (delta {each.delta:g}, {each.coverage:.0%} of labels)"
        for each in sorted(certificates, key=lambda each: each.max_error)
    )
    raise ConfigError(
        f"the annotator has no certificate of max_error {max_error:g}: it has "
        f"{there or 'none at all'}; `cwpo evaluate annotator --certify` finds them"
    )


def is_certified(label: Annotation, certificate: Certificate) -> bool:
    """Whether the certificate is of this label. A tie is no label."""
    return label.preferred != "tie" and label.confidence > certificate.threshold


def described(certificate: Certificate) -> str:
    """What a certificate promises, in one sentence."""
    return (
        f"of the labels with a confidence above {certificate.threshold:.4g}, at most "
        f"{100 * certificate.max_error:.4g}% are wrong, with a probability of "
        f"{100 * (1 - certificate.delta):.4g}% ({certificate.coverage:.1%} of the pairs that it "
        f"was measured on; {certificate.errors:,} errors in {certificate.pairs:,})"
    )
