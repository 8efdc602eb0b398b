"""The live page: what it is sent, who may see it, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import say, serve
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.bench.host import simulated_engine
from hf_paged.integrations.openai_server import ServerOptions
from hf_paged.integrations.openai_server.live.pages import page_map
from hf_paged.integrations.openai_server.live.watch import Watch, bucket
from hf_paged.sampling_params import SamplingParams

CHAT = [{"role": "user", "content": "What is the sea?"}]
SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    return hf_paged.wrap(model, page_size=16, num_pages=256, max_num_seqs=8)


def messages(url: str, count: int, **headers: str) -> Iterator[dict[str, Any]]:
    """The first messages of the feed."""
    with httpx.stream("GET", f"{url}/live/events", headers=headers, timeout=20) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])
                count -= 1
                if not count:
                    return


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


# ---- what is told -----------------------------------------------------------------------------------------------


def test_a_watch_tells_the_whole_run() -> None:
    engine = simulated_engine(num_pages=32, page_size=4, max_num_seqs=2, max_model_len=64, prepare=True)
    engine.add_request([1, 2, 3], SAMPLING.clone(max_tokens=12), request_id="early")
    engine.step()
    watch = Watch(engine)
    watch.collect()
    picture = watch.picture()
    assert [lane[1:] for lane in picture["lanes"]] == [["early", 0, None]]
    for name in "ab":
        engine.add_request([ord(name), 2, 3], SAMPLING, request_id=name)
    engine.step()
    found = watch.collect()
    assert [lane[1:] for lane in found["lanes"]] == [["a", 0, None], ["b", 0, None]]
    assert (found["running"], found["waiting"]) == (2, 1)
    generated = found["tokens"][1]
    while engine.has_unfinished():
        engine.step()
    engine.add_request([5], SAMPLING, request_id="gone")
    engine.abort("gone")
    found = watch.collect()
    numbers = {lane[1]: lane[0] for lane in picture["lanes"]} | {"a": 2, "b": 3, "gone": 4}
    assert sorted(found["ends"]) == sorted(
        [
            [numbers[name], reason]
            for name, reason in zip(("early", "a", "b", "gone"), ["length"] * 3 + ["abort"], strict=True)
        ]
    )
    assert sum(found["ttft"].values()) == 1 and generated + found["tokens"][1] >= 3 + 3
    decodes = [phase for phase in found["phases"] if phase[0] == numbers["b"] and phase[1] == 2]
    assert decodes[-1][4] == 3, "one of four tokens comes with the prompt"
    assert not watch._lanes and not watch._awaited
    quiet = watch.collect()
    assert not (quiet["phases"] or quiet["ends"] or quiet["steps"]) and "pages" not in quiet
    watch.close()
    assert not (engine.observers or engine.arrival_observers or engine.request_observers)


def test_an_overrun_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_paged.integrations.openai_server.live.watch.MOST_EVENTS", 4)
    engine = simulated_engine(num_pages=32, page_size=4, max_num_seqs=2, max_model_len=64, prepare=True)
    watch = Watch(engine)
    assert not watch.overrun
    engine.add_request([1, 2, 3], SAMPLING)
    while engine.has_unfinished():
        engine.step()
    assert watch.overrun
    watch.close()


def cells(found: tuple[int, list[int]]) -> list[int]:
    runs = found[1]
    return [cell for cell, length in zip(runs[::2], runs[1::2], strict=True) for _ in range(length)]


def test_the_page_map() -> None:
    engine = simulated_engine(num_pages=40, page_size=4, max_num_seqs=4, max_model_len=64, prepare=True)
    assert cells(page_map(engine.scheduler)) == [0] * 40
    engine.add_request(list(range(1, 10)), SAMPLING.clone(n=2, max_tokens=6))
    engine.step()
    engine.step()
    states = [cell & 3 for cell in cells(page_map(engine.scheduler))]
    shared = sum(len(set(s.pages)) for s in engine.scheduler.running) - len(
        {p for s in engine.scheduler.running for p in s.pages}
    )
    assert (
        states.count(2) == shared > 0
        and states.count(1) == len({p for s in engine.scheduler.running for p in s.pages}) - shared
    )
    while engine.has_unfinished():
        engine.step()
    scheduler = engine.scheduler
    states = [cell & 3 for cell in cells(page_map(scheduler))]
    assert states.count(3) == scheduler.tree.num_pages > 0 and states.count(0) == scheduler.pool.num_free
    per_cell, _ = found = page_map(scheduler, most_cells=10)
    assert per_cell == 4 and len(cells(found)) == 10
    assert cells(found)[0] & 3 == 3 and cells(found)[-1] == 0
    engine.reset_prefix_cache()
    assert set(cells(page_map(scheduler))) == {0}


def test_buckets() -> None:
    assert [bucket(s) for s in (0.0, 1e-4, 1e-3, 0.999e-1, 1.0, 1e9)] == [0, 0, 10, 29, 40, 69]


# ---- who may see it ----------------------------------------------------------------------------------------------


def test_the_page_is_open_and_its_data_need_the_key(model: Any) -> None:
    with serve(model, ServerOptions(api_key=["secret"])) as live:
        page = httpx.get(f"{live.url}/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
        assert not re.search(r"(src|href)=[\"']?https?:", page.text), "it fetches nothing from elsewhere"
        assert httpx.get(f"{live.url}/live/events").status_code == 401
        first = next(messages(live.url, 1, Authorization="Bearer secret"))
        assert first["about"]["model"] == "tiny" and first["num_pages"] == 256


def test_the_engine_is_watched_only_while_somebody_looks(model: Any) -> None:
    with serve(model) as live:
        engine = live.model.engine
        before = len(engine.observers)
        feeds = [messages(live.url, 50), messages(live.url, 50)]
        assert all("about" in next(feed) for feed in feeds)
        assert len(engine.observers) == before + 1 and len(engine.arrival_observers) == 1
        httpx.post(f"{live.url}/v1/chat/completions", json={"messages": CHAT, "max_tokens": 4}, timeout=30)
        assert any(message.get("ends") for message in feeds[0])
        for feed in feeds:
            feed.close()  # type: ignore[attr-defined]
        wait_for(lambda: len(engine.observers) == before)
        assert not engine.arrival_observers
    assert not engine.observers and not engine.request_observers


def test_a_server_that_shuts_down_does_not_wait_for_pages(model: Any) -> None:
    ended = threading.Event()
    with serve(model) as live:
        feed = messages(live.url, 1000)
        next(feed)

        def read() -> None:
            for _ in feed:
                pass
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        start = time.monotonic()
    assert time.monotonic() - start < 5 and ended.wait(5)


def test_no_page(model: Any) -> None:
    with serve(model, ServerOptions(disable_live_page=True)) as live:
        assert httpx.get(f"{live.url}/").status_code == httpx.get(f"{live.url}/live/events").status_code == 404


# ---- profiles ------------------------------------------------------------------------------------------------------


def test_profiles(model: Any, tmp_path: Path) -> None:
    with serve(model) as live:
        assert httpx.post(f"{live.url}/start_profile").status_code == 404
    with serve(model, ServerOptions(profile_dir=str(tmp_path / "profiles"))) as live:
        assert httpx.post(f"{live.url}/stop_profile").status_code == 409
        files = set()
        for _ in range(2):
            begun = httpx.post(f"{live.url}/start_profile").json()["path"]
            assert httpx.post(f"{live.url}/start_profile").status_code == 409
            httpx.post(f"{live.url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=30)
            ended = httpx.post(f"{live.url}/stop_profile").json()["path"]
            assert begun == ended
            events = json.loads(Path(ended).read_text())
            assert {"prefill", "decode"} <= {event["name"] for event in events}
            files.add(ended)
        assert len(files) == 2
        last = httpx.post(f"{live.url}/start_profile").json()["path"]
    json.loads(Path(last).read_text())  # the server's end has ended it


# ---- in a browser --------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror='window.hurt=1'><script>window.hurt=1</script> & <b>so on</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    # A key that is asked for, and a server that has ended, are no faults of the page's.
    assert not [error for error in errors if not error.startswith("Failed to load resource")]


def colours(page: Any, canvas: str) -> int:
    """How many different colours a canvas shows."""
    script = """id => {
      const { width, height } = document.getElementById(id), context = document.getElementById(id).getContext("2d");
      const seen = new Set(), data = new Uint32Array(context.getImageData(0, 0, width, height).data.buffer);
      for (const pixel of data) if (pixel >>> 24 === 255) seen.add(pixel);
      return seen.size;
    }"""
    return int(page.evaluate(script, canvas))


def test_a_browser_shows_what_runs(model: Any, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(model, ServerOptions(api_key=["secret"])) as live:
        page.goto(live.url)
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("not one of the server's").wait_for()
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        page.locator("#status[data-state=live]").wait_for()
        assert page.locator("#model").inner_text() == "tiny"
        say(monkeypatch, model, HOSTILE)
        page.get_by_label("Message").fill("Say something bad")
        page.keyboard.press("Enter")
        page.get_by_text(HOSTILE).wait_for()
        assert page.evaluate("window.hurt") is None and page.locator("#messages img, #messages b").count() == 0
        page.locator("#ttft-note", has_text="in the last minute").wait_for()
        for canvas in ("timeline", "pool", "ttft", "itl"):
            page.wait_for_function("id => document.getElementById(id).width > 100", arg=canvas)
            assert colours(page, canvas) > 1, canvas
        assert page.locator("#n-cached").inner_text() not in ("", "0")
        page.get_by_role("button", name="Switch between light and dark").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        live.wait_idle()


def test_stopping_an_answer_aborts_it(model: Any, page: Any) -> None:
    with serve(model) as live:
        page.goto(live.url)
        page.locator("#status[data-state=live]").wait_for()
        page.get_by_role("spinbutton", name="Tokens").fill("900")
        page.get_by_label("Message").fill("Talk")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Send").wait_for()
        live.wait_idle()


def test_what_the_server_says_is_wrong_is_shown(model: Any, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("<b>not</b> like this")

    with serve(model) as live:
        page.goto(live.url)
        page.locator("#status[data-state=live]").wait_for()
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.intake, "request", refuse)
            page.get_by_label("Message").fill("Talk")
            page.keyboard.press("Enter")
            page.get_by_text("<b>not</b> like this").wait_for()
        page.get_by_label("Message").fill("Talk again")
        page.keyboard.press("Enter")
        page.locator(".message.assistant .meta", has_text="tokens").wait_for()
        live.wait_idle()


def test_a_narrow_screen(model: Any, page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    with serve(model) as live:
        page.goto(live.url)
        page.locator("#status[data-state=live]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
        for name in ("timeline", "pool", "ttft", "itl"):
            assert page.locator(f"#{name}").bounding_box()["width"] > 250
