"""A hub that does not answer is asked once, not for minutes."""

from __future__ import annotations

import socket
import threading

import pytest
from huggingface_hub import constants, file_download

from ec2face_core.backbone import load_backbone
from ec2face_core.config import BackboneConfig
from ec2face_core.io import hub
from ec2face_core.io.hub import HubError, answering_hub
from ec2face_core.perception import ClipScorer

REPO = "somebody/flux"


@pytest.fixture
def calls() -> list[tuple[socket.socket, str]]:
    """The connections that the silent hub has accepted, and what they ask for."""
    return []


@pytest.fixture
def silent_hub(monkeypatch, tmp_path, calls):
    """A server that accepts connections and never says a word; an empty cache."""
    server = socket.create_server(("127.0.0.1", 0), backlog=50)

    def listen() -> None:
        try:
            while True:
                connection = server.accept()[0]
                calls.append((connection, connection.recv(1000).decode()))
        except OSError:  # closed
            return

    threading.Thread(target=listen, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    yield tmp_path
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.mark.parametrize(
    "open_weights",
    [
        lambda: load_backbone(BackboneConfig(path=REPO), ("vae",)),
        lambda: ClipScorer(f"hf-hub:{REPO}"),
        lambda: ClipScorer("ViT-B-32/openai"),
    ],
    ids=["backbone", "CLIP of the hub", "CLIP by its tag"],
)
def test_a_silent_hub_is_asked_once(silent_hub, calls, open_weights):
    with pytest.raises(HubError, match=r"does not answer within .*hf download .*--local-dir"):
        open_weights()
    about_models = [text for _, text in calls if text.startswith("GET /api/models")]
    assert len(about_models) == 1


def test_a_downloaded_copy_serves_without_the_hub(silent_hub):
    snapshot = silent_hub / "models--somebody--flux" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    refs = silent_hub / "models--somebody--flux" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    with answering_hub(REPO, "model_index.json"):
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    with pytest.raises(HubError), answering_hub(REPO, "another.json"):
        pass


def test_who_is_offline_by_choice_is_not_asked(silent_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with answering_hub(REPO):
        assert constants.is_offline_mode()
    assert constants.is_offline_mode()
