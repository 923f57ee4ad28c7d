"""``planner serve``: what it takes, what it answers, and what it refuses, without a browser."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from planner import ClusterSpec, ModelSpec, search
from planner import options as o
from planner.cli import app as command
from planner.errors import InputError

starlette = pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from starlette.testclient import TestClient  # noqa: E402

from planner.report import policy  # noqa: E402
from planner.web import app as web  # noqa: E402
from planner.web import server  # noqa: E402
from planner.web.answers import Answer  # noqa: E402
from planner.web.fields import (  # noqa: E402
    FILES,
    MOST_BODY,
    MOST_CONFIG,
    Asked,
    Malformed,
    fields,
    from_json,
    from_query,
    read,
)
from planner.web.pages import _changed  # noqa: E402
from planner.web.workers import BUSY, DIED, SLOW, Workers  # noqa: E402

ROOT = Path(__file__).parents[2]
JOB = {"model": "gpt2-small", "gpus": "2xA100", "global_batch_size": "8"}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def client(app: Any) -> TestClient:
    return TestClient(app, "http://127.0.0.1", raise_server_exceptions=False, follow_redirects=False)


@pytest.fixture(scope="module")
def page() -> Iterator[TestClient]:
    with client(web.make_app(1)) as one:
        yield one


def asked(**texts: str) -> Asked:
    return read({**JOB, **texts})


def harmless(text: str) -> None:
    """No traceback, and nothing of where the server lives."""
    for leak in ("Traceback", 'File "', str(ROOT), os.getcwd(), sys.prefix, "/site-packages"):
        assert leak not in text


# What it takes.


def test_the_form_has_every_option_of_a_search_but_those_that_name_files(page: TestClient) -> None:
    text = page.get("/").text
    names = re.findall(r'(?:input|select|textarea) id="(\w+)" name="(\w+)"', text)
    options = {name for group in (o.JOB, o.TRAINING, o.COST, o.CHOICES) for name in group}
    assert {name for _, name in names} == options - set(FILES) | {"objective", "top", "time_limit", "config"}
    assert all(one == name for one, name in names)
    for field in fields().values():
        assert html.escape(field.help, quote=False).replace("'", "&#39;") in text


def test_the_defaults_are_the_commands() -> None:
    given = asked().given()
    assert {name: given[name] for name in o.CHOICES} == {name: kind[1] for name, kind in o.CHOICES.items()}
    assert (given["framework"], given["optimizer"], given["objective"]) == ("megatron", "adamw", "time")
    assert (given["seq_length"], given["global_batch_size"]) == (None, 8)


def test_a_form_an_address_and_json_are_the_same_question() -> None:
    form = read(from_query(b"gpus=2xA100&model=gpt2-small&option=loss%3Dfused&option=x%3Dy&across_nodes=yes"))
    data: dict[str, Any] = {"model": "gpt2-small", "gpus": "2xA100", "option": ["loss=fused", "x=y"]}
    assert form == read(from_json(json.dumps({**data, "across_nodes": True, "seq_length": None}).encode()))
    assert form == read(from_query(urlencode(form.address()).encode()))
    assert form.given()["option"] == ["loss=fused", "x=y"]
    assert form.given()["across_nodes"] is True
    degrees = read(from_json(json.dumps({**JOB, "tensor_parallel": [1, 2]}).encode()))
    assert degrees.given()["tensor_parallel"] == "1,2"


def test_what_is_the_default_is_not_part_of_the_question() -> None:
    assert asked(framework="megatron", sequence_parallel="yes", top="10", time_limit="20", note="") == asked()


def test_the_command_is_the_one_that_answers_the_same() -> None:
    own = asked(sequence_parallel="no", option="loss=fused", tensor_parallel="1,2")
    shown = own.command
    assert shown.startswith("planner search --model gpt2-small --gpus 2xA100")
    assert all(one in shown for one in ("--no-sequence-parallel", "--option loss=fused", "1,2"))
    config = read({"config": json.dumps(CONFIG), "gpus": "2xA100"})
    assert config.command == "planner search --model config.json --gpus 2xA100"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("seq_length", "4k", "--seq-length '4k' is no whole number"),
        ("seq_length", "9" * 16, "is no whole number"),
        ("dropout", "x", "--dropout 'x' is no number"),
        ("dropout", "nan", "is no number"),
        ("across_nodes", "maybe", "--across-nodes 'maybe': write yes or no"),
        ("time_limit", "60", "use up to 30 seconds here"),
        ("framework", "x" * 1001, "up to 1,000 printable characters"),
        ("precision", "bf16\x00", "printable characters"),
        ("model", "", "--model is empty"),
        ("gpus", " ", "--gpus is empty"),
        ("config", "{}", "both given"),
        ("profile", "x.json", "no"),
        ("job", "x.yaml", "job file"),
        ("trace", "/tmp/x", "nothing is written"),
        ("save_job", "/tmp/x", "nothing is written"),
    ],
)
def test_a_field_that_cannot_be_is_said_with_its_rule(name: str, text: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        asked(**{name: text})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ("NaN", "not JSON"),
        ('{"a": NaN}', "not JSON"),
        ("[" * 50_000, "nested too deeply"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ("9" * 5_000, "not JSON"),
        ('{"a": "' + "x" * MOST_CONFIG + '"}', "larger than 65,536 bytes"),
        ("\ud800", "not JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read({"config": text, "gpus": "2xA100"})


def test_what_nothing_can_be_read_from_is_malformed() -> None:
    for data in (b"a=%ff", b"model=x&model=y", b"&".join(b"a%d=1" % n for n in range(200)), b"\xff"):
        with pytest.raises(Malformed):
            from_query(data)
    for data in (b"", b"[]", b"\xff\xfe", b'{"model": {"a": 1}}', b"[" * 100_000, b'{"top": NaN}'):
        with pytest.raises(Malformed):
            from_json(data)
    with pytest.raises(Malformed, match="modell is no field: did you mean model"):
        read({"modell": "x"})


# What it answers.


def test_a_form_that_is_sent_has_an_address_that_can_be_shared(page: TestClient) -> None:
    blanks = dict.fromkeys((name for name in fields() if name not in JOB), "")
    sent = page.post("/search", data={**JOB, **blanks, "framework": "fsdp"})
    assert (sent.status_code, sent.content) == (303, b"")
    expected = "/search?model=gpt2-small&gpus=2xA100&global_batch_size=8&framework=fsdp"
    assert sent.headers["location"] == expected
    answer = page.get(expected)
    assert answer.status_code == 200
    assert "gpt2-small on 2 x A100" in answer.text
    assert "<option selected>fsdp</option>" in answer.text


def test_json_is_the_document_of_the_command(page: TestClient) -> None:
    own = page.get("/api/search", params=JOB)
    assert own.headers["content-type"] == "application/json"
    flags = "search --model gpt2-small --gpus 2xA100 --global-batch-size 8 -n 10 --json"
    other = json.loads(CliRunner().invoke(command, flags.split()).stdout)
    found = own.json()
    assert found["command"] == "planner search --model gpt2-small --gpus 2xA100 --global-batch-size 8"
    for one in (found, other):
        one.pop("command")
        for proof in (one["proof"], *(plan["proof"] for plan in one["plans"])):
            proof.pop("seconds")
    assert found == other
    assert (
        page.post("/api/search", json={**JOB, "global_batch_size": 8}).json()["plans"] == own.json()["plans"]
    )
    assert page.post("/api/search", data=JOB).json() == own.json()


def test_the_page_ranks_the_layouts_of_the_search(page: TestClient) -> None:
    plans = search(ModelSpec.from_catalog("gpt2-small"), ClusterSpec.parse("2xA100"), top=10)
    text = page.get("/search", params={"model": "gpt2-small", "gpus": "2xA100"}).text
    rows = re.findall(
        r'<th scope="row" class="text"><bdi>(\d+)</bdi></th><td class="text">([^<]+)</td>', text
    )
    assert rows == [(str(n), plan.layout.to_layout().describe()) for n, plan in enumerate(plans, 1)]
    assert "planner search --model gpt2-small --gpus 2xA100</code>" in text


def test_the_review_has_its_own_policy_title_and_note_as_text(page: TestClient) -> None:
    words = "<script>x</script> & \"'\n{{ 7 * 7 }}"
    answer = page.get("/review", params={**JOB, "title": words, "note": words})
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == policy() + "; frame-ancestors 'none'"
    assert answer.text.count("&lt;script&gt;x&lt;/script&gt;") >= 2
    assert "<script>x" not in answer.text
    assert "{{ 7 * 7 }}" in answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_where_nothing_fits_it_says_what_would(page: TestClient) -> None:
    job = {"model": "llama-2-7b", "gpus": "1xA100-SXM-40GB", "tensor_parallel": "1"}
    found = page.get("/api/search", params=job)
    assert found.status_code == 200
    assert (found.json()["plans"], found.json()["error"][:10]) == ([], "llama-2-7b")
    text = page.get("/search", params=job).text
    assert '<section id="answer" class="no"' in text
    for change in found.json()["changes"]:
        if change["option"].startswith("--gpus"):
            gpus = change["option"].split()[1]
            assert f"/search?model=llama-2-7b&amp;gpus={gpus}&amp;tensor_parallel=1" in text
    assert page.get("/review", params=job).status_code == 200


def test_a_change_of_options_is_an_address() -> None:
    own = asked(headroom="5%", option="loss=fused")
    given: dict[str, Any] = {"headroom": None, "option": ["norm=kept"], "sequence_parallel": False}
    start = "/search?model=gpt2-small&gpus=2xA100&global_batch_size=8"
    assert _changed(own, given) == f"{start}&option=loss%3Dfused%0Anorm%3Dkept&sequence_parallel=no"
    assert _changed(own, {"profile": "x"}) == _changed(own, {}) == ""


def test_a_pasted_config_is_read_as_data(page: TestClient) -> None:
    config = {**CONFIG, "_name_or_path": "<b>mine</b>", "auto_map": {"AutoModel": "x.py"}}
    job = {"config": json.dumps(config, indent=4), "gpus": "2xA100", "global_batch_size": "8"}
    sent = page.post("/search", data=job)
    assert sent.status_code == 303
    text = page.get(sent.headers["location"]).text
    assert "&lt;b&gt;mine&lt;/b&gt;" in text
    assert "<b>mine" not in text
    found = page.post("/api/search", json={**job, "config": config}).json()
    assert found["model"]["name"] == "<b>mine</b>"
    nameless = page.post("/api/search", json={**job, "config": CONFIG}).json()
    assert nameless["model"]["name"] == "pasted model"
    assert nameless["plans"][0]["step_time_s"] == found["plans"][0]["step_time_s"]
    harmless(json.dumps(nameless))


def test_a_config_too_long_for_an_address_is_answered_at_once(page: TestClient) -> None:
    job = {
        "config": json.dumps({**CONFIG, "padding": "x" * 20_000}),
        "gpus": "2xA100",
        "global_batch_size": "8",
    }
    answer = page.post("/search", data=job)
    assert answer.status_code == 200
    assert '<form method="post" action="/review"' in answer.text
    assert "/api/search?" not in answer.text


def test_a_model_is_never_a_path(page: TestClient, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    there = (
        str(file),
        str(tmp_path),
        "/etc/passwd",
        "pyproject.toml",
        ".",
        "planner/catalog/models/gpt2-xl.json",
    )
    answers = []
    for text in (
        *there,
        "/nowhere/config.json",
        "../../x",
        "C:\\x",
        "file:///etc/passwd",
        "http://127.0.0.1/",
    ):
        answer = page.get("/api/search", params={**JOB, "model": text})
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(("--model: unknown model", "--model: "))
        answers.append(re.sub(r"'.*?'.*", "", answer.json()["error"]))
    assert set(answers) == {"--model: unknown model "}
    assert page.get("/api/search", params={**JOB, "gpus": "2x/etc/passwd"}).status_code == 422


def test_what_the_planner_refuses_is_said_beside_the_form(page: TestClient) -> None:
    answer = page.get("/search", params={**JOB, "tensor_parallel": "7", "note": "kept"})
    assert answer.status_code == 422
    assert "tensor_parallel=7 does not divide the 2 GPUs" in answer.text
    assert 'name="tensor_parallel" value="7"' in answer.text
    assert re.search(r'id="tensor_parallel"[^>]*aria-invalid="true"', answer.text)
    assert 'value="gpt2-small"' in answer.text
    assert page.get("/api/search", params={**JOB, "tensor_parallel": "7"}).json().keys() == {"error"}


# What it refuses.


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/search/", {}, 404),
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/page.css/../../pyproject.toml", {}, 404),
        ("POST", "/", {"data": {"a": "b"}}, 405),
        ("PUT", "/api/search", {"json": {}}, 405),
        ("DELETE", "/search", {}, 405),
        ("TRACE", "/search", {}, 405),
        ("GET", "/api/search", {}, 422),
        ("GET", "/search?model=%ff", {}, 400),
        ("GET", "/search?" + "a=1&" * 200, {}, 400),
        ("GET", "/search?model=" + "x" * 40_000, {}, 414),
        ("POST", "/api/search", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ("POST", "/api/search", {"content": b"x", "headers": {"content-type": "text/plain"}}, 415),
        ("POST", "/search", {"content": b"{}", "headers": {"content-type": "application/json"}}, 415),
        ("POST", "/search", {"files": {"config": b"{}"}}, 415),
        (
            "POST",
            "/api/search",
            {"content": b"[" * 200_000, "headers": {"content-type": "application/json"}},
            400,
        ),
        ("POST", "/api/search", {"json": {"model": "x" * MOST_BODY}}, 413),
        ("POST", "/search", {"data": {"config": "x" * MOST_BODY}}, 413),
        ("POST", "/search", {"data": {"config": "x" * (MOST_CONFIG + 1), "gpus": "8x80G"}}, 422),
        ("POST", "/search", {"data": JOB, "headers": {"content-encoding": "gzip"}}, 415),
        ("GET", "/", {"headers": {"host": "evil.example"}}, 421),
        ("GET", "/", {"headers": {"host": "127.0.0.1.evil.example"}}, 421),
        ("GET", "/", {"headers": {"host": "localhost:x"}}, 421),
        ("GET", "/", {"headers": {"host": ""}}, 421),
        ("POST", "/search", {"data": JOB, "headers": {"sec-fetch-site": "cross-site"}}, 403),
    ],
)
def test_garbage_gets_4xx(
    method: str, path: str, more: dict[str, Any], status: int, page: TestClient
) -> None:
    answer = page.request(method, path, **more)
    assert answer.status_code == status
    harmless(answer.text)
    assert answer.headers["x-content-type-options"] == "nosniff"
    if path.startswith("/api"):
        assert answer.json().keys() == {"error"}


def test_a_body_without_a_length_ends_at_the_limit(page: TestClient) -> None:
    read_so_far = 0

    def pieces() -> Iterator[bytes]:
        nonlocal read_so_far
        for _ in range(1000):
            read_so_far += 65_536
            yield b"x" * 65_536

    form = {"content-type": "application/x-www-form-urlencoded"}
    assert page.post("/search", content=pieces(), headers=form).status_code == 413


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.5:80", "LOCALHOST"])
def test_an_address_is_a_good_host_as_no_name_leads_to_it(host: str, page: TestClient) -> None:
    assert page.get("/healthz", headers={"host": host}).json() == {"status": "ok", "waiting": 0}


def test_a_name_may_be_allowed() -> None:
    with client(web.make_app(1, ("Plan.Example",))) as one:
        assert one.get("/", headers={"host": "other.example"}).status_code == 421
        assert one.get("/", headers={"host": "plan.example:80"}).status_code == 200


def test_every_answer_has_the_headers_and_none_a_cookie(page: TestClient) -> None:
    for path in ("/", "/page.css", "/page.js", "/favicon.ico", "/healthz", "/nothing", "/api/search"):
        answer = page.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'none';")
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert not {"set-cookie", "access-control-allow-origin", "server"} & set(answer.headers)
    assert page.head("/").status_code == page.head("/search", params=JOB).status_code == 200
    assert (
        page.options(
            "/search", headers={"origin": "http://x", "access-control-request-method": "POST"}
        ).status_code
        == 405
    )


def test_an_error_of_ours_says_nothing_of_the_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("secret")

    monkeypatch.setattr(web, "first_page", fail)
    with client(web.make_app(Workers(1))) as one:
        answer = one.get("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "content-security-policy" in answer.headers
    harmless(answer.text)


TEXTS = st.text(max_size=40)
NAMES = st.one_of(TEXTS, st.sampled_from([*fields(), *FILES, "config", "title", "note"]))
GARBAGE = st.dictionaries(NAMES, TEXTS, max_size=8)
garbage = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@garbage
@given(data=st.binary(max_size=300), kind=st.sampled_from(["application/json", web.FORM, "text/x", ""]))
def test_any_bytes_get_4xx(data: bytes, kind: str, page: TestClient) -> None:
    for path in ("/api/search", "/search", "/review"):
        answer = page.post(path, content=data, headers={"content-type": kind})
        assert 400 <= answer.status_code < 500
        harmless(answer.text)


@garbage
@given(texts=GARBAGE)
def test_any_fields_get_4xx_or_an_answer(texts: dict[str, str], page: TestClient) -> None:
    found = {
        name.encode("utf-8", "replace").decode(): text.encode("utf-8", "replace").decode()
        for name, text in texts.items()
    }
    for answer in (
        page.get("/api/search", params={**JOB, **found}),
        page.post(
            "/api/search", content=json.dumps({**JOB, **texts}), headers={"content-type": "application/json"}
        ),
    ):
        assert answer.status_code == 200 or 400 <= answer.status_code < 500
        harmless(answer.text)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@garbage
@given(
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "head_dim", "_name_or_path", "quantization_config"]), JSONS
    )
)
def test_any_config_gets_4xx_or_an_answer(changes: dict[str, Any], page: TestClient) -> None:
    body = json.dumps({"gpus": "2xA100", "global_batch_size": 8, "config": {**CONFIG, **changes}})
    answer = page.post("/api/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500
    harmless(answer.text)


# Its processes.


def with_workers(workers: Workers, body: Any) -> None:
    async def run() -> None:
        await workers.start()
        try:
            await body(workers)
        finally:
            await workers.stop()

    asyncio.run(run())


def test_an_answer_that_takes_too_long_ends_with_its_process_and_the_next_has_a_new_one() -> None:
    async def body(workers: Workers) -> None:
        old = next(iter(workers.all)).process
        assert await workers.answer("search", asked(model="llama-65b", gpus="512x80G")) == Answer.of(
            504, SLOW
        )
        assert not old.is_alive()
        workers.seconds = 60
        assert (await workers.answer("search", asked())).status == 200
        assert len(workers.all) == 1

    with_workers(Workers(1, seconds=0.05), body)


def test_a_process_that_dies_is_replaced() -> None:
    async def body(workers: Workers) -> None:
        task = asyncio.create_task(workers.answer("search", asked(model="llama-65b", gpus="512x80G")))
        await asyncio.sleep(0.5)
        next(iter(workers.all)).process.kill()
        assert await task == Answer.of(503, DIED)
        assert (await workers.answer("search", asked())).status == 200

    with_workers(Workers(1), body)


def test_those_who_ask_the_same_share_one_answer_and_a_full_queue_says_so() -> None:
    async def body(workers: Workers) -> None:
        same = [asyncio.create_task(workers.answer("search", asked())) for _ in range(100)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(workers.answer("search", asked(top=str(n)))) for n in range(1, 6)]
        assert len({id(one) for one in await asyncio.gather(*same)}) == 1
        statuses = [one.status for one in await asyncio.gather(*others)]
        assert sorted(statuses) == [200, 200, 503, 503, 503]
        assert BUSY in [one.text for one in await asyncio.gather(*others)]
        assert workers.waiting == 0
        assert not workers.under_way

    with_workers(Workers(1, queue=2), body)


def test_kept_answers_have_a_bound() -> None:
    async def body(workers: Workers) -> None:
        for n in range(1, 9):
            answer = await workers.answer("search", asked(top=str(n)))
            assert answer.status == 200
            assert workers.held <= workers.kept
        assert 1 <= len(workers.answers) < 8
        assert len(answer.body) < workers.held

    with_workers(Workers(1, kept=60_000), body)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_worker_can_write_no_file_and_has_a_bounded_memory(tmp_path: Path) -> None:
    code = f"""
import os
from planner.web.workers import _limit
_limit()
write = "write", lambda: os.write(os.open({str(tmp_path / "x")!r}, os.O_WRONLY | os.O_CREAT), b"x")
for name, body in (write, ("grow", lambda: bytes(5 * 2**30))):
    try:
        body()
        print(name, "done")
    except (OSError, MemoryError) as error:
        print(name, type(error).__name__)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["write OSError", "grow MemoryError"]


# Its connections.


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch, socket.socket() as listening:
        patch.setattr(server, "HEADERS_SECONDS", 0.5)
        patch.setattr(web, "BODY_SECONDS", 0.5)
        listening.bind(("127.0.0.1", 0))
        own = server.uvicorn.Server(server.configuration("127.0.0.1", 0, 1))
        thread = threading.Thread(target=own.run, args=([listening],))
        thread.start()
        while not own.started:
            time.sleep(0.05)
        yield listening.getsockname()[1]
        own.should_exit = True
        thread.join(20)


def said(port: int, data: bytes, seconds: float = 10) -> bytes:
    """What comes back until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        line.sendall(data)
        found = b""
        while part := line.recv(65_536):
            found += part
    return found


HEAD = b"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"421"),
        (b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 60_000, b"400"),
        (HEAD + b"Content-Type: application/json\r\nContent-Length: x\r\n\r\n", b"400"),
        (HEAD + b"Content-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n", b"413"),
        (HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", b"408"),
        (HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
    ],
)
def test_broken_and_slow_requests_get_4xx(data: bytes, status: bytes, port: int) -> None:
    found = said(port, data)
    assert found.split(b" ")[1] == status
    harmless(found.decode("latin-1"))


def test_a_connection_that_says_nothing_is_ended(port: int) -> None:
    start = time.monotonic()
    with suppress(ConnectionResetError):
        assert said(port, b"GET / HTTP/1.1\r\nHost:") == b""
    assert time.monotonic() - start < 5


def test_a_connection_stays_for_the_next_request(port: int) -> None:
    line = HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(3):
        line.request("GET", "/healthz")
        assert json.load(line.getresponse()) == {"status": "ok", "waiting": 0}
        time.sleep(0.7)  # longer than it may take to ask first
    line.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads sizes from /proc")
def test_forty_clients_at_once_get_what_they_should() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "40", "5"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    server_size = re.search(r"server, MiB: .* (\d+) most", found.stdout)
    assert server_size
    assert int(server_size[1]) < 400


# Its command.


def test_the_command_says_what_it_cannot() -> None:
    run = CliRunner().invoke
    for words, said_words in (
        ("--port 0", "--port 0: use 1 to 65535"),
        ("--workers 0", "--workers 0: use 1 to 64"),
        ("--host 0.0.0.0 --port 99999", "--port 99999"),
    ):
        result = run(command, ["serve", *words.split()])
        assert result.exit_code == 2
        assert said_words in result.output


def test_the_command_warns_of_an_open_address_and_says_how_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    def ran(*given: Any) -> bool:
        calls.append(given)
        return len(calls) < 3

    monkeypatch.setattr(server, "run", ran)
    run = CliRunner().invoke
    closed = run(command, ["serve"])
    assert (closed.exit_code, calls[0]) == (0, ("127.0.0.1", 8000, 2, ()))
    assert "http://127.0.0.1:8000/" in closed.output
    assert "whoever reaches" not in closed.output
    opened = run(command, ["serve", "--host", "::", "--allow-host", "plan.example", "--workers", "3"])
    assert (opened.exit_code, calls[1]) == (0, ("::", 8000, 3, ("plan.example",)))
    assert "whoever reaches this machine at port 8000 can ask" in opened.output
    assert run(command, ["serve"]).exit_code == 2
    monkeypatch.delitem(sys.modules, "planner.web.server")
    monkeypatch.delattr("planner.web.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    missing = run(command, ["serve"])
    assert missing.exit_code == 2
    assert "pip install 'distributed-training-planner[serve]'" in missing.output


def test_every_example_of_the_documentation_is_answered(page: TestClient) -> None:
    text = (ROOT / "docs" / "serve.md").read_text()
    found = re.findall(r"^curl '?http://127\.0\.0\.1:8000(/[^\s']*)'?(?: --json '(.*)')?$", text, re.M)
    assert len(found) == 4
    for path, data in found:
        form = {"content-type": "application/json"}
        answer = page.post(path, content=data, headers=form) if data else page.get(path)
        assert answer.status_code == 200, answer.text
    for name in FILES:
        assert f"`--{name.replace('_', '-')}`" in text


def test_a_fold_with_something_in_it_is_open(page: TestClient) -> None:
    def opened(text: str) -> list[str]:
        return re.findall(r"<details open>\s*<summary>([^<]+)<", text)

    assert opened(page.get("/").text) == []
    assert opened(page.get("/search", params={**JOB, "headroom": "5%"}).text) == ["Cluster"]
    wrong = page.get("/search", params={**JOB, "tensor_parallel": "7", "price": "x"}).text
    assert opened(wrong) == ["Layouts to search", "Price and failures"]
    blank = page.post("/search", data={**dict.fromkeys(fields(), ""), "model": "gpt2-small"})
    assert (blank.status_code, opened(blank.text)) == (422, [])
