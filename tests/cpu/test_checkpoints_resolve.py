"""From a model's name to its path, and from the path to the reader that claims it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.checkpoints.interface import CheckpointReader, TensorInfo
from octavo.checkpoints.opening import open_checkpoint
from octavo.checkpoints.resolve import resolve_model
from octavo.errors import CheckpointError


class AnyFile:
    """A reader of files that end in .any."""

    def __init__(self, path: Path, options: object = None) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}

    @staticmethod
    def claims(path: Path) -> bool:
        return path.suffix == ".any"

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}

    def read(self, name: str) -> torch.Tensor:
        raise CheckpointError(name)

    def tokenizer_files(self) -> Mapping[str, bytes]:
        return {}

    def close(self) -> None:
        pass


class AnyFileToo(AnyFile):
    """Another one."""


def _no_readers() -> Sequence[type[CheckpointReader]]:
    raise AssertionError("readers are for the default model only")


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model(str(tmp_path), readers=_no_readers) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name", readers=_no_readers) == Path("org/name")  # before the hub is asked
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org", readers=_no_readers) == tmp_path / "org"


@pytest.mark.parametrize("model", ["/no/such/dir", "nowhere", "a/b/c", "../x", "org/", "org/na me"])
def test_what_is_neither_path_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or directory, and no hub id"):
        resolve_model(model, readers=_no_readers)


def test_hub_ids_are_fetched_without_pickle_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **kwargs: Any) -> str:
        asked.update(kwargs, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = resolve_model("org/name", readers=_no_readers, download_dir=str(tmp_path), revision="v1", progress=False)
    assert found == tmp_path
    assert (asked["model"], asked["revision"], asked["cache_dir"]) == ("org/name", "v1", str(tmp_path / "hub"))
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not [p for p in asked["allow_patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]
    bar = asked["tqdm_class"](range(3))
    assert bar.disable


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: str, **kwargs: Any) -> str:
        raise ConnectionError("Name or service not known\nlong traceback")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("org/name", readers=_no_readers, revision="v1")
    message = str(caught.value)
    assert "'org/name'" in message
    assert "at revision v1: Name or service not known. Check the name and the network" in message
    assert "traceback" not in message


def test_the_one_reader_that_claims_opens(tmp_path: Path) -> None:
    from octavo.checkpoints.safetensors_reader import SafetensorsReader

    path = tmp_path / "x.any"
    path.touch()
    reader = open_checkpoint(path, [SafetensorsReader, AnyFile])
    assert isinstance(reader, AnyFile)
    assert reader.path == path


def test_several_claims_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.any").touch()
    with pytest.raises(CheckpointError, match=r"several checkpoint readers \(AnyFile, AnyFileToo\)"):
        open_checkpoint(tmp_path / "x.any", [AnyFile, AnyFileToo])


def test_no_claim_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at"):
        open_checkpoint(tmp_path / "missing", [AnyFile])
    with pytest.raises(CheckpointError, match=r"readers: AnyFile\)\. Give a directory with config\.json"):
        open_checkpoint(tmp_path, [AnyFile])
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"Name the file inside it, such as .*m\.gguf"):
        open_checkpoint(tmp_path, [AnyFile])
