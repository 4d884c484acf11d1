"""The offline engine for comparisons: `python offline_worker.py ENGINE_ARGUMENTS` (JSON), then a job a line on stdin.

A job is {"prompts": [[token id, ...], ...], "max_tokens": N}, computed greedily to its full length; the answer, a line
of JSON on stdout, holds the seconds that it took and the texts.
"""

import json
import sys
import time

from octavo import LLM, SamplingParams


def main() -> None:
    llm = LLM(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": token_ids} for token_ids in job["prompts"]]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "texts": [one.outputs[0].text for one in outputs]}), flush=True)


if __name__ == "__main__":
    main()
