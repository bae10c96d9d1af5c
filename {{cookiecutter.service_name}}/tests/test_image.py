"""The image gets the files and releases that were tested, and containers get few rights.

Dockerfile, .dockerignore, compose.yaml, requirements/*.txt
"""

import re

import yaml

from tests.conftest import ROOT, read

DOCKERFILE = read("Dockerfile")


def locked(lock: str) -> set[str]:
    """The lines of a lock: a release with its hashes, without the platforms that it is for."""
    lines = read(f"requirements/{lock}.txt").replace("\\\n", "").splitlines()
    return {re.sub(r" ;.*?(?=--hash)", " ", line) for line in lines}


def test_the_image_gets_what_was_tested() -> None:
    """The releases in the image, by hash, are those that development and these tests use."""
    for line in locked("dev"):
        assert re.match(r"\S+==\S+ .*--hash=sha256:", line), f"make lock writes hashes; this has none: {line}"
    assert locked("runtime") < locked("dev"), "make lock makes the two agree"
    assert "--require-hashes" in DOCKERFILE


def test_the_engine_is_sent_what_the_image_copies() -> None:
    """`.dockerignore` lets through each file that the Dockerfile copies, and no other; all of them exist."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = sorted(file for line in lines for file in line.split())
    assert copied == sorted(re.findall(r"^!(.+)$", read(".dockerignore"), re.MULTILINE))
    for file in copied:
        assert list(ROOT.glob(file)), f"the Dockerfile copies {file}, which is not there"


def test_containers_get_no_rights() -> None:
    """Compose drops capabilities, limits memory and opens local ports only; the image's user is not root."""
    for path in ROOT.glob("compose*.yaml"):
        for name, service in yaml.safe_load(read(path))["services"].items():
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["mem_limit"], name
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
            assert not {"privileged", "cap_add", "network_mode", "pid"} & service.keys(), name
            for volume in service.get("volumes", []):
                host = volume.partition(":")[0]
                assert not host.startswith(".") or (ROOT / host).exists(), f"{name} mounts {host}"
    users = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert not re.search(r"API_KEY|SECRET|TOKEN|^ADD|https?:", DOCKERFILE, re.MULTILINE)
