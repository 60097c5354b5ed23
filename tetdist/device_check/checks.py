"""The checks by name, in an order in which the first that fails explains those after it."""

from tetdist.device_check.check import Check
from tetdist.device_check.graphs import check_graphs
from tetdist.device_check.images import check_loading, check_pixels
from tetdist.device_check.links import check_links
from tetdist.device_check.numerics import check_numerics
from tetdist.device_check.rates import check_rates
from tetdist.device_check.resume import check_resume
from tetdist.device_check.steps import check_steps
from tetdist.device_check.versions import check_versions

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
