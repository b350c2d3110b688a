"""Section 2, download: a loopback server that speaks Hugging Face's API, and lies in every way."""

import gzip
import hashlib
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import copy_model
from helpers import golden, greedy_params, token_ids

from nanopaged import LLM, download

REPO, SHA = "org/some-model", "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        hub.requests.append((self.path, dict(self.headers)))
        name = self.path.rsplit("/", 1)[1]
        status = next((s for part, s in hub.statuses.items() if part in self.path), None)
        if status:
            self.send_error(status)
        elif self.path == f"/api/models/{REPO}/revision/main?blobs=true":
            self.answer(200, hub.listing if hub.listing is not None else hub.true_listing())
        elif self.path == f"/{REPO}/resolve/{SHA}/{name}" and hub.redirect_to:
            self.send_response(302)
            self.send_header("Location", f"{hub.redirect_to}/cdn/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path in (f"/{REPO}/resolve/{SHA}/{name}", f"/cdn/{name}"):
            self.send_file(name)
        else:
            self.send_error(404)

    def send_file(self, name):
        hub, data = self.server, self.server.served.get(name, self.server.files[name])
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        start = int(start) if hub.honours_range else 0
        cuts = hub.cuts.get(name)
        self.answer(206 if "Range" in self.headers and hub.honours_range else 200, data[start:],
                    cuts.pop(0) if cuts else None)

    def answer(self, status, body, cut_after=None):
        """Send it, or, though all is promised, only the first `cut_after` bytes."""
        self.send_response(status)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut_after])
        self.close_connection = True

    def log_message(self, *args):
        pass


class Hub(ThreadingHTTPServer):
    """One repository. Its attributes are the ways in which it misbehaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []         # (path, headers) of each
        self.files = {}            # {name: bytes}, as they should be
        self.listing = None        # bytes of the listing, where it is not the true one
        self.served = {}           # {name: bytes}, where they are not those of `files`
        self.cuts = {}             # {name: after how many bytes each answer is cut off, in turn}
        self.statuses = {}         # {part of a path: HTTP status}
        self.honours_range = True
        self.redirect_to = ""      # the content delivery network, if there is one
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, host="127.0.0.1"):
        return f"http://{host}:{self.server_port}"

    def true_listing(self, **changes):
        """As the hub answers: large files have a SHA-256, small ones git's SHA-1."""
        siblings = []
        for name, data in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": git}
            if name.endswith((".safetensors", ".bin")):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry | changes.get(name.split(".")[0], {}))
        return json.dumps({"id": REPO, "sha": SHA, "siblings": siblings}).encode()

    def asked(self, name):
        """The Range headers with which a file was asked for, in their order."""
        path = f"/{REPO}/resolve/{SHA}/{name}"
        return [headers.get("Range") for asked, headers in self.requests if asked == path]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with 3 MB of weights; the cache is tmp_path / "cache"."""
    hub = Hub()
    hub.files = {"config.json": b'{"a": 1}\n', WEIGHTS: random.Random(0).randbytes(3_000_000)}
    monkeypatch.setenv("HF_ENDPOINT", hub.url())
    monkeypatch.setenv("NANOPAGED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)       # between tries
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.shutdown()
    hub.server_close()


def refusal(error=OSError):
    """The one line with which download() fails; it leaves no file that looks whole."""
    with pytest.raises(error) as caught:
        download(REPO)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def files_in(folder):
    """{path: bytes} of all files under a folder but the receipt and unfinished parts."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".part" and path.name != "downloaded.json"}


# ---- good repositories --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2_prefixed", "llama_linear_sharded"])
@pytest.mark.parametrize("redirect", [False, True])
def test_a_repository_is_downloaded_and_runs(name, redirect, hub, tmp_path, capsys):
    """A shard or a small file left out; all else fetched too; progress on a stderr no one reads."""
    folder = copy_model(name, tmp_path / "made", tokenizer="llama2")
    needed = {path.name: path.read_bytes() for path in folder.iterdir()
              if not path.name.startswith("golden")}
    hub.files = needed | {"README.md": b"# model", "pytorch_model.bin": b"pickle", "LICENSE": b"",
                          "original/consolidated.00.pth": b"pickle", "onnx/model.onnx": b"onnx",
                          "tokenizer.json.bak": b"", "model.py": b"", ".gitattributes": b""}
    hub.redirect_to = "" if not redirect else hub.url()
    prompts, texts = golden(name)
    llm = LLM(REPO, num_blocks=32)
    assert [token_ids(out) for out in llm.generate(prompts, greedy_params())] == texts
    assert files_in(tmp_path / "cache" / "org--some-model") == needed
    assert all(len(hub.asked(name)) == (name in needed) for name in hub.files)
    assert capsys.readouterr() == ("", "")


def test_second_use_asks_the_network_nothing(hub):
    """A model that needs the network each time; or one used while it is only half there."""
    folder = download(REPO)
    hub.requests.clear()
    hub.statuses[""] = 500
    assert download(REPO) == folder and not hub.requests
    assert files_in(Path(folder)) == hub.files


def test_a_name_without_an_organisation(hub):
    """The oldest models, such as gpt2, have none."""
    hub.statuses["/api/models/gpt2/revision/main"] = 404
    with pytest.raises(OSError, match="404"):
        download("gpt2")
    with pytest.raises(OSError, match="404"):
        LLM("gpt2")


def test_a_local_folder_comes_before_a_repository(hub, tmp_path):
    """PEERS bug 16: a path taken for a model id, or a model id for a path."""
    copy_model("mistral", tmp_path / "org" / "some-model")
    LLM(REPO, skip_tokenizer_init=True, num_blocks=4)
    assert not hub.requests


def test_an_empty_file(hub):
    """Size 0 divides by zero in a progress bar, or is never created."""
    hub.files["merges.txt"] = b""
    assert files_in(Path(download(REPO))) == hub.files


# ---- cut connections ----------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(hub):
    """A download of hours that starts again from nothing, or glues the parts wrongly together."""
    hub.cuts[WEIGHTS] = [1_500_000, 700_000]
    assert files_in(Path(download(REPO))) == hub.files
    starts = [int(header[6:-1]) for header in hub.asked(WEIGHTS)]
    assert len(starts) == 3 and starts[0] == 0
    for start, previous, cut in zip(starts[1:], starts, [1_500_000, 700_000], strict=False):
        assert previous + cut - 100_000 <= start <= previous + cut, "what came is kept"


def test_a_connection_that_is_always_cut_ends_and_is_resumed_by_the_next_call(hub, tmp_path):
    """An endless loop; or half a file under the final name, which the next call takes for whole."""
    hub.cuts[WEIGHTS] = [1_200_000] + [0] * 20
    message = refusal()
    assert WEIGHTS in message and "again" in message
    assert WEIGHTS not in files_in(tmp_path)
    hub.cuts, before = {}, len(hub.asked(WEIGHTS))
    assert files_in(Path(download(REPO))) == hub.files
    [header] = hub.asked(WEIGHTS)[before:]
    assert int(header[6:-1]) >= 1_000_000, "the second call starts where the first one ended"


def test_ctrl_c_leaves_no_file_that_looks_whole(hub, tmp_path, monkeypatch):
    """Interrupted, and the next call runs on half the weights."""
    def interrupt(seconds):
        raise KeyboardInterrupt

    hub.cuts[WEIGHTS] = [2_000_000]
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download(REPO)
    assert WEIGHTS not in files_in(tmp_path)
    assert files_in(Path(download(REPO))) == hub.files


def test_a_server_that_ignores_range(hub):
    """It answers 200 with the whole file: appended to what is there, the file is too long."""
    hub.honours_range = False
    hub.cuts[WEIGHTS] = [2_000_000, 1_000_000]
    assert files_in(Path(download(REPO))) == hub.files


def test_a_new_version_is_not_glued_to_a_part_of_the_old_one(hub):
    """The repository moves on between two calls."""
    hub.cuts[WEIGHTS] = [2_000_000] + [0] * 20
    refusal()
    hub.files[WEIGHTS] = random.Random(1).randbytes(3_000_000)
    hub.cuts = {}
    assert files_in(Path(download(REPO))) == hub.files


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("spoil", [
    lambda data: data + b"x", lambda data: data[:-1], lambda data: b"",
    lambda data: data[:-1] + bytes([data[-1] ^ 1])], ids=["too long", "short", "empty", "one bit"])
def test_a_damaged_file_is_never_used(name, spoil, hub, tmp_path):
    """Size or checksum not looked at (SHA-256 of large files, git's SHA-1 of small ones); or a
    damaged part that stays, so that no later call can succeed."""
    hub.served[name] = spoil(hub.files[name])
    assert name in refusal()
    assert name not in files_in(tmp_path)
    hub.served = {}
    assert files_in(Path(download(REPO))) == hub.files


@pytest.mark.parametrize("size", [2_999_999, 3_000_001])
def test_a_lie_about_the_size_is_noticed(size, hub, tmp_path):
    """The listing says another size than the file has."""
    hub.listing = hub.true_listing(model={"size": size})
    assert WEIGHTS in refusal()
    assert WEIGHTS not in files_in(tmp_path)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
@pytest.mark.parametrize("part", ["/api/", WEIGHTS])
def test_an_http_error_is_one_line(status, part, hub, tmp_path):
    """A page of HTML stored as weights; a traceback; or a message that says not what to do."""
    hub.statuses[part] = status
    message = refusal()
    assert str(status) in message and hub.url() in message
    assert "HF_TOKEN" in message or status not in (401, 403)
    assert WEIGHTS not in files_in(tmp_path)


def test_offline_is_one_line(hub, monkeypatch):
    """Three screens of urllib3, on a train."""
    hub.shutdown()
    hub.server_close()
    message = refusal()
    assert "offline" in message and hub.url() in message


@pytest.mark.parametrize("endpoint", ["not a url", "ftp://127.0.0.1", "127.0.0.1:1"])
def test_a_wrong_endpoint_is_one_line(endpoint, hub, monkeypatch):
    """HF_ENDPOINT without https:// is a traceback of requests."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert endpoint in refusal()


def test_an_empty_endpoint_is_the_default(monkeypatch, tmp_path):
    """HF_ENDPOINT= in a script's environment means unset, as it does for the other two."""
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setenv("NANOPAGED_CACHE", str(tmp_path))
    for key in ("HTTPS_PROXY", "NO_PROXY"):        # by way of a port where nobody listens
        for name in (key, key.lower()):
            monkeypatch.setenv(name, "http://127.0.0.1:9" if key == "HTTPS_PROXY" else "")
    with pytest.raises(OSError, match="https://huggingface.co/api/models/org/some-model"):
        download(REPO)


@pytest.mark.parametrize("listing", [
    b"", b"<html>busy</html>", b"[]", b"{}", b"null", b'{"siblings": 3}', b'{"siblings": [{}]}',
    b'{"sha": "x", "siblings": [{"rfilename": 7}]}', b'{"siblings": null, "sha": "x"}',
    b'{"sha": "x", "siblings": [{"rfilename": "model.safetensors"}]}',
    b'{"siblings": [{"rfilename": "model.safetensors", "size": 3, "blobId": "0"}]}',
    b'{"sha": "x", "siblings": [{"rfilename": "model.safetensors", "size": "3", "blobId": "0"}]}',
    b'{"sha": "x", "siblings": [{"rfilename": "model.safetensors", "size": 3, "blobId": null}]}'])
def test_a_malformed_listing_is_one_line(listing, hub):
    """A captive portal or a proxy answers for the hub: its address must be in the message."""
    hub.listing = listing
    assert f"{hub.url()}/api/models/{REPO}" in refusal((OSError, ValueError))


def test_pickles_are_not_downloaded(hub, tmp_path):
    """Gigabytes of a format that is then refused; or one that runs code."""
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "model.pth": b"pickle"}
    message = refusal((OSError, ValueError))
    assert "safetensors" in message and "pickle" in message
    assert not files_in(tmp_path) and len(hub.requests) == 1, "only the listing was needed"


@pytest.mark.parametrize("name", [
    "../model.safetensors", "/model.safetensors", "a/model.safetensors", "..", "",
    "model/../../x.safetensors", "model-..\\x.safetensors", "config.json/../../x.json",
    "model-\n.safetensors", "C:model.safetensors", "model-%2e%2e%2fx.safetensors"])
def test_file_names_that_leave_the_folder_are_not_fetched(name, hub, tmp_path):
    """A listing that writes where it likes on the user's disk."""
    hub.files = dict(hub.files) | {name: b"evil"}
    download(REPO)
    del hub.files[name]
    assert files_in(tmp_path) == {f"cache/org--some-model/{n}": d for n, d in hub.files.items()}


# ---- tokens -------------------------------------------------------------------------------------


def tokens_sent(hub):
    return {headers.get("Authorization") for _, headers in hub.requests}


def test_the_token_is_sent_where_it_is_set(hub, monkeypatch):
    """A private model that cannot be loaded; or a header sent empty."""
    download(REPO)
    assert len(hub.requests) == 3 and tokens_sent(hub) == {None}
    hub.requests.clear()
    monkeypatch.setenv("NANOPAGED_CACHE", "another")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(REPO)
    assert len(hub.requests) == 3 and tokens_sent(hub) == {"Bearer hf_secret"}


def test_an_empty_token_is_none(hub, monkeypatch):
    """HF_TOKEN= in a script's environment: "Bearer " is answered with 401."""
    monkeypatch.setenv("HF_TOKEN", "")
    download(REPO)
    assert tokens_sent(hub) == {None}


def test_the_token_does_not_follow_a_redirect_to_another_host(hub, monkeypatch):
    """The hub redirects to a delivery network, which must not learn the user's token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect_to = hub.url("localhost")
    hub.cuts[WEIGHTS] = [2_000_000]
    assert files_in(Path(download(REPO))) == hub.files
    for path, headers in hub.requests:
        at_cdn = path.startswith("/cdn/")
        assert headers.get("Authorization") == (None if at_cdn else "Bearer hf_secret")
        assert at_cdn == headers["Host"].startswith("localhost")
