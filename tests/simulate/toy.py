"""A small cluster and round constants, for counts by hand."""

from moelab.simulate.constants import Constants
from moelab.simulate.hardware import Cluster, Gpu

ROUND = Constants(
    eager_us=10.0, memory_share=0.5, far_us=4.0, near_us=1.0, collective_us=10.0, near_share=1.0, far_share=0.5,
    matmul_share=0.5, hop_us=4.0, kernel_us=0.0, reserved_gib=0.0,
)  # fmt: skip
TOY = Cluster("toy", Gpu("toy", memory_gib=1.0, memory_gb_s=20.0, tflops=1.0), 2, near_gb_s=10.0, far_gb_s=2.0)
