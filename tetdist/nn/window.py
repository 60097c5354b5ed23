"""The windows of a max-pooling whose spikes are in bytes, as its kernels take them."""

from typing import NamedTuple

import torch


class Window(NamedTuple):
    """Side, stride and border of square windows."""

    kernel: int
    stride: int
    padding: int

    @classmethod
    def of(cls, pool: torch.nn.MaxPool2d) -> "Window":
        """The windows of a max-pooling without dilation, whose last ones are whole."""
        kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
        assert isinstance(kernel, int)
        assert isinstance(stride, int)
        assert isinstance(padding, int)
        assert kernel <= 16, "positions in a window are bytes"
        assert pool.dilation == 1
        assert not pool.ceil_mode
        return cls(kernel, stride, padding)

    def outputs(self, size: int) -> int:
        """Number of windows along a side of ``size`` pixels."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1
