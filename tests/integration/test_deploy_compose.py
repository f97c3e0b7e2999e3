"""deploy/compose.yaml's containers may write where they have to, although none of them runs as root."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import docker
import pytest
import yaml
from support_containers import Engine

from loopback.services._runtime.broker import server_program

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = "python:3.11-slim"  # stood in for by what the stage in question uses of it, since there is no registry

pytestmark = [pytest.mark.e2e, pytest.mark.broker]


def programs(*names: str) -> bytes:
    """An archive of a root folder that holds these programs and their libraries."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        files = {str(shutil.which(name)) for name in names}
        for name in list(files):  # nothing is listed for what is linked statically
            listed = subprocess.run(["ldd", name], check=False, capture_output=True, text=True).stdout.split()
            files |= {word for word in listed if word.startswith("/")}
        for file in sorted(files):
            tar.add(file, arcname=file)
        tar.add(str(shutil.which("sh")), arcname="/bin/sh")
    return archive.getvalue()


async def test_the_broker_of_the_compose_file_may_write_to_its_new_volume(container_engine: Engine) -> None:
    broker = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["broker"]
    api = docker.APIClient(base_url=container_engine.url)
    client = docker.DockerClient(base_url=container_engine.url)
    try:
        api.import_image_from_data(programs("sh", "install", server_program()), *BASE.split(":"))
        built, _ = client.images.build(
            path=str(DEPLOY), dockerfile="Dockerfile", target="layout", network_mode="none"
        )
        volume_at = next(one.partition(":")[2] for one in broker["volumes"] if one.startswith("jetstream:"))
        assert f"store_dir: {volume_at}," in (DEPLOY / "broker.conf").read_text()

        def last_words(image: str, volume: str) -> str:
            box = client.containers.run(
                image, [server_program(), "-js", "-sd", volume_at, "-p", "4299"], detach=True, network_mode="host",
                user=broker["user"], read_only=broker["read_only"], cap_drop=broker["cap_drop"],
                security_opt=broker["security_opt"],
                volumes={volume: {"bind": volume_at, "mode": "rw"}},
            )  # fmt: skip
            try:
                for line in box.logs(stream=True):
                    if b"Server is ready" in line or b"[FTL]" in line:
                        return line.decode()
                return ""
            finally:
                box.remove(force=True)

        assert "permission denied" in last_words(BASE, "unprepared"), "where the image does not prepare it"
        assert "Server is ready" in last_words(str(built.id), "prepared")
    finally:
        client.close()
        api.close()
