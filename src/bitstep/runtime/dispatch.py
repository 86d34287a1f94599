"""The choice of a kernel for every packed layer: the first that does not refuse, or the one that was asked for."""

from __future__ import annotations

from functools import partial

from torch import nn

from bitstep.errors import BitstepError, UsageError
from bitstep.runtime.attention import PackedAttention
from bitstep.runtime.cpu import CpuKernel
from bitstep.runtime.cuda import CudaKernel
from bitstep.runtime.kernel import Kernel, Problem
from bitstep.runtime.layers import PackedModule
from bitstep.runtime.onednn import OneDnnKernel
from bitstep.runtime.reference import FloatKernel, ReferenceKernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (CpuKernel(), OneDnnKernel(), CudaKernel(), ReferenceKernel())
}
"""Every kernel of quantized activations by name, the fastest of a device first."""
FLOAT = FloatKernel()


def reasons(problem: Problem) -> dict[str, list[str]]:
    """Why each kernel cannot run ``problem``; an empty list where it can."""
    return {name: kernel.unsupported(problem) for name, kernel in KERNELS.items()}


def choose(problem: Problem, backend: str | None = None) -> Kernel:
    """The first kernel that runs ``problem``, or the one named ``backend``; BitstepError when that one refuses.

    Activations in floating point are the business of no backend but the reference.
    """
    if problem.activation_bits is None and backend != ReferenceKernel.name:
        return FLOAT
    if backend is None:
        return next(kernel for kernel in KERNELS.values() if not kernel.unsupported(problem))
    kernel = named(backend)
    if why := kernel.unsupported(problem):
        able = [name for name, refusals in reasons(problem).items() if not refusals]
        raise BitstepError(f"backend {backend!r} refuses: {', '.join(why)} (able: {', '.join(able)})")
    return kernel


def named(backend: str) -> Kernel:
    """The kernel of that name, or UsageError."""
    if backend not in KERNELS:
        raise UsageError(f"there is no backend named {backend!r}: expected one of {', '.join(KERNELS)}")
    return KERNELS[backend]


def set_backend(model: nn.Module, backend: str | None = None) -> None:
    """Choose the kernel of every packed layer of ``model``; ``backend`` forces one kernel by name.

    The weights are re-laid out for it when a layer first runs. Quantized attention runs natively with the ``cpu``
    kernel and as in training with any other. BitstepError, with the reasons and the layers, when the kernel cannot run
    them all; the model is then unchanged.
    """
    if backend is not None:
        named(backend)
    layers = packed_layers(model)
    refused: dict[str, list[str]] = {}
    for name, layer in layers.items():
        try:
            choose(layer.problem, backend)
        except BitstepError as error:
            refused.setdefault(str(error), []).append(name)
    if refused:
        raise BitstepError("; ".join(f"{_first_of(names)}: {why}" for why, names in refused.items()))
    for layer in layers.values():
        layer.choose = partial(choose, backend=backend)
        layer.forget_kernel()
    for module in model.modules():
        if isinstance(module, PackedAttention):
            module.native = backend in (None, CpuKernel.name)


def kernels_in_use(model: nn.Module) -> dict[str, str]:
    """The name of the kernel that runs each packed layer, by the layer's name."""
    return {name: layer.kernel.name for name, layer in packed_layers(model).items()}


def packed_layers(model: nn.Module) -> dict[str, PackedModule]:
    """The packed layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
