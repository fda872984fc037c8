"""Which configuration comes next: grid and random here, bayes and hyperband through the `sweeps` package.

Grid order is W&B's own: parameters sorted by name at each nesting level, their product with the last one fastest. A
point of the grid is computed from its number, so that a grid costs nothing until it is handed out. A random point
depends on the sweep and its number alone, so that a restarted server draws what the first one would have drawn.
Source of the format: W&B's documentation, "Define a sweep configuration".
"""

import functools
import json
import math
import random
from dataclasses import dataclass, field

import yaml

INSTALL = "pip install --no-deps sweeps && pip install scikit-learn scipy jsonschema jsonref pydantic"


class BadSweep(Exception):
    """The sweep's configuration cannot be used; the message is one line that says what to change."""


@dataclass(frozen=True)
class Search:
    """A checked sweep configuration. `axes`: for a grid, (path, values) of every parameter that has a choice."""

    config: dict
    method: str
    parameters: dict
    metric: str | None = None
    goal: str = "minimize"
    run_cap: int | None = None
    early: bool = False
    axes: tuple = field(default=())

    @property
    def size(self) -> int | None:
        """How many points there are to run; None without an end."""
        grid = math.prod(len(values) for _, values in self.axes) if self.method == "grid" else None
        return min((n for n in (grid, self.run_cap) if n is not None), default=None)

    def grid_point(self, index: int) -> dict:
        """The parameters of grid point `index`."""
        point = _constants(self.parameters)
        for path, values in reversed(self.axes):
            index, choice = divmod(index, len(values))
            _put(point, path, values[choice])
        return point

    def grid_index(self, point: dict) -> int | None:
        """The number of a grid point, None where the grid holds no such point."""
        index = 0
        for path, values in self.axes:
            keys = [_key(value) for value in values]
            wanted = _key(functools.reduce(lambda d, k: d.get(k) if isinstance(d, dict) else None, path, point))
            if wanted not in keys:
                return None
            index = index * len(values) + keys.index(wanted)
        return index if _key(self.grid_point(index)) == _key(point) else None


@functools.lru_cache(maxsize=256)
def parse_sweep(text: str) -> Search:
    """Reads and checks a sweep's YAML. Raises `BadSweep`."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadSweep(f"sweep configuration is no YAML: {error}") from None
    if not isinstance(config, dict):
        raise BadSweep("sweep configuration: expected a mapping with method and parameters")
    method, parameters = config.get("method", "grid"), config.get("parameters")
    if method not in ("grid", "random", "bayes"):
        raise BadSweep(f"method: expected grid, random or bayes, got {method!r}")
    if not isinstance(parameters, dict) or not parameters:
        raise BadSweep("parameters: expected at least one parameter")
    metric = config.get("metric") or {}
    early = config.get("early_terminate")
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise BadSweep(f"metric.goal: expected minimize or maximize, got {goal!r}")
    if (method == "bayes" or early) and not metric.get("name"):
        raise BadSweep(f"metric.name: {'early_terminate' if early else 'method bayes'} needs it")
    if early and (not isinstance(early, dict) or early.get("type") != "hyperband"):
        raise BadSweep("early_terminate.type: expected hyperband")
    if (method == "bayes" or early) and not library():
        wanted = "method bayes" if method == "bayes" else "early_terminate hyperband"
        raise BadSweep(f"{wanted} needs the `sweeps` package beside the server: {INSTALL}")
    cap = config.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise BadSweep(f"run_cap: expected a whole number above 0, got {cap!r}")
    _check(parameters, ())
    axes = tuple(_axes(parameters, ())) if method == "grid" else ()
    return Search(config, method, parameters, metric.get("name"), goal, cap, bool(early), axes)


def library():
    """The `sweeps` package, or None where it is not installed."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import sweeps

            return sweeps if hasattr(sweeps, "next_run") else None  # a folder of that name is not the package
        except ImportError:
            return None


def random_point(parameters: dict, rng: random.Random) -> dict:
    """One draw of every parameter, nested as they are."""
    point = {}
    for name, spec in sorted(parameters.items()):
        point[name] = random_point(spec["parameters"], rng) if "parameters" in spec else draw(spec, rng)
    return point


def draw(spec: dict, rng: random.Random):
    """One value of a parameter, by its distribution's definition in W&B's documentation."""
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return rng.choices(spec["values"], weights=spec.get("probabilities"))[0]
    kind = distribution(spec)
    quantized, base = kind.startswith("q_"), kind.removeprefix("q_")
    low, high = spec.get("min"), spec.get("max")
    if base == "int_uniform":
        return rng.randint(low, high)
    if base == "uniform":
        value = rng.uniform(low, high)
    elif base == "log_uniform":
        value = math.exp(rng.uniform(low, high))
    elif base == "log_uniform_values":
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    elif base == "inv_log_uniform":
        value = math.exp(-rng.uniform(low, high))
    elif base == "inv_log_uniform_values":  # 1/value is log-uniform between 1/max and 1/min
        value = 1 / math.exp(rng.uniform(math.log(1 / high), math.log(1 / low)))
    elif base == "normal":
        value = rng.gauss(spec.get("mu", 0.0), spec.get("sigma", 1.0))
    elif base == "log_normal":
        value = rng.lognormvariate(spec.get("mu", 0.0), spec.get("sigma", 1.0))
    else:
        value = rng.betavariate(spec.get("a", 1.0), spec.get("b", 1.0))
    if not quantized:
        return value
    step = spec.get("q", 1)
    value = round(value / step) * step
    return value if isinstance(step, int) else round(value, 12)


DISTRIBUTIONS = {
    "int_uniform", "uniform", "q_uniform", "log_uniform", "q_log_uniform", "log_uniform_values",
    "q_log_uniform_values", "inv_log_uniform", "inv_log_uniform_values", "normal", "q_normal", "log_normal",
    "q_log_normal", "beta", "q_beta",
}  # fmt: skip


def distribution(spec: dict) -> str:
    if "distribution" in spec:
        return spec["distribution"]
    whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    return "int_uniform" if whole else ("uniform" if "min" in spec else "normal")


def bayes_point(search: Search, runs: list[dict]) -> dict:
    """The `sweeps` package's suggestion. `runs`: dicts with name, state, config, summary, history."""
    package = library()
    if package is None:
        raise BadSweep(f"method bayes needs the `sweeps` package beside the server: {INSTALL}")
    suggestion = package.next_run(search.config, _library_runs(package, runs))
    return {name: _plain(entry["value"]) for name, entry in suggestion.config.items()}


def runs_to_stop(search: Search, runs: list[dict]) -> list[str]:
    """The names of the runs that hyperband would stop now."""
    package = library()
    if package is None:
        return []
    stopped = package.stop_runs(search.config, _library_runs(package, runs))
    return [run.name for run in stopped]


def _library_runs(package, runs: list[dict]) -> list:
    return [package.SweepRun(name=run["name"], state=run["state"], config=run["config"],
                             summaryMetrics=run["summary"], sampledHistory=run["history"]) for run in runs]


def _plain(value):
    """numpy scalars as Python's own."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if hasattr(value, "item") else value


def _check(parameters: dict, path: tuple) -> None:
    for name, spec in parameters.items():
        place = ".".join((*path, str(name)))
        if not isinstance(spec, dict) or not spec:
            raise BadSweep(f"parameters.{place}: expected value, values, min and max, or a distribution")
        if "parameters" in spec:
            if not isinstance(spec["parameters"], dict):
                raise BadSweep(f"parameters.{place}.parameters: expected a mapping of parameters")
            _check(spec["parameters"], (*path, str(name)))
        elif "values" in spec:
            if not isinstance(spec["values"], list) or not spec["values"]:
                raise BadSweep(f"parameters.{place}.values: expected a list with at least one value")
            if "probabilities" in spec and len(spec["probabilities"]) != len(spec["values"]):
                raise BadSweep(f"parameters.{place}.probabilities: expected one for each of values")
        elif "value" not in spec:
            kind = distribution(spec)
            if kind not in DISTRIBUTIONS:
                raise BadSweep(f"parameters.{place}.distribution: {kind!r} is unknown or needs values")
            if "uniform" in kind:
                low, high = spec.get("min"), spec.get("max")
                numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high))
                if not numbers or low > high:
                    raise BadSweep(f"parameters.{place}: {kind} needs numbers min <= max (write 1.0e-4, not 1e-4)")
                if kind.endswith("_values") and low <= 0:
                    raise BadSweep(f"parameters.{place}.min: {kind} needs a number above 0")


def _axes(parameters: dict, path: tuple):
    for name, spec in sorted(parameters.items()):
        place = (*path, name)
        if "parameters" in spec:
            yield from _axes(spec["parameters"], place)
        elif "values" in spec:
            yield place, list({_key(value): value for value in spec["values"]}.values())  # a value twice is one point
        elif "value" not in spec:
            kind = distribution(spec)
            if kind == "int_uniform":
                yield place, range(spec["min"], spec["max"] + 1)
            elif kind == "q_uniform":
                count = math.ceil((spec["max"] - spec["min"]) / spec["q"])
                yield place, [spec["min"] + i * spec["q"] for i in range(count)]
            else:
                raise BadSweep(f"parameters.{'.'.join(place)}: a grid needs value, values, or whole min and max")


def _constants(parameters: dict) -> dict:
    return {name: _constants(spec["parameters"]) if "parameters" in spec else spec.get("value")
            for name, spec in parameters.items()}


def _put(point: dict, path: tuple, value) -> None:
    for name in path[:-1]:
        point = point[name]
    point[path[-1]] = value


def _key(value) -> str:
    return json.dumps(value, sort_keys=True, default=str)
