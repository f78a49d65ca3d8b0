"""Reward models from elsewhere, scored as the cards of their kind say, by transformers alone."""

import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Tokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from cwpo import Message, Triplet
from cwpo.types import ItemError, ScoreItem
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.checkpoint import Card, write_card
from cwpo_annotator.encoding import transcript
from cwpo_annotator.encoding.encoder import Encoder

POST = "why do people make bread at home?\nIs it the flour?"
RESPONSES = ("It is cheap, and A good smell.", "no idea", "because they\nlike it " * 5)
PIECES = [f"▁{word}" for word in ("A", "B", "the", "it", "POST", "RESPONSE", "bread", "like")]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def unigram(*special):
    """A vocabulary of pieces, and of all letters in case none fits."""
    letters = [chr(code) for code in range(33, 127)]
    return [
        *((token, 0.0) for token in special),
        ("▁", -6.0),
        *((piece, -2.0) for piece in PIECES),
        *((letter, -8.0) for letter in letters),
    ]


@pytest.fixture(scope="module")
def skywork(tiny_tokenizer, tmp_path_factory):
    """A decoder whose chat template opens with BOS, and goes on behind the end of a turn."""
    folder = tmp_path_factory.mktemp("skywork")
    tiny_tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.chat_template = "<|system|>", TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    """As OpenAssistant/reward-model-deberta-v3-large-v2, which has no token types."""
    folder = tmp_path_factory.mktemp("deberta")
    vocabulary = unigram("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    tokenizer = DebertaV2Tokenizer(vocab=vocabulary, model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def steamshp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steamshp")
    tokenizer = T5Tokenizer(
        vocab=unigram("<pad>", "</s>", "<unk>"), extra_ids=0, model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def scores(folder, prompt, responses=RESPONSES):
    annotator = Annotator.load(folder, dtype="float32", device="cpu")
    items = [ScoreItem(prompt=prompt, response=response) for response in responses]
    found = annotator.score_texts(annotator.encode_texts(items)).values
    assert np.std(found) > 1e-3
    first, second = responses[:2]
    (label,) = annotator.annotate([Triplet(prompt=prompt, response_a=first, response_b=second)])
    np.testing.assert_allclose((label.score_a, label.score_b), found[:2], atol=2e-4)
    return found


@torch.inference_mode()
def by_template(folder, messages, responses=RESPONSES):
    """As the cards of Skywork-Reward-V2 say."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for response in responses:
        turns = [*messages, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        found.append(model(**ids).logits[0][0].item())
    return found


def test_a_text_prompt_is_the_user_message_of_the_template(skywork):
    expected = by_template(skywork, [{"role": "user", "content": POST}])
    np.testing.assert_allclose(scores(skywork, POST), expected, atol=2e-4)
    chat = [Message(role="user", content=POST)]
    np.testing.assert_allclose(scores(skywork, chat), expected, atol=2e-4)


def test_a_transcript_becomes_messages(skywork):
    prompt = "be kind\n\nHuman: why cat\n\nAssistant: because\n\nHuman: no\n\nno?\n\nAssistant:"
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "why cat"},
        {"role": "assistant", "content": "because"},
        {"role": "user", "content": "no\n\nno?"},
    ]
    spaced = [f" {response}" for response in RESPONSES]
    expected = by_template(skywork, messages, [response.strip() for response in spaced])
    np.testing.assert_allclose(scores(skywork, prompt, spaced), expected, atol=2e-4)


def test_transcripts_are_read_as_they_are_written():
    messages = [
        Message(role="system", content="be kind"),
        Message(role="user", content="why"),
        Message(role="assistant", content=""),
        Message(role="user", content="say Human: why"),
    ]
    assert transcript.read(transcript.write(messages)) == messages
    assert transcript.read("Human: why\n\nAssistant:") == messages[1:2]


@torch.inference_mode()
def test_deberta_reads_prompt_and_response_as_a_pair(deberta):
    model = AutoModelForSequenceClassification.from_pretrained(deberta).eval()
    tokenizer = AutoTokenizer.from_pretrained(deberta)
    expected = [
        model(**tokenizer(POST, response, return_tensors="pt")).logits[0, 0].item()
        for response in RESPONSES
    ]
    np.testing.assert_allclose(scores(deberta, POST), expected, atol=2e-4)
    chat = [Message(role="user", content=POST)]
    np.testing.assert_allclose(scores(deberta, chat), expected, atol=2e-4)


@torch.inference_mode()
def test_steamshp_gives_the_log_odds_of_a_against_an_empty_response(steamshp):
    model = T5ForConditionalGeneration.from_pretrained(steamshp).eval()
    tokenizer = T5Tokenizer.from_pretrained(steamshp)
    (a,) = tokenizer("A", add_special_tokens=False)["input_ids"]
    expected = []
    for response in RESPONSES:
        # Its card wants texts without line breaks, and takes the probability of A.
        text = (
            f"POST: {POST} \n\n RESPONSE A: {response}\n\n RESPONSE B: .\n\n "
            "Which response is better? RESPONSE"
        ).replace("\n", " ")
        ids = tokenizer([text], return_tensors="pt").input_ids
        outputs = model.generate(
            ids, return_dict_in_generate=True, output_scores=True, max_new_tokens=1
        )
        expected.append(outputs.scores[0].double().softmax(dim=1)[0, a])
    np.testing.assert_allclose(scores(steamshp, POST), torch.stack(expected).logit(), atol=2e-4)


def test_where_a_text_is_too_long_only_the_prompt_is_cut(deberta, steamshp):
    for folder, start, end in (
        (deberta, ("[CLS]",), ("no", "idea", "[SEP]")),
        (steamshp, ("POST", ":"), ("RESPONSE", "</s>")),
    ):
        encoder = Encoder.load(folder)
        item = ScoreItem(prompt=f"first {'flour ' * 400} last", response="no idea")
        (error,) = encoder.encode_texts([item])
        assert isinstance(error, ItemError)
        (text,) = encoder.encode_texts([item], "prompt_left")
        assert len(text.ids) == encoder.max_length == 512
        decoded = encoder.tokenizer.decode(text.ids)
        assert decoded.startswith("".join(start)), decoded[:20]
        assert "first" not in decoded
        assert "last" in decoded
        assert decoded.replace(" ", "").endswith("".join(end))
        huge = ScoreItem(prompt="x" * 1_000_000 + " last", response="no idea")
        (text,) = encoder.encode_texts([huge], "prompt_left")
        assert encoder.tokenizer.decode(text.ids).startswith("".join(start))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("skywork", "chat template"),
        ("deberta", "first and the second text"),
        ("steamshp", "RESPONSE B: ."),
    ],
)
def test_how_a_model_is_read_is_said_and_can_be_set(name, words, request, tmp_path, caplog):
    folder = request.getfixturevalue(name)
    with caplog.at_level(logging.WARNING, "cwpo_annotator"):
        encoder = Encoder.load(folder)
    assert words in caplog.text
    assert words in encoder.reads
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    longer = encoder.spec.model_copy(update={"max_length": 500})
    write_card(copy, Card(encoding=longer))
    assert scores(copy, POST).tolist() == scores(folder, POST).tolist()


def test_an_encoder_decoder_without_its_answer_is_refused(steamshp, tmp_path):
    copy = tmp_path / "copy"
    T5ForConditionalGeneration.from_pretrained(steamshp).save_pretrained(copy)
    T5Tokenizer(extra_ids=20, model_max_length=512).save_pretrained(copy)
    with pytest.raises(CheckpointError, match="no single token for A"):
        Annotator.load(copy)
