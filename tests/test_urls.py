"""URLs: which are accepted, what a config may write in one, and that no credential is repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest

from latentcache import LatentLoader, StorageOptions, load_vae, open_dataset, parse_config, run
from latentcache.errors import ConfigError, LatentCacheError, one_line, redact
from latentcache.images.source import list_shards
from latentcache.networks import load_lpips
from latentcache.storage import Store
from latentcache.urls import SCHEMES
from makers import config_tree, make_contract, make_latents, write_dataset, write_tar

SECRET = "S3CRETS3CRET"

SIGNED = [
    f"http://user:{SECRET}@127.0.0.1:1/x.tar",
    f"https://{SECRET}@host/x.tar",
    f"http://user:{SECRET}/slash@host/x.tar",
    f"http://user:{SECRET} space@host/x.tar",
    f"s3://{SECRET}:{SECRET}@bucket/x.tar",
    f"https://host/x.tar?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
    f"https://host/x.tar?sv=1&se=2&{SECRET}",
    f"https://host/x.tar#access_token={SECRET}",
    f"az://container/x.tar?sv=2024&sig={SECRET}",
    f"gs://bucket/x.tar?X-Goog-Signature={SECRET}",
    f"s3://bucket/x.tar?AWSAccessKeyId=a&Signature={SECRET}",
    f"hf://datasets/a/b/x.tar?token={SECRET}",
    f"HTTP://user:{SECRET}@host/x.tar",
]


def config(folder: Path, path: str, value: object) -> dict[str, Any]:
    tree = config_tree(folder)
    *sections, name = path.split(".")
    section = tree
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    if path == "source.folder":
        del tree["source"]["shards"]
    return tree


URL_SETTINGS = [
    "source.shards",
    "source.folder",
    "source.moved_from",
    "output.url",
    "vae.checkpoint",
    "qa.decoder",
]


@pytest.mark.parametrize("url", SIGNED)
def test_a_url_with_a_credential_is_refused_and_never_repeated(url: str, tmp_path: Path):
    entries = [
        lambda: Store(url),
        lambda: open_dataset(url),
        lambda: LatentLoader(url, batch_size=1),
        lambda: load_vae(url),
        lambda: load_vae(f"{url}/x.safetensors"),
        lambda: load_lpips(url, "0" * 64, StorageOptions(), "cpu"),
        lambda: list_shards(url, StorageOptions()),
        lambda: parse_config(config(tmp_path, "source.storage.endpoint_url", url)),
        *(lambda path=path: parse_config(config(tmp_path, path, url)) for path in URL_SETTINGS),
    ]
    for entry in entries:
        with pytest.raises(ConfigError) as caught:
            entry()
        assert SECRET not in str(caught.value)
        assert SECRET not in "".join(
            traceback.format_exception_only(caught.value.__cause__ or caught.value)
        )


def test_a_credential_in_a_wrong_value_is_not_repeated(tmp_path: Path):
    url = f"http://user:{SECRET}@host/x.tar"
    for path, value in [
        ("source", url),
        ("source.keep", url),
        ("source.storage", {"key": "A", "secret": SECRET}),
        ("source.storage.anon", SECRET),
        ("transform.resolution_px", url),
        ("source.image", {"url": url}),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse_config(config(tmp_path, path, value))
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_credential_in_the_dataset_name_is_refused(tmp_path: Path):
    tree = config_tree(tmp_path) | {"name": f"from https://user:{SECRET}@host/x"}
    with pytest.raises(ConfigError, match="name: holds a credential") as caught:
        parse_config(tree)
    assert SECRET not in str(caught.value)


def test_the_command_line_prints_no_credential_of_an_override(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config_tree(tmp_path)))
    url = f"https://user:{SECRET}@host/x.tar"
    for options in (["--set", f"output.url={url}"], ["--set", url]):
        command = [sys.executable, "-m", "latentcache.cli", "plan", str(path), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert SECRET not in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_names_in_a_dataset_cannot_control_a_terminal(tmp_path: Path):
    contract = make_contract()
    latents = {(64, 64): make_latents(contract, (64, 64), 2)}
    hostile = "x\x1b]0;owned\x07\nlatentcache: error: [bold]\x9b31m\u202e\u2028[/nope].tar"
    write_dataset(tmp_path, contract, {hostile: latents}, provenance={"name": hostile})
    store = Store(str(tmp_path / "out"))
    for record in open_dataset(store.url).units:
        (Path(tmp_path / "out") / record.files[0].path).unlink()
    lease = {"run": hostile, "host": hostile, "pid": 1, "num_units": 1, "num_total": 1}
    store.put("runs/x.json", json.dumps(lease | {"num_committed": 0, "renewed_at": "x"}).encode())
    env = {**os.environ, "LANG": "C", "PYTHONIOENCODING": "ascii"}
    for command, *options in (["status"], ["status", "--json"], ["verify"], ["verify", "--json"]):
        arguments = [sys.executable, "-m", "latentcache.cli", command, store.url, *options]
        done = subprocess.run(arguments, capture_output=True, env=env, check=False)
        text = (done.stdout + done.stderr).decode()
        assert "Traceback" not in text
        assert all(line.isprintable() for line in text.split("\n")), text
        assert not any(line.startswith("latentcache: error: [b") for line in text.split("\n"))
        if options:
            json.loads(done.stdout)
        # A host name of this form is refused with its lease; the file's name stands for the run.
        expected = {"status": "x", "verify": "owned" if options else "is gone"}[command]
        assert expected in text, "the test has tried something"


REFUSED = {
    "": "is empty",
    "  ": "is empty",
    "memory://x": "not supported",
    "github://a:b@c/x": "user name or password|not supported",
    "zip://a::file:///x.zip": "chain|not supported",
    "simplecache::s3://b/x": "chain",
    "s3://a::zip://b": "chain",
    "pipe:cat x": "not supported",
    "data:text/plain,x": "not supported",
    "ftp://h/x": "not supported",
    "local:///x": "not supported",
    "S3://b/x": "lower case",
    "s3:/b/x": "one slash",
    "s3:b/x": "one slash or none",
    "file:/x": "one slash",
    "file://x/y": "absolute path",
    "://x": "no scheme",
    "s3://": "no bucket",
    "s3:///x": "no bucket",
    "http:///x": "no host",
    "hf:///x": "no repository",
    "http://h:99999/x": "no valid host and port",
    "http://[::1": "no valid host and port",
    "s3://b\0/x": "control character",
    "/a/\x1b[31m": "control character",
    "/a/\udcff": "not UTF-8",
    "~no-such-user/x": "no user",
    "s3://b/x.tar?versionId=3": "versionId",
}


@pytest.mark.parametrize("url", REFUSED)
def test_an_invalid_url_is_refused_with_the_reason(url: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=REFUSED[url]) as caught:
        Store(url)
    assert str(caught.value).isprintable()
    with pytest.raises(ConfigError, match=REFUSED[url]):
        open_dataset(url)
    with pytest.raises(ConfigError, match=rf"output\.url: .*({REFUSED[url]})"):
        parse_config(config(tmp_path, "output.url", url))


def test_every_other_protocol_of_fsspec_is_refused():
    others = [name for name in fsspec.available_protocols() if name not in SCHEMES]
    assert len(others) > 20
    for name in others:
        with pytest.raises(ConfigError):
            Store(f"{name}://a/b")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a folder/x=1",
        "gs://bucket/a@b:c",
        "abfs://container@account.dfs.core.windows.net/x",
        "hf://datasets/a/b@refs%2Fconvert%2Fparquet/x",
        "http://[::1]:9000/x",
        "2024:01.tar",
        "./s3:/x",
        "/a/b://c",
        "~/x",
    ],
)
def test_unusual_but_valid_urls_and_paths_are_accepted(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: object())
    store = Store(url)
    assert store.is_local == ("//" not in url or url == "/a/b://c")


def test_variables_and_home_are_expanded_in_every_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SRC", "/data")
    for path in URL_SETTINGS:
        for written, read in {
            "${SRC}/x": "/data/x",
            "$SRC/x": "/data/x",
            "~/x": os.path.expanduser("~/x"),
            "/a$$SRC/$": "/a$SRC/$",
        }.items():
            actual: Any = parse_config(config(tmp_path, path, written))
            for name in path.split("."):
                actual = getattr(actual, name)
            assert actual == read
        for written, message in {
            "${NO_SUCH}/x": "variable NO_SUCH is not set",
            "$NO_SUCH": "variable NO_SUCH is not set",
            "${}/x": "write a variable as",
            "${SRC": "write a variable as",
            "$AWS_SECRET_ACCESS_KEY": "the name of a secret",
        }.items():
            with pytest.raises(ConfigError, match=rf"{path}: .*{message}"):
                parse_config(config(tmp_path, path, written))


@pytest.mark.parametrize(
    "url",
    ["localhost:9000", "minio.example.com", "", "http://a_b:9000", "http:/x:9000", "s3://x",
     "http://x:port", "http://"],
)  # fmt: skip
def test_an_invalid_endpoint_is_a_config_error(url: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"source\.storage\.endpoint_url: "):
        parse_config(config(tmp_path, "source.storage.endpoint_url", url))
    with pytest.raises(ConfigError):
        Store("s3://bucket", StorageOptions(endpoint_url=url))


def test_an_invalid_endpoint_in_the_environment_fails_without_retries(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    store = Store("s3://bucket", StorageOptions(profile=None, requester_pays=True))
    with pytest.raises(LatentCacheError, match=r"Invalid endpoint.*AWS_ENDPOINT_URL"):
        store.info("x")


def test_an_http_output_url_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"output\.url: .*cannot write to http"):
        parse_config(config(tmp_path, "output.url", "https://host/x"))


def test_a_hub_name_as_checkpoint_suggests_its_hf_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean hf://stabilityai/sd-vae-ft-mse\?"):
        load_vae("stabilityai/sd-vae-ft-mse")


def test_a_path_in_place_of_a_config_suggests_load_config():
    with pytest.raises(ConfigError, match=r"'c\.yaml': make one with load_config"):
        run("c.yaml")  # type: ignore[arg-type]


def test_error_messages_are_one_line_without_terminal_escapes():
    hostile = "a\x1b]0;x\x07b\nc\x9bd\u202ee\u2028f\udcffg"
    error = LatentCacheError(f"cannot read {hostile}")
    assert str(error).isprintable()
    assert one_line(hostile) == "a\\x1b]0;x\\x07b c\\x9bd\\u202ee f\\udcffg"
    assert str(LatentCacheError("one", "  two\n")) == "one\n  two "


def test_redact_removes_credentials_and_keeps_the_rest():
    for url in SIGNED[:1] + SIGNED[4:6] + SIGNED[8:]:
        assert SECRET not in redact(f"cannot reach {url}: refused"), url
    for text in ("http://host:9000/a@b/x", "a.jpg: key=3", "hf://a/b@rev", "file:///a:b@c"):
        assert redact(text) == text
    assert redact(f"Authorization: Bearer {SECRET}") == "Authorization: Bearer ***"


def test_a_file_with_the_literal_name_precedes_glob_matches(tmp_path: Path):
    names = ["a[1].tar", "a1.tar", "b{0,1}.tar", "b0.tar", "b1.tar", "set [2]/0.tar", "c?.tar"]
    for name in names:
        write_tar(tmp_path / name, [("x.jpg", b"x")])

    def listed(shards: str) -> list[str]:
        actual = list_shards(f"{tmp_path}/{shards}", StorageOptions())
        return [shard.url.removeprefix(f"file://{tmp_path}/") for shard in actual]

    for name in ("a[1].tar", "b{0,1}.tar", "set [2]/0.tar", "c?.tar"):
        assert listed(name) == [name]
    assert listed("a[0-9].tar") == ["a1.tar"]
    assert listed("b{1..1}.tar") == ["b1.tar"]
    assert listed("set [2]/*.tar") == ["set [2]/0.tar"]
    with pytest.raises(ConfigError, match="has a glob before its last"):
        listed("set [1]/*.tar")


@pytest.mark.parametrize(
    "pattern",
    ["x{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar",
     "{{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9},x}.tar",
     "{0..9999999999999999999999}.tar", "{" * 50 + "a,b" + "}" * 50, "}{.tar",
     "x/" * 2500 + "{a,b}"],
)  # fmt: skip
def test_braces_of_too_many_names_are_refused_before_they_are_expanded(pattern: str):
    with pytest.raises(ConfigError, match=r"source\.shards: "):
        list_shards(pattern, StorageOptions())
