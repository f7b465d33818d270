"""One seed for a page, and no network."""
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from lib.book import generator, offline, rng, seed


def test_the_same_seed_repeats_and_streams_differ(monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "3")
    assert seed() == 3
    a, b, c = rng().normal(size=4), rng().normal(size=4), rng(1).normal(size=4)
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    d, e, f = (torch.rand(4, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(d, e) and not torch.equal(d, f)
    monkeypatch.setenv("BOOK_SEED", "4")
    assert not np.array_equal(a, rng().normal(size=4)) and not torch.equal(d, torch.rand(4, generator=generator()))


@pytest.mark.parametrize("text", ["", "-1", "one", "1.5"])
def test_a_bad_seed_is_refused(monkeypatch, text):
    monkeypatch.setenv("BOOK_SEED", text)
    with pytest.raises(ValueError, match="BOOK_SEED"):
        seed()


@pytest.mark.parametrize("stream", [-1, 0.5, True, "a"])
def test_a_bad_stream_is_refused(stream):
    with pytest.raises(ValueError, match="stream"):
        rng(stream)


def test_the_network_is_blocked_and_localhost_is_not():
    with socket.socket() as s, pytest.raises(offline.NetworkBlocked):
        s.connect(("192.0.2.1", 80))          # TEST-NET-1: no such host exists
    with pytest.raises(offline.NetworkBlocked):
        socket.getaddrinfo("example.org", 80)
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_importing_lib_is_cheap():
    """Under 50 ms, and nothing heavy comes along; the best of three, since the first start of an interpreter may read from disk."""
    code = "import time, sys; t = time.perf_counter(); import lib, lib.book; t = time.perf_counter() - t; assert not {'numpy', 'torch', 'matplotlib'} & set(sys.modules); print(t)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 0.05
