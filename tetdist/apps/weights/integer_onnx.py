"""A step of an `IntegerNetwork` as an ONNX graph of integer operators.

Activations have channels last, so that a convolution is copies of pixels and one MatMulInteger.
onnxruntime's ConvInteger of signed weights is five times slower than float32. The decay's shift is
BitShift, which takes unsigned numbers: membranes plus 2^30, or 2^62 if they are multiplied first.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tetdist.apps.weights.integer_network import MEMBRANE_BITS, STREAM_BITS, IntegerNetwork

_Array = np.ndarray[Any, Any]
_TYPES = {
    np.dtype(kind): getattr(onnx.TensorProto, kind.upper())
    for kind in ("uint8", "int32", "int64", "uint32", "uint64")
}


def save_step(network: IntegerNetwork, path: Path, metadata: dict[str, str]) -> None:
    """Write a graph from ``frame`` (B, C, H, W), uint8, and states to ``logits`` and states, int32.

    States have channels last, and are 0 before the first step.
    """
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(_Graph(network).build(), opset_imports=opsets, ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class _Graph:
    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        shape = network.description["input"]["shape"]
        self.layers = {"frame": {"shape": shape, "bits": 8}}
        self.layers |= {layer["name"]: layer for layer in network.layers}
        self.inputs = [_value("frame", np.uint8, shape)]
        self.outputs = [_value("logits", np.int32, [network.num_classes])]
        self.names: dict[str, str] = {}

    def build(self) -> onnx.GraphProto:
        self.names["frame"] = self.add("Transpose", "frame", perm=[0, 2, 3, 1])
        for layer in self.network.layers:
            self.names[layer["name"]] = self.layer(layer, self.network.numbers(layer["name"]))
        return helper.make_graph(self.nodes, "step", self.inputs, self.outputs, self.constants)

    def add(self, op: str, *inputs: str | _Array, to: str = "", **attributes: Any) -> str:
        """Add a node, whose inputs may be arrays, and return the name of its output."""
        names, to = [], to or f"value{len(self.nodes)}"
        for one in inputs:
            if not isinstance(one, str):
                name = f"constant{len(self.constants)}"
                self.constants.append(numpy_helper.from_array(np.ascontiguousarray(one), name))
                one = name  # its name takes its place
            names.append(one)
        self.nodes.append(helper.make_node(op, names, [to], **attributes))
        return to

    def cast(self, x: str, kind: Any) -> str:
        name = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [x], [name], to=_TYPES[np.dtype(kind)]))
        return name

    def wide(self, name: str) -> str:
        """Return a layer's output as int32."""
        is_byte = self.layers[name]["bits"] == 8
        return self.cast(self.names[name], np.int32) if is_byte else self.names[name]

    def layer(self, layer: dict[str, Any], values: dict[str, _Array]) -> str:
        """Add a layer's nodes, and return the name of its output."""
        first = layer["inputs"][0]
        x = self.names[first]
        match layer["op"]:
            case "offset":
                return x  # In the convolution.
            case "conv":
                return self.convolution(layer, values["weight"], x)
            case "linear":
                if len(self.layers[first]["shape"]) == 3:
                    x = self.add("Flatten", self.add("Transpose", x, perm=[0, 3, 1, 2]))
                return self.product(x, values["weight"].T, is_byte=self.layers[first]["bits"] == 8)
            case "scale":
                return self.add("Mul", self.wide(first), values["gain"])
            case "neurons":
                return self.neurons(layer, values)
            case "stream":
                terms = zip(layer["inputs"], values["gains"], strict=True)
                wide = [self.add("Mul", self.cast(self.wide(n), np.int64), g) for n, g in terms]
                return self.shifted(self.total([*wide, values["bias"]]), STREAM_BITS)
            case "add":
                return self.cast(self.total([self.wide(n) for n in layer["inputs"]]), np.uint8)
            case "max_pool":
                x = self.add("Transpose", x, perm=[0, 3, 1, 2])
                x = self.add(
                    "MaxPool",
                    x,
                    kernel_shape=2 * [layer["kernel"]],
                    strides=2 * [layer["stride"]],
                    pads=4 * [layer["padding"]],
                )
                return self.add("Transpose", x, perm=[0, 2, 3, 1])
            case "sum_pool":
                side = layer["kernel"]
                y = self.total(self.windows(self.wide(first), side, side, layer["shape"]))
                return self.cast(y, np.uint8) if layer["bits"] == 8 else y
            case "logits":
                return self.add("Add", x, values["bias"], to="logits")
        raise AssertionError(layer["op"])

    def total(self, terms: list[Any]) -> str:
        x, *more = terms
        for one in more:
            x = self.add("Add", x, one)
        return x

    def windows(self, x: str, kernel: int, stride: int, shape: list[int]) -> list[str]:
        """Return each place of a window, over all windows of an output of a shape (C, H, W)."""
        axes, steps = np.array([1, 2]), np.array([stride, stride])
        last = [stride * (side - 1) + 1 for side in shape[1:]]
        return [
            self.add("Slice", x, np.array([i, j]), np.array([i, j]) + last, axes, steps)
            for i in range(kernel)
            for j in range(kernel)
        ]

    def convolution(self, layer: dict[str, Any], weight: _Array, x: str) -> str:
        source, padding, kernel = layer["inputs"][0], layer["padding"], weight.shape[-1]
        pixels = self.layers[source].get("op") == "offset"
        is_byte = pixels or self.layers[source]["bits"] == 8
        if padding:
            zero = np.array(0, np.uint8 if is_byte else np.int32)
            x = self.add("Pad", x, np.array([0, padding, padding, 0] * 2), zero)
        if pixels:
            zeros = self.network.numbers(source)["zero"]
            # Padding is each channel's zero, so its part of the sums is the same everywhere.
            inside = np.ones([1, *self.layers[source]["shape"][1:], 1], bool)
            inside = np.pad(inside, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
            x = self.add("Where", inside, x, zeros.astype(np.uint8))
        places = self.windows(x, kernel, layer["stride"], layer["shape"])
        x = self.add("Concat", *places, axis=3) if len(places) > 1 else places[0]
        rows = weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
        x = self.product(x, rows, is_byte=is_byte)
        if pixels:
            x = self.add("Sub", x, (weight.sum((2, 3)) @ zeros).astype(np.int32))
        return x

    def product(self, x: str, weight: _Array, *, is_byte: bool) -> str:
        if is_byte:
            return self.add("MatMulInteger", x, weight)
        return self.add("MatMul", x, weight.astype(np.int32))

    def shifted(self, x: str, bits: int) -> str:
        """Return int64 divided by 2^bits, rounded down, as int32."""
        x = self.cast(self.add("Add", x, np.array(2**60)), np.uint64)
        x = self.add("BitShift", x, np.array(bits, np.uint64), direction="RIGHT")
        return self.cast(
            self.add("Sub", self.cast(x, np.int64), np.array(2 ** (60 - bits))), np.int32
        )

    def neurons(self, layer: dict[str, Any], values: dict[str, _Array]) -> str:
        channels, *sides = layer["shape"]
        bias, state = values["bias"], f"state_{layer['name']}"
        of = np.int32, [*sides, channels]
        self.inputs.append(_value(state, *of))
        self.outputs.append(_value(f"next_{state}", *of))
        (factor, bits), kept = layer["decay"], state
        if factor == 1 and bits:
            half = 2 ** (MEMBRANE_BITS - bits)
            kept = self.cast(
                self.add("Add", state, np.array(2**MEMBRANE_BITS, np.int32)), np.uint32
            )
            kept = self.add("BitShift", kept, np.array(bits, np.uint32), direction="RIGHT")
            kept, bias = self.cast(kept, np.int32), bias - np.int32(half)
        elif bits or not factor:
            kept = self.add("Mul", self.cast(state, np.int64), np.array(factor))
            kept = self.shifted(kept, bits)
        currents = [
            self.add("Mul", self.wide(name), np.array(2**shift, np.int32))
            if shift
            else self.wide(name)
            for name, shift in zip(layer["inputs"], layer["shifts"], strict=True)
        ]
        v = self.total([kept, *currents, bias])
        fired = [self.add("Greater", v, one) for one in values["thresholds"]]
        if "step" not in values:
            self.add("Where", fired[0], np.array(0, np.int32), v, to=f"next_{state}")
            return self.cast(fired[0], np.uint8)
        count = self.total([self.cast(one, np.int32) for one in fired])
        self.add("Sub", v, self.add("Mul", count, values["step"]), to=f"next_{state}")
        return self.cast(count, np.uint8)


def _value(name: str, kind: Any, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[np.dtype(kind)], ["batch", *shape])
