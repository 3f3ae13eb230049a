"""Host and device as two clocks: when a stream of kernels ends that the host issues and the device runs in order.

CUDA launches are asynchronous ("CUDA semantics", PyTorch documentation): the host runs ahead while kernels are long,
and the device waits for the host while they are short. To issue a kernel takes time e on the host. The device starts a
kernel, which takes time d, when it is issued and the kernel before has ended:

    host <- host + e        device <- max(device, host) + d

Where the host waits for the device (at a copy to the CPU, for example), both become the later of the two. Each of these
steps is a 2 x 2 matrix over (max, +). So a layer is one matrix, too, and a model the product of its layers' matrices.
This is exact, and costs as much for ten thousand layouts as for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelab.simulate.layouts import Array

NEVER = -np.inf


@dataclass(frozen=True)
class Span:
    """The effect of a sequence of kernels on the clocks; arrays of n, microseconds.

    `device_from_host` is what is added to the host's time before to get the device's time after, and so on:

    host    <- max(host + host_from_host, device + host_from_device)
    device  <- max(host + device_from_host, device + device_from_device)
    """

    host_from_host: Array | float = 0.0
    host_from_device: Array | float = NEVER
    device_from_host: Array | float = NEVER
    device_from_device: Array | float = 0.0

    def then(self, after: Span) -> Span:
        """Return the span of both sequences, one after the other."""
        a, b = self, after
        return Span(
            np.maximum(a.host_from_host + b.host_from_host, a.device_from_host + b.host_from_device),
            np.maximum(a.host_from_device + b.host_from_host, a.device_from_device + b.host_from_device),
            np.maximum(a.host_from_host + b.device_from_host, a.device_from_host + b.device_from_device),
            np.maximum(a.host_from_device + b.device_from_host, a.device_from_device + b.device_from_device),
        )

    @property
    def ends(self) -> Array | float:
        """When the device has ended, if both clocks were at 0 before."""
        return np.maximum(self.device_from_host, self.device_from_device)


WAIT = Span(0.0, 0.0, 0.0, 0.0)
"""The host waits until the device has run all kernels that were issued."""


def kernels(count: Array | float, issue: Array | float, each: Array | float) -> Span:
    """Return the span of `count` equal kernels that take `issue` on the host and `each` on the device.

    If the device is behind, they run without gaps; else it waits for the first, or for the last of them to be issued.
    No kernels change nothing.
    """
    device = np.maximum(issue + count * each, count * issue + each)
    return Span(count * issue, NEVER, np.where(np.asarray(count) > 0, device, NEVER), count * each)
