import json
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from itertools import permutations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cwpo import Annotation, FailedAnnotation, Triplet
from cwpo.types import ModelRef
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.backends.torch.rows.packing import pack_texts
from cwpo_annotator.checkpoint import revisions

TRIPLETS = [
    Triplet(prompt="why cat", response_a="because good", response_b="no"),
    Triplet(id="emoji", prompt="thanks", response_a="🐈 please", response_b="sorry " * 20),
    Triplet(prompt="the word", response_a="same", response_b="same"),
    Triplet(prompt="what", response_a="first", response_b="some people were there " * 5),
]


def scores_of(annotations):
    return np.array([(a.score_a, a.score_b) for a in annotations])


def test_scores_equal_hugging_face_one_at_a_time(tiny_annotator, hugging_face_scores):
    annotator = Annotator.load(tiny_annotator)
    expected = hugging_face_scores(tiny_annotator, annotator.encode(TRIPLETS))
    np.testing.assert_allclose(scores_of(annotator.annotate(TRIPLETS)), expected, atol=1e-5)


def test_order_and_batches_do_not_change_a_score(tiny_annotator):
    together = scores_of(Annotator.load(tiny_annotator).annotate(TRIPLETS))
    alone = scores_of(Annotator.load(tiny_annotator, token_budget=1).annotate(TRIPLETS[::-1]))
    np.testing.assert_allclose(together, alone[::-1], atol=1e-5)


def test_swapping_the_responses_negates_the_margin(tiny_annotator):
    annotator = Annotator.load(tiny_annotator)
    swapped = [
        Triplet(prompt=t.prompt, response_a=t.response_b, response_b=t.response_a) for t in TRIPLETS
    ]
    forth, back = scores_of(annotator.annotate(TRIPLETS)), scores_of(annotator.annotate(swapped))
    np.testing.assert_array_equal(forth[:, 0] - forth[:, 1], back[:, 1] - back[:, 0])


RESPONSES = ["no", "because good", "because good " * 9, "no one was there", "word", "word " * 60]
OPENING = "what is the word that some people were there for? " * 3


@pytest.fixture
def groups():
    """All pairs of several responses to two prompts, of which one continues the other."""
    prompts = [OPENING, f"{OPENING}because good. and why is that?"]
    pairs = [(p, *pair) for p in prompts for pair in permutations(RESPONSES, 2)]
    return [Triplet(prompt=prompt, response_a=a, response_b=b) for prompt, a, b in pairs]


@pytest.mark.parametrize("token_budget", [1024, 120])
def test_responses_to_one_prompt_score_as_by_themselves(
    groups, tiny_annotator, hugging_face_scores, token_budget
):
    annotator = Annotator.load(tiny_annotator, token_budget=token_budget)
    expected = hugging_face_scores(tiny_annotator, annotator.encode(groups))
    together = scores_of(annotator.annotate(groups))
    np.testing.assert_allclose(together, expected, atol=1e-5)
    alone = np.concatenate([scores_of(annotator.annotate([triplet])) for triplet in groups])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    # Whatever pair it stands in, a response has the very same score.
    of_text = defaultdict(set)
    for triplet, scores in zip(groups, together, strict=True):
        of_text[triplet.prompt, triplet.response_a].add(scores[0])
        of_text[triplet.prompt, triplet.response_b].add(scores[1])
    assert len(of_text) == 2 * len(RESPONSES)
    assert all(len(scores) == 1 for scores in of_text.values())


def test_a_prompt_is_read_once_for_all_its_responses(groups, tiny_annotator):
    pairs = Annotator.load(tiny_annotator).encode(groups)
    texts = [ids for pair in pairs for ids in (pair.a, pair.b)]
    (row,) = pack_texts(texts, 4096)
    beginnings = {tuple(ids[:end]) for ids in texts for end in range(1, len(ids) + 1)}
    # Responses may begin alike too, in tokens that are too few to be shared.
    assert len(beginnings) <= len(row.ids) <= len(beginnings) + 100
    assert sum(map(len, texts)) > 10 * len(row.ids)


def test_annotations_are_in_order_with_ids_and_the_label_of_the_higher_score(tiny_annotator):
    annotations = Annotator.load(tiny_annotator).annotate(TRIPLETS)
    assert [a.id for a in annotations] == ["0", "emoji", "2", "3"]
    for annotation in annotations:
        margin = annotation.score_a - annotation.score_b
        assert annotation.preferred == ("tie" if margin == 0 else "a" if margin > 0 else "b")
        assert annotation.confidence == pytest.approx(np.tanh(abs(margin) / 2), abs=1e-6)
    assert annotations[2].preferred == "tie"
    assert annotations[2].confidence == 0


def test_equal_responses_tie_wherever_they_stand_in_a_batch(tiny_annotator):
    same = Triplet(prompt="the word", response_a="same", response_b="same")
    annotator = Annotator.load(tiny_annotator)
    for before in range(9):
        annotation = annotator.annotate([*TRIPLETS[:2] * before, same])[-1]
        assert (annotation.preferred, annotation.confidence) == ("tie", 0)


def test_one_bad_item_leaves_the_others_unharmed(tiny_annotator):
    bad = [
        Triplet(id="empty", prompt="why", response_a=" \n", response_b="good"),
        Triplet(id="long", prompt="why", response_a="cat " * 500, response_b="good"),
        Triplet.model_construct(id="half", prompt="why", response_a="ok", response_b="\ud83d"),
    ]
    annotations = Annotator.load(tiny_annotator).annotate([TRIPLETS[0], *bad, TRIPLETS[1]])
    assert [type(a) for a in annotations] == [
        Annotation,
        FailedAnnotation,
        FailedAnnotation,
        FailedAnnotation,
        Annotation,
    ]
    assert [a.error.code for a in annotations[1:4]] == [
        "empty_response",
        "too_long",
        "invalid_text",
    ]
    assert "response_a" in annotations[1].error.detail


def test_a_non_finite_score_is_an_error_and_never_a_label(tiny_annotator, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_annotator, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    (annotation,) = Annotator.load(folder).annotate(TRIPLETS[:1])
    assert annotation.error.code == "non_finite_score"


def test_bfloat16_keeps_a_float32_head(tiny_annotator):
    exact = scores_of(Annotator.load(tiny_annotator).annotate(TRIPLETS))
    rounded = scores_of(Annotator.load(tiny_annotator, dtype="bfloat16").annotate(TRIPLETS))
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())
    as_bfloat16 = torch.tensor(rounded).to(torch.bfloat16).double().numpy()
    assert (as_bfloat16 != rounded).any()


def test_revision_tells_checkpoints_apart(tiny_annotator, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_annotator, folder)
    same = Annotator.load(folder).model.revision
    card = json.loads((folder / "annotator.json").read_text())
    card["encoding"]["max_length"] = 100
    (folder / "annotator.json").write_text(json.dumps(card))
    assert same == Annotator.load(tiny_annotator).model.revision
    assert Annotator.load(folder).model.revision != same


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", None),
        ("tokenizer_config.json", None),
        ("chat_template.jinja", "{{ messages[0].content }}"),
        ("additional_chat_templates/tools.jinja", "{{ tools }}"),
    ],
)
def test_the_revision_covers_whatever_makes_token_ids(tiny_annotator, tmp_path, name, text):
    folder = tmp_path / "other"
    shutil.copytree(tiny_annotator, folder)
    before = revisions(folder)
    (folder / "README.md").write_text("Nothing that a score depends on.")
    assert revisions(folder) == before
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(path.read_text() + "\n" if text is None else text)
    after = revisions(folder)
    assert after.current != before.current
    assert after.former == before.former


def test_work_of_an_earlier_version_finds_its_annotator(tiny_annotator):
    annotator = Annotator.load(tiny_annotator)
    current, former = revisions(tiny_annotator)
    assert current == annotator.model.revision != former
    assert annotator.has_revision(current)
    assert annotator.has_revision(former)
    assert not annotator.has_revision("0123456789ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "train-annotator"),
        ({"id2label": {"0": "x", "1": "y"}}, "2 outputs"),
    ],
)
def test_a_model_without_one_score_is_refused(tiny_annotator, tmp_path, change, message):
    folder = tmp_path / "other"
    shutil.copytree(tiny_annotator, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        Annotator.load(folder)


def test_pickle_weights_are_refused(tiny_annotator, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_annotator, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        Annotator.load(folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "owner/never-published"])
def test_an_unknown_path_is_one_clear_line(path):
    with pytest.raises(CheckpointError) as caught:
        Annotator.load(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_card_is_refused_with_its_place(tiny_annotator, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_annotator, folder)
    card = json.loads((folder / "annotator.json").read_text())
    card["encoding"]["max_lenght"] = 100
    (folder / "annotator.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"encoding\.max_lenght"):
        Annotator.load(folder)


def test_the_null_annotator_needs_no_torch_and_is_antisymmetric():
    code = """
import sys
from cwpo import Triplet
from cwpo_annotator import Annotator
null = Annotator.null()
one, two, swapped = null.annotate([
    Triplet(prompt="p", response_a="x", response_b="y"),
    Triplet(prompt="q", response_a="x", response_b="y"),
    Triplet(prompt="p", response_a="y", response_b="x"),
])
assert one.score_a == swapped.score_b and one.score_b == swapped.score_a
assert one.score_a != two.score_a and abs(one.score_a) <= 4
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_long_inputs_are_tokenised_while_the_model_works():
    chunks = threading.Semaphore(0)

    class Encoder(NullEncoder):
        def encode_pairs(self, triplets, truncation):
            chunks.release()
            return super().encode_pairs(triplets, truncation)

    class Backend(NullBackend):
        waits_for = 2

        def score_pairs(self, pairs):
            # The first scores come only once the second chunk is being tokenised.
            while self.waits_for:
                assert chunks.acquire(timeout=120)
                self.waits_for -= 1
            return super().score_pairs(pairs)

    annotator = Annotator(Encoder(), Backend(), ModelRef(name="test", revision="1"))
    triplets = [
        Triplet(prompt="q", response_a=str(n), response_b="" if n % 1000 == 7 else f"not {n}")
        for n in range(10_000)
    ]
    annotations = annotator.annotate(triplets)
    assert [a.id for a in annotations] == [str(n) for n in range(10_000)]
    failed = [int(a.id) for a in annotations if isinstance(a, FailedAnnotation)]
    assert failed == list(range(7, 10_000, 1000))
    null = Annotator.null()
    for n in (0, 1023, 1024, 9999):
        (alone,) = null.annotate([triplets[n]])
        assert annotations[n] == alone.model_copy(update={"id": str(n)})


@pytest.mark.slow
def test_the_threads_are_those_asked_for_or_no_more_than_there_were(tiny_annotator):
    code = """
import sys, torch
from cwpo_annotator import Annotator
torch.set_num_threads(3)
Annotator.load(sys.argv[1], device="cpu", threads=2)
print(torch.get_num_threads())
torch.set_num_threads(1)
Annotator.load(sys.argv[1], device="cpu")
print(torch.get_num_threads())
torch.set_num_threads(4096)
Annotator.load(sys.argv[1], device="cpu")
print(torch.get_num_threads() <= len(__import__("os").sched_getaffinity(0)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", code, str(tiny_annotator)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.split() == ["2", "1", "True"], result.stderr
