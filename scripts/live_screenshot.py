"""Takes docs/live.png: the live page in headless Chromium, while SmolLM2 answers a crowd of chats.

    python scripts/live_screenshot.py docs/live.png [--dark] [--phone]

Needs the extras `server` and `demo`, the playwright package, and a Chromium.
"""

from __future__ import annotations

import argparse
import random
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from playwright.sync_api import sync_playwright

import hf_paged
from hf_paged.bench.models import load_smollm2
from hf_paged.demo import chats
from hf_paged.integrations.openai_server import ServerOptions, make_app
from hf_paged.integrations.openai_server.http_server import HttpServer


def ask(url: str, draw: random.Random, until: float) -> None:
    """A client that asks one question after another."""
    with httpx.Client(timeout=300) as client:
        while time.monotonic() < until:
            body: dict[str, Any] = {"messages": draw.choice(chats()), "max_tokens": draw.randrange(12, 110), "seed": 1}
            body["n"] = draw.choice([1, 1, 1, 3])
            client.post(f"{url}/v1/chat/completions", json=body)
            time.sleep(draw.expovariate(0.7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--seconds", type=float, default=36)
    given = parser.parse_args()
    model, tokenizer = load_smollm2(torch.float32)
    hf_paged.wrap(
        model, tokenizer=tokenizer, page_size=16, num_pages=400, max_num_seqs=10, speculative_config={"method": "ngram"}
    )
    app = make_app(model, ServerOptions(served_model_name=["SmolLM2-135M-Instruct"]))
    server = HttpServer(uvicorn.Config(app, log_level="warning"))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True).start()
    while not server.started:
        time.sleep(0.1)
    size = {"width": 390, "height": 844} if given.phone else {"width": 1440, "height": 860}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        page = browser.new_page(viewport=size, color_scheme="dark" if given.dark else "light")  # type: ignore[arg-type]
        page.on("console", lambda message: print("console:", message.text))
        page.on("pageerror", lambda error: print("page error:", error))
        page.goto(url)
        until = time.monotonic() + given.seconds
        for seed in range(6):
            threading.Thread(target=ask, args=(url, random.Random(seed), until), daemon=True).start()
        page.wait_for_timeout(1000 * given.seconds - 16_000)
        page.get_by_label("Message").fill("Why is the sky blue? Two sentences.")
        page.get_by_role("button", name="Send").click()
        page.wait_for_timeout(14_000)
        page.screenshot(path=given.out, full_page=given.phone)
        browser.close()
    server.should_exit = True


if __name__ == "__main__":
    main()
