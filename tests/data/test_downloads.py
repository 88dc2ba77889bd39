"""Downloads of pinned files, from a folder and over http: checked, cached, and one line when something is wrong."""

import functools
import hashlib
import http.server
import re
import subprocess
import threading

import pytest

from comlora_trl.data import COMMONSENSE_TASKS, DataError, commonsense, files


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COMLORA_CACHE_DIR", str(tmp_path / "cache"))


def blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


@pytest.fixture(params=["file", "http"])
def upstream(request, tmp_path, monkeypatch):
    """A folder in the place of LLM-Adapters' repository; the checksums are of what `f.json` holds."""
    content = b'[{"instruction": "I", "output": "O"}]'
    folder = tmp_path / "upstream"
    folder.mkdir()
    (folder / "f.json").write_bytes(content)
    url = folder.as_uri()
    if request.param == "http":
        handler = functools.partial(QuietHandler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        request.addfinalizer(server.server_close)
        request.addfinalizer(server.shutdown)
        url = f"http://127.0.0.1:{server.server_port}"
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(files, "LLM_ADAPTERS_URL", url + "/")
    checksums = dict.fromkeys(("f.json", "g.json", "h.json"), blob_sha1(content))
    monkeypatch.setattr(files, "llm_adapters_checksums", lambda: checksums)
    return folder


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *args):
        pass


def test_downloads_are_checked_and_cached(upstream):
    content = (upstream / "f.json").read_bytes()
    path = files.download_llm_adapters("f.json")
    assert path.read_bytes() == content
    (upstream / "f.json").unlink()
    assert files.download_llm_adapters("f.json") == path
    path.write_bytes(content + b" ")
    (upstream / "g.json").write_bytes(b"other")
    for name, message in [
        ("f.json", "f.json: git blob SHA-1 is .* expected .*delete the file"),
        ("g.json", "g.json: git blob SHA-1 is .*, expected .*try again"),
        ("h.json", "h.json: cannot be downloaded to .*(404|No such file).*COMLORA_DATA_DIR"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            files.download_llm_adapters(name)
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in path.parent.iterdir()] == ["f.json"], "nothing unchecked may stay"


def test_the_task_folder_has_a_checksum_of_every_download():
    checksums = files.llm_adapters_checksums()
    names = {commonsense.TRAINING_FILE} | {f"dataset/{task}/test.json" for task in COMMONSENSE_TASKS}
    assert checksums.keys() == names
    assert all(re.fullmatch("[0-9a-f]{40}", sha1) for sha1 in checksums.values())
    assert len(set(checksums.values())) == len(names)


def test_git_agrees_on_the_checksum(tmp_path):
    path = tmp_path / "f"
    path.write_text("some text\n")
    if not (git := subprocess.run(["git", "hash-object", path], capture_output=True, text=True)).stdout:
        pytest.skip(f"no git: {git.stderr}")
    assert files.git_blob_sha1(path) == git.stdout.strip()
