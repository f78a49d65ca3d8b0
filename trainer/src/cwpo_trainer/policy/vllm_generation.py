"""Continues prompts in vLLM: a program for the Python of vLLM's environment, which has no cwpo.

It reads a JSON object from stdin: `arguments` of vLLM's command line; `adapter`, a folder or null;
`sampling`, of all prompts; `prompts`, their token ids; `seeds`, one for each. For each prompt that
is done, it writes a line [place, token ids] to stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def main() -> None:
    """Answer what stdin asks."""
    asked = json.load(sys.stdin)
    # What vLLM prints to stdout goes to its log.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for place, ids in continued(asked):
            print(json.dumps([place, ids]), file=answers, flush=True)


def continued(asked: dict[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """The places of prompts as they are done, with the tokens behind each."""
    # Else modules beside this one would be taken for those of other packages.
    sys.path.pop(0)
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.engine.arg_utils import FlexibleArgumentParser
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(asked["arguments"])
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(arguments))
    adapter = None
    if asked["adapter"] is not None:
        adapter = LoRARequest("policy", 1, asked["adapter"])
    for place, (ids, seed) in enumerate(zip(asked["prompts"], asked["seeds"], strict=True)):
        sampling = SamplingParams(
            **asked["sampling"], seed=seed, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = {"prompt_token_ids": ids}
        engine.add_request(str(place), prompt, sampling, lora_request=adapter)
    while engine.has_unfinished_requests():
        for each in engine.step():
            if each.finished:
                yield int(each.request_id), [*each.outputs[0].token_ids]


if __name__ == "__main__":
    main()
