"""What training costs: operations counted, memory and time measured, for any torch module; and predicted, for a ViT
under a plan, which is what ``suggest_plan`` chooses by."""

from m3bsr.cost.flops import MacCount, MacCounter, count_macs
from m3bsr.cost.measure import CostReport, measure_step, step_peak
from m3bsr.cost.memory import peak_growth, resident_growth
from m3bsr.cost.params import optimizer_state_bytes, parameter_cost
from m3bsr.cost.parts import Precision
from m3bsr.cost.predict import Prediction, predict_step
from m3bsr.cost.saved import SavedBytes
from m3bsr.cost.search import Suggestion, SuggestionTable, published_plan, search_plans
from m3bsr.cost.suggest import suggest_plan
from m3bsr.cost.timing import Timing, paired_ratio, time_interleaved, time_steps

__all__ = [
    "CostReport",
    "MacCount",
    "MacCounter",
    "Precision",
    "Prediction",
    "SavedBytes",
    "Suggestion",
    "SuggestionTable",
    "Timing",
    "count_macs",
    "measure_step",
    "optimizer_state_bytes",
    "paired_ratio",
    "parameter_cost",
    "peak_growth",
    "predict_step",
    "published_plan",
    "resident_growth",
    "search_plans",
    "step_peak",
    "suggest_plan",
    "time_interleaved",
    "time_steps",
]
