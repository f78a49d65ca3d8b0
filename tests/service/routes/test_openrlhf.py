from cwpo.types import ScoreItem
from cwpo_annotator import Annotator


def reward_of(prompt, response):
    annotator = Annotator.null()
    texts = annotator.encode_texts([ScoreItem(prompt=prompt, response=response)])
    return annotator.score_texts(texts).values.tolist()[0]


def test_each_text_is_scored_as_response_to_its_prompt(service):
    body = {
        "query": ["How are you? Fine.", "Unrelated.", "Hi Ho"],
        "prompts": ["How are you?", "Who?", ""],
        "labels": ["", "", ""],
    }
    answer = service.http.post("/get_reward", json=body).json()
    expected = [
        reward_of("How are you?", " Fine."),
        reward_of("", "Unrelated."),
        reward_of("", "Hi Ho"),
    ]
    assert answer["rewards"] == answer["scores"] == expected
    assert answer["extra_logs"] == {"truncated": [0.0, 0.0, 0.0]}


def test_older_clients_send_no_prompts(service):
    answer = service.http.post("/get_reward", json={"query": ["Fine."]}).json()
    assert answer["rewards"] == [reward_of("", "Fine.")]


def test_a_rollout_is_as_large_as_a_request_of_triplets_may_be(serve, problem):
    with serve(max_triplets=2) as service:
        answer = service.http.post("/get_reward", json={"query": ["x"] * 2})
        assert len(answer.json()["rewards"]) == 2
        answer = service.http.post("/get_reward", json={"query": ["x"] * 3})
        assert answer.status_code == 413
        assert "3 items: a request may have at most 2" in problem(answer)["detail"]


def test_no_reward_is_made_up_for_a_text_that_cannot_be_scored(service, problem):
    body = {"query": ["Yes. No.", "Yes."], "prompts": ["Yes.", "Yes."]}
    answer = service.http.post("/get_reward", json=body)
    assert answer.status_code == 422
    assert problem(answer)["detail"] == "query[1]: response is empty"


def test_prompts_have_to_match_the_texts(service, problem):
    answer = service.http.post("/get_reward", json={"query": ["a", "b"], "prompts": ["a"]})
    assert answer.status_code == 422
    assert "1 prompts for 2 texts" in problem(answer)["detail"]
