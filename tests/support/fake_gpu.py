"""A GPU whose streams are done at once: CPU tensors through the code that talks to `torch.cuda`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentcache.vae import encoder


class FakeGpu:
    """Puts stand-ins into `torch.cuda` while a test runs.

    `waits` lists the events that were waited for, by when each was recorded among those that block;
    to wait for one that was never recorded is an error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[int] = []
        self._num_blocking = 0
        cuda, empty = torch.cuda, torch.empty

        def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            return empty(*size, **options)

        monkeypatch.setattr(torch, "empty", unpinned)
        monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
        monkeypatch.setattr(cuda, "Event", lambda timing, blocking: _Event(self, timing, blocking))
        monkeypatch.setattr(cuda, "Stream", _Stream)
        monkeypatch.setattr(cuda, "current_stream", _Stream)
        for context in ("stream", "device"):
            monkeypatch.setattr(cuda, context, lambda *_: nullcontext())
        properties = SimpleNamespace(name="no GPU", total_memory=2**30)
        monkeypatch.setattr(cuda, "get_device_properties", lambda *_: properties)

    def make(self) -> encoder._Gpu:
        """What an encoder on this GPU has."""
        return encoder._Gpu(torch.device("cpu"))


class _Event:
    def __init__(self, gpu: FakeGpu, timing: bool, blocking: bool) -> None:
        self._gpu, self._timing, self._blocking = gpu, timing, blocking
        self._at: float | None = None

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()
        if self._blocking:
            self._number = self._gpu._num_blocking
            self._gpu._num_blocking += 1

    def synchronize(self) -> None:
        assert self._at is not None
        if self._blocking:
            self._gpu.waits.append(self._number)

    def elapsed_time(self, end: _Event) -> float:
        assert self._timing
        assert end._timing
        assert self._at
        assert end._at
        return (end._at - self._at) * 1e3


class _Stream:
    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        assert event._at is not None
