"""A server over an engine without a model: `python serve_fake.py TOKENIZER_DIRECTORY FACTORY [SETTINGS]` (JSON)."""

import gc
import json
import sys
from pathlib import Path

import uvloop
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.text.tokenizer import Tokenizer
from octavo_server.serve import serve
from octavo_server.settings import ServerSettings


def main() -> int:
    directory, factory, *settings = sys.argv[1:]
    engine = AsyncEngine(
        EngineConfig(),
        factory=factory if ":" in factory else f"fake_engine:{factory}",
        tokenizer=Tokenizer.from_files(Path(directory)),
        progress=lambda phase: print(phase, file=sys.stderr, flush=True),
    )
    given = json.loads(settings[0]) if settings else {}
    try:
        status = uvloop.run(serve(engine, ServerSettings(**{"port": 0, **given})))
        print(f"{gc.get_freeze_count()} objects are never looked at for garbage", file=sys.stderr)
        return status
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
