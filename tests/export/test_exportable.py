"""What goes to the hub, by the real client and a server of this process, which keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import open_clip
import pytest

from lightning_itm import OpenCLIPDualEncoder
from lightning_itm.export import Exportable
from tests.helpers.open_clip_models import CONFIGS, register, write_hugging_face
from tests.helpers.tiny import Tiny


class Note(Exportable):
    """The smallest module that can be written."""

    def save_pretrained(self, folder):
        Path(folder, "note.txt").write_text("hi")


class Hub(BaseHTTPRequestHandler):
    """Answers the five requests of an upload. ``files`` is what has been committed."""

    def do_HEAD(self):
        name = self.path.rpartition("/")[2]
        if name in self.server.files:
            self.send_response(200)
            self.send_header("ETag", "1")
            self.send_header("X-Repo-Commit", "1")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        address = f"http://{self.headers['Host']}/me/note"
        answer = {"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1", "errors": [], "warnings": []}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(lines[0])["files"]]
            answer["files"] = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        if "/commit/" in self.path:
            values = [line["value"] for line in map(json.loads, lines) if line["key"] == "file"]
            self.server.files |= {value["path"]: base64.b64decode(value["content"]) for value in values}
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(lines[0]))
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_module_is_uploaded_with_a_card(hub):
    assert Note().push_to_hub("me/note", private=True, token="hf_x").endswith("/me/note/commit/1")
    assert hub.created[0]["name"] == "note"
    assert hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private", hub.created[0].get("visibility")) in (True, "private")
    assert hub.files["note.txt"] == b"hi"
    assert hub.files["README.md"].startswith(b"---\nlibrary_name: lightning_itm\n---\n\n# note\n")


def test_a_card_that_is_there_is_kept(hub):
    hub.files["README.md"] = b"mine"
    Note().push_to_hub("me/note", token="hf_x")
    assert hub.files == {"README.md": b"mine", "note.txt": b"hi"}


def test_a_model_that_cannot_be_written_makes_no_repository(hub):
    with pytest.raises(NotImplementedError, match="a format of its own, got Tiny"):
        Tiny().push_to_hub("me/note", token="hf_x")
    assert hub.created == []


def test_a_repository_without_an_owner():
    with pytest.raises(ValueError, match="`repo_id` to be 'owner/name', got 'note'"):
        Note().push_to_hub("note")


def test_a_model_of_open_clip_finds_its_tokenizer_in_the_repository(tmp_path):
    config = write_hugging_face(tmp_path / "tower")
    config["text_cfg"] = {**CONFIGS["tiny-vit"]["text_cfg"], "hf_tokenizer_name": str(tmp_path / "tower")}
    register({"tiny-own-words": config}, tmp_path)
    model = OpenCLIPDualEncoder("tiny-own-words")
    model.save_for_hub(tmp_path / "out", "me/clip-recipes")
    written = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert written["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/clip-recipes"
    assert model.hparams["config"]["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == str(tmp_path / "tower")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'create_model_and_transforms("hf-hub:me/clip-recipes")' in card
    assert "library_name: open_clip\n" in card
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert tokenizer(["a red cat"]).tolist() == model.transforms["tokenizer"](["a red cat"]).tolist()
