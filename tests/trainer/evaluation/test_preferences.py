import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.evaluation.preferences import pair_log_probs
from cwpo_trainer.policy.packed_model import read_packed
from cwpo_trainer.policy.sampling import LoadedPolicy

from ..samples import pairs, write_lines


def labelled(folder):
    """Pairs of different lengths, some of one long prompt."""
    rows = pairs(7)
    long = " ".join(row["prompt"] for row in rows)
    for row in rows[:3]:
        row["prompt"] = long
    return [*read_pairs(write_lines(folder / "pairs.jsonl", rows))]


def one_at_a_time(folder, policy, data):
    """The same by transformers' own model, from all of its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for pair in data:
        for response in (pair.chosen, pair.rejected):
            (text,) = policy.formatter.tokenise([pair.prompt], [response])
            ids = torch.tensor([text.prompt_ids + text.response_ids])
            with torch.no_grad():
                of_all = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(text.prompt_ids)
            found.append(sum(of_all[at - 1, ids[0, at]] for at in range(start, ids.shape[1])))
    return torch.tensor(found).view(-1, 2)


@pytest.fixture(scope="module")
def capped(tiny_tokenizer, tmp_path_factory):
    """A model whose log-probabilities are not what backbone and head make of a text."""
    folder = tmp_path_factory.mktemp("capped")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        final_logit_softcapping=1.0,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "is_packed"), [("tiny_causal", True), ("capped", False)])
def test_log_probabilities_are_those_of_each_response_by_itself(
    family, is_packed, request, tmp_path
):
    folder = request.getfixturevalue(family)
    policy = LoadedPolicy(str(folder), "float32")
    assert (read_packed(copy.deepcopy(policy.model), bfloat16=False) is None) == is_packed
    data = labelled(tmp_path)
    expected = one_at_a_time(folder, policy, data)
    for batch_size in (1, 4, 100):
        found = pair_log_probs(policy, data, batch_size, "log-probabilities")
        assert torch.from_numpy(found) == pytest.approx(expected, rel=1e-5)
