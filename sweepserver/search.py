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

from .store import number

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
    target: float | None = None
    run_cap: int | None = None
    early: bool = False
    axes: tuple = field(default=())

    @property
    def size(self) -> int | None:
        """How many points there are to run; None without an end."""
        grid = math.prod(len(values) for _, values in self.axes) if self.method == "grid" else None
        return min((n for n in (grid, self.run_cap) if n is not None), default=None)

    def reached(self, value) -> bool:
        """Whether a run with this value of the metric ends the sweep (`metric.target`)."""
        if self.target is None or not number(value):
            return False
        return value >= self.target if self.goal == "maximize" else value <= self.target

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
    _check_metric(config)
    metric, early = config.get("metric") or {}, config.get("early_terminate")
    cap = config.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise BadSweep(f"run_cap: expected a whole number above 0, got {cap!r}")
    _check(parameters, ())
    _check_draw(parameters)
    axes = tuple(grid_axes(parameters)) if method == "grid" else ()
    goal = metric.get("goal", "minimize")
    return Search(config, method, parameters, metric.get("name"), goal, metric.get("target"), cap, bool(early), axes)


def check_library(search: Search) -> None:
    """Asks the `sweeps` package, where the sweep needs it, with no runs yet. Raises `BadSweep` for what it cannot use,
    and where it is missing. For a new sweep only: one that has begun goes on without (`scheduler.py`)."""
    if search.method == "bayes":
        bayes_point(search, [])
    if search.early:
        runs_to_stop(search, [])


def grid_axes(parameters: dict, path: tuple = ()):
    """Yields (path, values) of every parameter of a grid that has a choice, in W&B's order; a path is the names from
    the outermost on, one where nothing is nested. Raises `BadSweep` for a parameter whose values cannot be listed."""
    for name, spec in sorted(parameters.items()):
        place = (*path, name)
        if "parameters" in spec:
            yield from grid_axes(spec["parameters"], place)
        elif "values" in spec:
            yield place, list({_key(value): value for value in spec["values"]}.values())  # a value twice is one point
        elif "value" not in spec:
            kind, low, high, step = distribution(spec), spec.get("min"), spec.get("max"), spec.get("q", 1)
            if kind not in ("int_uniform", "q_uniform"):
                raise BadSweep(f"parameters.{'.'.join(place)}: a grid needs value, values, or whole min and max")
            if (high - low) / step >= MOST_VALUES:
                raise BadSweep(f"parameters.{'.'.join(place)}: more than {MOST_VALUES} values, too many for a grid")
            if kind == "int_uniform":
                yield place, range(low, high + 1)
            else:
                yield place, [low + i * step for i in range(math.ceil((high - low) / step))]


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


LARGEST_EXPONENT = 690  # e to the power of it is within what a float can hold
MOST_VALUES = 10**6  # of one parameter of a grid
_RANGES = ("uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values")
_PLAIN = {
    **dict.fromkeys(_RANGES, ("min", "max")),
    "normal": ("mu", "sigma"),
    "log_normal": ("mu", "sigma"),
    "beta": ("a", "b"),
}
NEEDED = {"nested": "parameters", "constant": "value", "categorical": "values"}  # known by this key, named or not
# What a parameter of each distribution may say beside `distribution`.
KEYS = {
    "nested": ("parameters",),
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    **_PLAIN,
    **{f"q_{kind}": (*keys, "q") for kind, keys in _PLAIN.items() if not kind.startswith("inv_")},
}


def distribution(spec: dict) -> str:
    """The distribution of a parameter (a key of `KEYS`), named or not; W&B's default where it is not."""
    for kind, key in NEEDED.items():
        if key in spec:
            return kind
    if "distribution" in spec:
        return spec["distribution"]
    whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    return "int_uniform" if whole else ("normal" if "mu" in spec or "sigma" in spec else "uniform")


def bayes_point(search: Search, runs: list[dict]) -> dict:
    """The `sweeps` package's suggestion. `runs`: dicts with name, state, config, summary, history.

    Raises `BadSweep` where the package raises anything.
    """

    def point(run):
        return {name: entry.get("value") for name, entry in run["config"].items() if isinstance(entry, dict)}

    runs = [run for run in runs if _among(search.parameters, point(run))]
    suggestion = _library("next_run", "method bayes", search, runs)
    return {name: _plain(entry["value"]) for name, entry in suggestion.config.items()}


def runs_to_stop(search: Search, runs: list[dict]) -> list[str]:
    """The names of the runs that hyperband would stop now; raises as `bayes_point` does."""
    return [run.name for run in _library("stop_runs", "early_terminate hyperband", search, runs)]


def _library(function: str, wanted: str, search: Search, runs: list[dict]):
    """What the `sweeps` package answers. It raises whatever its inner steps meet."""
    package = library()
    if package is None:
        raise BadSweep(f"{wanted} needs the `sweeps` package beside the server: {INSTALL}")
    try:
        return getattr(package, function)(
            search.config,
            [
                package.SweepRun(
                    name=run["name"],
                    state=run["state"],
                    config=run["config"],
                    summaryMetrics=run["summary"],
                    sampledHistory=run["history"],
                )
                for run in runs
            ],
        )
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadSweep(f"{wanted}: the `sweeps` package cannot use this configuration ({reason})") from error


def _among(parameters: dict, point) -> bool:
    """Whether the categorical values of a point are the sweep's: one that was updated may have lost some."""
    for name, spec in parameters.items():
        value = point.get(name) if isinstance(point, dict) else None
        if "parameters" in spec and not _among(spec["parameters"], value):
            return False
        if "values" in spec and value is not None and value not in spec["values"]:
            return False
    return True


def _plain(value):
    """numpy scalars as Python's own."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if hasattr(value, "item") else value


def _check_metric(config: dict) -> None:
    metric, early = config.get("metric") or {}, config.get("early_terminate")
    if not isinstance(metric, dict):
        raise BadSweep(f"metric: expected a mapping with name and goal, got {metric!r}")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise BadSweep(f"metric.goal: expected minimize or maximize, got {metric['goal']!r}")
    if metric.get("name") is not None and not isinstance(metric["name"], str):
        raise BadSweep(f"metric.name: expected a text, got {metric['name']!r}")
    if metric.get("target") is not None and not (number(metric["target"]) and metric.get("name")):
        raise BadSweep(f"metric.target: expected a number, and metric.name, got {metric['target']!r}")
    if (config.get("method") == "bayes" or early) and not metric.get("name"):
        raise BadSweep(f"metric.name: {'early_terminate' if early else 'method bayes'} needs it")
    if early and (not isinstance(early, dict) or early.get("type") != "hyperband"):
        raise BadSweep("early_terminate.type: expected hyperband")
    if early:
        first, last, cuts, eta = (
            early.get(key, default)
            for key, default in (("min_iter", None), ("max_iter", None), ("s", None), ("eta", 3))
        )
        if not (number(first) and first >= 1 or number(last) and last >= 1 and number(cuts)):
            raise BadSweep("early_terminate: hyperband needs min_iter, or max_iter and s, as numbers from 1")
        if not (number(eta) and eta > 1):
            raise BadSweep(f"early_terminate.eta: expected a number above 1, got {eta!r}")


def _check(parameters: dict, path: tuple) -> None:
    for name, spec in parameters.items():
        place = ".".join((*path, str(name)))
        if not isinstance(name, str):
            raise BadSweep(f"parameters.{place}: a name is a text; write it in quotes")
        if not isinstance(spec, dict) or not spec:
            raise BadSweep(f"parameters.{place}: expected value, values, min and max, or a distribution")
        kind = distribution(spec)
        if not isinstance(kind, str) or kind not in KEYS or (kind in NEEDED and NEEDED[kind] not in spec):
            raise BadSweep(f"parameters.{place}.distribution: {kind!r} is unknown or needs values")
        others = [key for key in spec if key not in (*KEYS[kind], "distribution")]
        if others:
            raise BadSweep(f"parameters.{place}.{others[0]}: {kind} takes no such key, only {', '.join(KEYS[kind])}")
        if kind == "nested":
            if not isinstance(spec["parameters"], dict):
                raise BadSweep(f"parameters.{place}.parameters: expected a mapping of parameters")
            _check(spec["parameters"], (*path, name))
        elif kind == "categorical":
            _check_values(spec, place)
        elif kind != "constant":
            _check_numbers(kind, spec, place)


def _check_values(spec: dict, place: str) -> None:
    values, odds = spec["values"], spec.get("probabilities")
    if not isinstance(values, list) or not values:
        raise BadSweep(f"parameters.{place}.values: expected a list with at least one value")
    if "probabilities" not in spec:
        return
    if not isinstance(odds, list) or len(odds) != len(values):
        raise BadSweep(f"parameters.{place}.probabilities: expected a list with one for each of values")
    if not all(number(odd) and odd >= 0 for odd in odds) or not sum(odds) > 0:
        raise BadSweep(f"parameters.{place}.probabilities: expected numbers from 0, at least one of them above 0")


def _check_numbers(kind: str, spec: dict, place: str) -> None:
    low, high = spec.get("min"), spec.get("max")
    if "uniform" in kind:
        if not (number(low) and number(high)) or low > high:
            raise BadSweep(f"parameters.{place}: {kind} needs numbers min <= max (write 1.0e-4, not 1e-4)")
        if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
            raise BadSweep(f"parameters.{place}: int_uniform needs whole numbers")
        if kind.endswith("_values") and low <= 0:
            raise BadSweep(f"parameters.{place}.min: {kind} needs a number above 0")
        if kind.endswith("log_uniform") and max(-low, high) > LARGEST_EXPONENT:
            raise BadSweep(
                f"parameters.{place}: {kind} takes exponents up to {LARGEST_EXPONENT}; {kind}_values takes "
                "the numbers themselves"
            )
    for key in ("mu", "sigma", "a", "b", "q"):
        if key in spec and not number(spec[key]):
            raise BadSweep(f"parameters.{place}.{key}: expected a number, got {spec[key]!r}")
    for key in ("a", "b", "q"):
        if spec.get(key, 1) <= 0:
            raise BadSweep(f"parameters.{place}.{key}: expected a number above 0, got {spec[key]!r}")
    if spec.get("sigma", 1) < 0:
        raise BadSweep(f"parameters.{place}.sigma: expected a number from 0, got {spec['sigma']!r}")


def _check_draw(parameters: dict) -> None:
    """Draws once, so that what cannot be drawn or sent is refused now and not at every heartbeat."""
    try:
        json.dumps(parameters)
    except (TypeError, ValueError) as error:  # a date, a loop of anchors
        raise BadSweep(f"parameters: a value is no text, number, list or mapping; put it in quotes ({error})") from None
    try:
        random_point(parameters, random.Random(0))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise BadSweep(f"parameters: cannot be drawn ({error})") from None


def _constants(parameters: dict) -> dict:
    return {
        name: _constants(spec["parameters"]) if "parameters" in spec else spec.get("value")
        for name, spec in parameters.items()
    }


def _put(point: dict, path: tuple, value) -> None:
    for name in path[:-1]:
        point = point[name]
    point[path[-1]] = value


def _key(value) -> str:
    return json.dumps(value, sort_keys=True, default=str)
