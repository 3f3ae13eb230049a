"""Host and device as two clocks: when a stream of kernels ends that the host issues one by one and the device runs in order.

CUDA launches are asynchronous ("CUDA semantics", PyTorch documentation): the host runs ahead while kernels are long and is waited for while they are
short. Issuing takes e a kernel; the device starts a kernel when it is issued and the one before has ended:

    host <- host + e        device <- max(device, host) + d

and where the host waits for the device (a copy to the CPU, say), both become the later of the two. Each of these steps is a 2 x 2 matrix over
(max, +), so a layer is one matrix, too, and a model their product: exact, and as cheap for ten thousand layouts as for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelab.simulate.layouts import Array

NEVER = -np.inf


@dataclass(frozen=True)
class Span:
    """What a stretch of kernels does to the clocks; arrays of n, microseconds. `device_from_host` is added to the host's time before, and so on:

    host    <- max(host + host_from_host, device + host_from_device)
    device  <- max(host + device_from_host, device + device_from_device)
    """

    host_from_host: Array | float = 0.0
    host_from_device: Array | float = NEVER
    device_from_host: Array | float = NEVER
    device_from_device: Array | float = 0.0

    def then(self, after: Span) -> Span:
        """Both stretches, one after the other."""
        a, b = self, after
        return Span(
            np.maximum(a.host_from_host + b.host_from_host, a.device_from_host + b.host_from_device),
            np.maximum(a.host_from_device + b.host_from_host, a.device_from_device + b.host_from_device),
            np.maximum(a.host_from_host + b.device_from_host, a.device_from_host + b.device_from_device),
            np.maximum(a.host_from_device + b.device_from_host, a.device_from_device + b.device_from_device),
        )

    @property
    def ends(self) -> Array | float:
        """Both clocks at 0 before: when the device has ended."""
        return np.maximum(self.device_from_host, self.device_from_device)


WAIT = Span(0.0, 0.0, 0.0, 0.0)
"""The host waits until the device has done all it was given."""


def kernels(count: Array | float, issue: Array | float, each: Array | float) -> Span:
    """`count` equal kernels that take `issue` on the host and `each` on the device; 0 of them change nothing.

    Either the device is behind, and they run back to back, or it waits for the first, or for the last of them to be issued.
    """
    device = np.maximum(issue + count * each, count * issue + each)
    return Span(count * issue, NEVER, np.where(np.asarray(count) > 0, device, NEVER), count * each)
