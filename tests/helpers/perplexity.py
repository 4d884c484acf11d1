"""The perplexity of a text: `python perplexity.py FILE ENGINE_ARGUMENTS` (JSON) prints it."""

import json
import sys
from math import exp
from pathlib import Path

from octavo import LLM, SamplingParams

NUM_TOKENS = 4096
WINDOW = 1024


def perplexity(llm: LLM, text: str, num_tokens: int = NUM_TOKENS, window: int = WINDOW) -> float:
    """exp of the mean negative log-likelihood of the text's first tokens.

    They are read in windows that know nothing of each other, so the first token of each is not counted. Raises
    ValueError for a text that is too short.
    """
    token_ids = llm.get_tokenizer().encode(text)
    if len(token_ids) < num_tokens:
        raise ValueError(f"The text has {len(token_ids)} tokens, but {num_tokens} are asked for.")
    windows = [token_ids[start : start + window] for start in range(0, num_tokens, window)]
    outputs = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    losses: list[float] = []
    for output in outputs:
        assert output.prompt_logprobs is not None, "asked for"
        for token_id, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if entry is not None:  # the first token has none
                losses.append(-entry[token_id].logprob)
    return exp(sum(losses) / len(losses))


if __name__ == "__main__":
    print(perplexity(LLM(**json.loads(sys.argv[2])), Path(sys.argv[1]).read_text(encoding="utf-8")))
