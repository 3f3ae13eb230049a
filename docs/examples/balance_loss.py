"""How hard must the gate be pushed towards balance? (beyond the paper, which sets the auxiliary loss to 0.01)"""

from moelab.config import RoutingConfig
from moelab.design.experiment import Experiment, twin_scales

ARMS = {
    f"weight {weight:g}": {"name": "350M+MoE-128", "routing": RoutingConfig(drop_tokens=False, aux_loss=weight)}
    for weight in (0.0, 0.01, 0.1)
}

EXPECTED = [("weight 0", "weight 0.01", "above"), ("weight 0.1", "weight 0.01", "cannot tell")]

EXPERIMENT = Experiment(
    name="balance-loss",
    number=30,
    title="How much balance the gate needs",
    paper="beyond the paper",
    question="What happens without the auxiliary loss?",
    paper_answer="Not examined; its weight is 0.01 throughout.",
    scales=twin_scales(runs=2),
    arms=ARMS,
)
