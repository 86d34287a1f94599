"""Other runtimes, to be measured beside ours: each takes a module of tensors and makes a faster function of it.

None is a dependency: what a runtime needs is imported when it is asked for (``pip install bitstep[bench]`` brings
OpenVINO, NNCF and ONNX Runtime). Integers are calibrated on the example inputs alone: enough to measure speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import Call, run

Function = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """``compile(module, inputs)`` is ``module`` as a function of tensors like ``inputs``; it imports ``packages``."""

    packages: tuple[str, ...]
    compile: Callable[[nn.Module, Inputs], Function]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name.split(".")[0]) is None]


class OfTensors(nn.Module):
    """A denoiser as a function of the tensors in one of its calls, ``inputs`` being those of ``call``."""

    def __init__(self, denoiser: nn.Module, call: Call) -> None:
        super().__init__()
        self.denoiser, self._call = denoiser, call
        self._names, self.inputs = tuple(call.tensors), tuple(call.tensors.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        values = dict(zip(self._names, inputs, strict=True))
        return run(self.denoiser, self._call.map(lambda name, _: values[name]))


def _openvino(module: nn.Module, inputs: Inputs, *, int8: bool, precision: str) -> Function:
    import openvino as ov

    model = ov.convert_model(module, example_input=inputs, input=[tuple(x.shape) for x in inputs])
    if int8:
        import nncf

        data = nncf.Dataset([tuple(x.numpy() for x in inputs)])
        kind = nncf.ModelType.TRANSFORMER if _is_transformer(module) else None
        model = nncf.quantize(model, data, model_type=kind, subset_size=1)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def function(*inputs: Tensor) -> Tensor:
        results = request.infer([x.numpy() for x in inputs], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return function


def _onnxruntime(module: nn.Module, inputs: Inputs) -> Function:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    names = [f"x{i}" for i in range(len(inputs))]

    def feed(*inputs: Tensor) -> dict[str, Any]:
        return {name: x.numpy() for name, x in zip(names, inputs, strict=True)}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([feed(*inputs)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/model.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(module, inputs, source, input_names=names, dynamo=False)
        quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    return lambda *inputs: torch.from_numpy(session.run(None, feed(*inputs))[0])


def _torchao(module: nn.Module, inputs: Inputs) -> Function:
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(module)  # type: ignore[no-any-return, unused-ignore]


def _quanto(module: nn.Module, inputs: Inputs) -> Function:
    from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-not-found, unused-ignore]

    quantize(module, weights=qint8, activations=qint8)
    freeze(module)
    return module


def _is_transformer(module: nn.Module) -> bool:
    """Whether most weights are in linear layers."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    linear, convolution = (sum(m.weight.numel() for m in module.modules() if isinstance(m, kind)) for kind in kinds)
    return bool(linear > convolution)


_OPENVINO = ("openvino", "nncf")
PEERS = {
    "openvino": Peer(_OPENVINO[:1], partial(_openvino, int8=False, precision="f32")),
    "openvino-int8": Peer(_OPENVINO, partial(_openvino, int8=True, precision="f32")),
    "openvino-int8-bf16": Peer(_OPENVINO, partial(_openvino, int8=True, precision="bf16")),
    "onnxruntime-int8": Peer(("onnx", "onnxruntime"), _onnxruntime),
    "torchao-int8": Peer(("torchao",), _torchao),
    "quanto-int8": Peer(("optimum.quanto",), _quanto),
}
"""By the names that ``bitstep benchmark --against`` takes."""
