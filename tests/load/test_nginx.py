"""The server behind nginx, with the configuration of docs/operating.md but for TLS."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import free_port, process

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
AROUND = """
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
{content}
}}
"""


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_configuration_of_the_page(tmp_path: Path) -> None:
    found = re.search(
        r"^    upstream .*?^    }$\n\n^    server .*?^    }$", PAGE.read_text(), re.M | re.S
    )
    assert found is not None
    port = free_port()
    with process() as (_, http):
        content = textwrap.dedent(found[0]).replace(
            "127.0.0.1:8000", f"127.0.0.1:{http.base_url.port}"
        )
        content = content.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        content = re.sub(r".*ssl_certificate.*\n", "", content)
        (tmp_path / "nginx.conf").write_text(AROUND.format(folder=tmp_path, content=content))
        nginx = subprocess.Popen(["nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)])
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                check(client)
        finally:
            nginx.terminate()
            nginx.wait(20)


def check(client: httpx.Client) -> None:
    """Whole answers, streams that come piece by piece, large bodies, a request's id, and no metrics."""
    whole = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    assert whole.status_code == 200 and len(whole.headers["x-request-id"]) == 32
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        begun, times = time.monotonic(), []
        for _ in response.iter_lines():
            times.append(time.monotonic() - begun)
    assert len(times) > 600 and times[10] < times[-1] / 2
    large = client.post("/tokenize", json={"prompt": "a" * 7 * 2**20})
    assert (
        large.status_code == 400 and "error" in large.json()
    )  # the server's answer, not nginx's 413
    assert client.get("/metrics").status_code == 403


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            assert httpx.get(url).status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("nginx did not start")
