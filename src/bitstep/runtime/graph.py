"""A function of tensors on an NVIDIA GPU, captured as a CUDA graph: what a tape (:mod:`bitstep.runtime.tape`) is to
the CPU.

One launch runs every program of a forward pass, in memory that never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bitstep.errors import first_line
from bitstep.runtime.tape import copy, distinct, listen, tensors_of


def record(function: Callable[..., Any], *args: Any) -> tuple[Any, Graph | None, str | None]:
    """``function(*args)``, and the graph that computes it for other values in ``args``, or why there is none.

    As :func:`bitstep.runtime.tape.record`. Tensors of ``args`` that are on the CPU, say a timestep, are handed to the
    captured function on the GPU where the others are.
    """
    result, recorder = listen(function, *args)
    if recorder.refusal:
        return result, None, recorder.refusal
    try:
        return result, Graph(function, args, list(recorder.constants.values())), None
    except Exception as error:  # whatever a driver, a library or a compiler may raise
        return result, None, f"it cannot be captured ({first_line(error)})"


class Graph:
    """A captured function with the memory of its arguments and results, and what else it reads: ``constants``."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], constants: Sequence[Tensor]) -> None:
        self._device = next(tensor.device for tensor in tensors_of(args) if tensor.is_cuda)
        self._constants = constants
        self._states = list(map(_state, constants))
        leaves, spec = tree_flatten(args)
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            placed = [copy(leaf, self._device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._inputs = [distinct(tensor) for tensor in tensors_of(placed)]
            self._graph, result = _captured(lambda: function(*tree_unflatten(placed, spec)))
            self._outputs, self._spec = tree_flatten(result)
            self._done = torch.cuda.Event()

    def is_stale(self) -> bool:
        """Whether a constant was changed in place, or lies elsewhere by now."""
        return list(map(_state, self._constants)) != self._states

    def run(self, *args: Any) -> Any:
        """What the captured function gives for ``args``, in new tensors."""
        with torch.cuda.device(self._device):
            self._done.wait()  # the last run may have been on another stream
            for static, given in zip(self._inputs, tensors_of(args), strict=True):
                # memory that is not pinned has been read when the call returns
                static.copy_(distinct(given), non_blocking=not given.is_pinned())
            self._graph.replay()
            leaves = [copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._outputs]
            self._done.record()
        return tree_unflatten(leaves, self._spec)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of ``function()`` on the current device, and the static result."""
    device = torch.cuda.current_device()
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), _stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # and back, also where a capture fails, after which torch would stay there
        function()  # what libraries set up for a stream at its first use is no part of a graph
        try:
            # other threads may do what would spoil a capture of theirs
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = function()
        except BaseException:
            _clean_up(device, pool)
            raise
    return graph, result


def _clean_up(device: int, pool: Any) -> None:
    """Do what torch leaves undone when a capture cannot be ended: without it, the allocator and the random numbers of
    the device would take the capture to be still under way."""
    with suppress(RuntimeError):  # it was ended after all
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures: libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)
