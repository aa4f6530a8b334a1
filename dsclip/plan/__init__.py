"""What a step costs before it is run: memory by part, communication, operations; and the cheapest way that fits."""

from dsclip.plan.choose import plan_batch, plan_recipe
from dsclip.plan.estimate import Estimate, estimate
from dsclip.plan.machine import Machine

__all__ = ["Estimate", "Machine", "estimate", "plan_batch", "plan_recipe"]
