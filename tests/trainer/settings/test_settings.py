from __future__ import annotations

import pytest
from pydantic import ValidationError

from cwpo_trainer.settings.annotator_training import AnnotatorTraining
from cwpo_trainer.settings.evaluation import AnnotatorEvaluation, PolicyEvaluation
from cwpo_trainer.settings.mixins import Lora
from cwpo_trainer.settings.online_alignment import OnlineAlignment
from cwpo_trainer.settings.policy_training import Alignment, FineTuning

ALL = (
    AnnotatorTraining,
    FineTuning,
    Alignment,
    OnlineAlignment,
    AnnotatorEvaluation,
    PolicyEvaluation,
)


@pytest.mark.parametrize("settings", ALL)
def test_every_setting_is_explained_in_whole_phrases(settings):
    for name, field in settings.model_fields.items():
        text = field.description or ""
        assert text.endswith("."), name
        assert text[0].isupper(), name


@pytest.mark.parametrize("settings", [AnnotatorTraining, FineTuning, Alignment])
def test_lora_is_the_same_everywhere(settings):
    for name, field in Lora.model_fields.items():
        assert settings.model_fields[name].description == field.description
        assert settings.model_fields[name].default == field.default


@pytest.mark.parametrize(("name", "value"), [("loss", "dop"), ("weight", "size"), ("los", "dpo")])
def test_a_misspelt_name_or_choice_is_refused(tmp_path, name, value):
    with pytest.raises(ValidationError, match=name):
        Alignment(model="m", data=tmp_path, output=tmp_path / "out", **{name: value})
