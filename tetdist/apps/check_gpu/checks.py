"""Checks by name, ordered so that the first failure explains later ones."""

from tetdist.apps.check_gpu.check import Check
from tetdist.apps.check_gpu.graphs import check_graphs
from tetdist.apps.check_gpu.images import check_pixels
from tetdist.apps.check_gpu.numerics import check_numerics
from tetdist.apps.check_gpu.rates import check_rates
from tetdist.apps.check_gpu.resume import check_resume
from tetdist.apps.check_gpu.steps import check_steps
from tetdist.apps.check_gpu.versions import check_versions

# A step computes with kernels; graphs repeat steps; runs and rates take them.
CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "numerics": check_numerics,
    "steps": check_steps,
    "graphs": check_graphs,
    "resume": check_resume,
    "rates": check_rates,
    "pixels": check_pixels,
}
