"""POST /tokenize and /detokenize: the served model's tokens of a text or conversation, and the text of tokens."""

import asyncio
from typing import Any

from octavo.errors import RequestError

from octavo_server.jobs import Api
from octavo_server.prompts import chat_prompt
from octavo_server.protocol import DetokenizeRequest, TokenizeRequest


async def tokenize(api: Api, body: TokenizeRequest) -> dict[str, Any]:
    """Answer /tokenize. Raises RequestError for a text that cannot fit the context."""
    engine = api.engine
    if body.messages is None:
        tokens = await engine.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    else:
        tokens = await chat_prompt(
            engine,
            body.messages,
            body,
            template=api.chat_template,
            add_special_tokens=bool(body.add_special_tokens),
            defaults=api.settings.default_chat_template_kwargs,
        )
    return {
        "count": len(tokens),
        "max_model_len": engine.info.max_model_len,
        "tokens": tokens,
        "token_strs": [engine.tokenizer.token_text(i) for i in tokens] if body.return_token_strs else None,
    }


async def detokenize(api: Api, body: DetokenizeRequest) -> dict[str, Any]:
    """Answer /detokenize. Raises RequestError for an id outside the vocabulary."""
    size = api.engine.info.vocab_size
    bad = next((i for i in body.tokens if i >= size), None)
    if bad is not None:
        raise RequestError(f"tokens holds token id {bad}, but ids are from 0 to {size - 1}.", "tokens")
    text = await asyncio.to_thread(api.engine.tokenizer.decode, body.tokens, False)
    return {"prompt": text}
