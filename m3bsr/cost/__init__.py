"""What training costs: operations counted, memory and time measured. Knows torch modules, nothing of this library."""

from m3bsr.cost.flops import MacCount, MacCounter, count_macs
from m3bsr.cost.measure import CostReport, measure_step
from m3bsr.cost.memory import peak_growth, resident_growth
from m3bsr.cost.params import optimizer_state_bytes, parameter_cost
from m3bsr.cost.saved import SavedBytes
from m3bsr.cost.timing import Timing, paired_ratio, time_interleaved, time_steps

__all__ = [
    "CostReport",
    "MacCount",
    "MacCounter",
    "SavedBytes",
    "Timing",
    "count_macs",
    "measure_step",
    "optimizer_state_bytes",
    "paired_ratio",
    "parameter_cost",
    "peak_growth",
    "resident_growth",
    "time_interleaved",
    "time_steps",
]
