"""Checks by name, ordered so that the first failure explains later ones."""

from tetdist.apps.check_gpu.check import Check
from tetdist.apps.check_gpu.graphs import check_graphs
from tetdist.apps.check_gpu.images import check_loading, check_pixels
from tetdist.apps.check_gpu.links import check_links
from tetdist.apps.check_gpu.numerics import check_numerics
from tetdist.apps.check_gpu.rates import check_rates
from tetdist.apps.check_gpu.resume import check_resume
from tetdist.apps.check_gpu.steps import check_steps
from tetdist.apps.check_gpu.versions import check_versions

CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "numerics": check_numerics,
    "steps": check_steps,
    "graphs": check_graphs,
    "links": check_links,
    "pixels": check_pixels,
    "resume": check_resume,
    "rates": check_rates,
    "loading": check_loading,
}
