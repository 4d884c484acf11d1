"""What the pages say is there: links, routes' fields and the commands of README."""

import re
from pathlib import Path

import pytest
from octavo_server.fields import WITHOUT_EFFECT
from octavo_server.protocol import ChatRequest, CompletionRequest, StreamOptions
from octavo_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest, StreamOptions])
def test_every_field_is_documented(request_type: type[ChatRequest | CompletionRequest | StreamOptions]) -> None:
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")))
    assert set(request_type.model_fields) | WITHOUT_EFFECT <= named


def test_readme_asks_the_address_that_serve_binds() -> None:
    settings = ServerSettings()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"curl -s http://{settings.host}:{settings.port}/v1/chat/completions" in text
