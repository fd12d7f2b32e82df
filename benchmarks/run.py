"""Runs a benchmark from its options: loads the engines, collects rows, prints the report."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compiledllm.arguments import engine_options
from compiledllm.benchmarks import (
    expert_tilings,
    latency,
    quantized_tilings,
    serve,
    startup,
    throughput,
    tilings,
)
from compiledllm.benchmarks.ceilings import measure_ceilings, measure_upload
from compiledllm.benchmarks.client import Load, Target
from compiledllm.benchmarks.compare import compare_reports, ratios_between_engines
from compiledllm.benchmarks.engines import by_sampling, measuring
from compiledllm.benchmarks.floor import Ceilings, time_per_output_token_floor
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.plot import check_plot, plot_ratios, plot_report
from compiledllm.benchmarks.report import (
    Report,
    Row,
    against_floor,
    hardware_facts,
    load_report,
    new_report,
)
from compiledllm.benchmarks.tables import print_ratios, print_report, progress
from compiledllm.benchmarks.workload import (
    Encode,
    SampleRequest,
    fingerprint,
    random_requests,
    requests_from_file,
    sharegpt_like_requests,
    with_token_ids,
)
from compiledllm.config import ConfigError
from compiledllm.platform import Platform

DEFAULT_SEED = 4242
DEFAULT_NUM_PROMPTS = 512
UNKNOWN_VOCAB_SIZE = 32000  # for a server whose model is unknown; token ids are sent as words

AddFloors = Callable[[Row, Model, Ceilings], None]


def run_latency(arguments: Namespace) -> int:
    """`compiledllm bench latency`."""
    check_output(arguments.output_json, "--output-json")
    check_output(arguments.lock, "--lock")
    check_plot(arguments.plot, arguments.output_len)
    model = _model(arguments)
    model.check_length(max(arguments.input_len) + arguments.output_len)
    work = latency.LatencyGrid(
        batch_sizes=arguments.batch_size,
        input_lens=arguments.input_len,
        output_len=arguments.output_len,
        repeats=arguments.num_iters,
        warmups=arguments.num_iters_warmup,
        seed=_seed(arguments),
        vocab_size=model.vocab_size,
    )
    report = _report("latency", model, arguments, output_len=work.output_len, seed=work.seed)
    with measuring(arguments, model) as loaded:
        peers = by_sampling(loaded, arguments.sampling)
        with progress(work.num_measurements(len(peers))) as advance:
            rows = latency.measure_grid(peers, work, advance)
            _collect(report, rows, model, latency.add_floors, arguments.output_json)
    _emit(report, arguments.output_json, arguments.plot)
    return 0


def run_throughput(arguments: Namespace) -> int:
    """`compiledllm bench throughput`."""
    check_output(arguments.output_json, "--output-json")
    check_output(arguments.lock, "--lock")
    check_plot(arguments.plot)
    model = _model(arguments)
    num_turns = arguments.num_turns
    model = model.with_defaults({"enable_prefix_caching": num_turns > 1})
    requests = _requests(arguments, model.vocab_size, model.encode)
    requests = with_token_ids(requests, model.encode)
    caches = bool(model.options["enable_prefix_caching"])
    chats = throughput.Chats(
        requests, num_turns, arguments.turn_len, model.vocab_size, _seed(arguments), caches
    )
    model.check_length(max(map(sum, chats.lengths)))
    work = {"requests": fingerprint(requests)}
    work |= {"num_turns": num_turns, "turn_len": arguments.turn_len} if num_turns > 1 else {}
    report = _report("throughput", model, arguments, **work)

    def add_floor(row: Row, model: Model, ceilings: Ceilings) -> None:
        throughput.add_floor(row, chats, model, ceilings)

    with (
        measuring(arguments, model) as peers,
        progress(len(peers) * (arguments.num_iters + 1)) as advance,
    ):
        rows = throughput.measure_throughput(peers, chats, arguments.num_iters, advance)
        _collect(report, rows, model, add_floor, arguments.output_json)
    _emit(report, arguments.output_json, arguments.plot)
    return 0


def run_startup(arguments: Namespace) -> int:
    """`compiledllm bench startup`."""
    check_output(arguments.output_json, "--output-json")
    check_plot(arguments.plot)
    input_len = arguments.input_len
    kinds = ("cold", "warm", "built")
    counts = {kind: getattr(arguments, f"num_iters_{kind}") for kind in kinds}
    if not any(counts.values()):
        raise ConfigError("nothing to measure: all of --num-iters-cold, -warm and -built are 0")
    model = _model(arguments)
    model.check_length(input_len + 1)
    report = _report("startup", model, arguments, input_len=input_len)
    upload, engines = measure_upload(model.platform), list(dict.fromkeys(arguments.engine))
    num_bytes = model.spec.num_bytes(model.spec.weights) if model.spec else None
    per_engine = max(counts["cold"], 1) + counts["warm"]
    built = counts["built"] * engines.count("compiledllm")
    with progress(len(engines) * per_engine + built) as advance:
        for row in startup.measure_startup(engines, model, input_len, counts, advance):
            startup.add_floor(row, num_bytes, upload)
            report.rows.append(row)
    _emit(report, arguments.output_json, arguments.plot)
    return 0


def run_serve(arguments: Namespace) -> int:
    """`compiledllm bench serve`."""
    check_output(arguments.output_json, "--output-json")
    check_plot(arguments.plot)
    target = Target(
        serve.checked_url(arguments.base_url),
        arguments.endpoint,
        arguments.model,
        arguments.timeout,
    )
    local = _local_model(arguments.local_model)
    requests = _requests(arguments, local.vocab_size if local else UNKNOWN_VOCAB_SIZE, None)
    if arguments.dataset_path is None and (local is None or target.is_chat):
        requests = serve.as_text(requests)
    target.check(requests)
    ceilings = measure_ceilings(local.platform, local.torch_dtype) if local else None
    loads = [
        Load(
            request_rate=rate,
            max_concurrency=arguments.max_concurrency,
            burstiness=arguments.burstiness,
            goodput=dict(arguments.goodput),
            seed=_seed(arguments),
        )
        for rate in arguments.request_rate
    ]
    with progress(len(loads) * len(requests)) as advance:
        name, rows = serve.measure_serving(target, requests, loads, advance, arguments.num_clients)
    work = {"model": name, "endpoint": target.endpoint, "requests": fingerprint(requests)}
    platform = local.platform if local else Platform.detect("cpu")
    report = new_report("serve", work, hardware_facts(platform), _flags(arguments))
    report.rows, report.ceilings = rows, asdict(ceilings) if ceilings else None
    for row in rows:
        _add_serving_floor(row, local, ceilings)
    _emit(report, arguments.output_json, arguments.plot)
    return 0


def run_compare(arguments: Namespace) -> int:
    """`compiledllm bench compare`."""
    check_plot(arguments.plot)
    a, b = load_report(arguments.a), load_report(arguments.b)
    ratios = compare_reports(a, b, arguments.force)
    print_ratios(ratios)
    if arguments.plot is not None:
        plot_ratios(ratios, arguments.plot)
    return 0


# -- the model and its work ------------------------------------------------------------------------


def _model(arguments: Namespace) -> Model:
    """The model to measure. Raises ConfigError, also for an engine that is not installed."""
    for engine in arguments.engine:
        if find_spec(engine) is None:
            raise ConfigError(f"engine '{engine}' is not installed here: pip install {engine}")
    return Model.from_options(engine_options(arguments), tuple(arguments.engine))


def _local_model(name: str | None) -> Model | None:
    """The spec of the served model, for floors; no weights are loaded."""
    if name is None:
        return None
    return Model.from_options({"model": name, "load_format": "dummy"}, ("compiledllm",))


def _seed(arguments: Namespace) -> int:
    """The seed of the requests. --seed sets this and the engine's seed; their defaults differ."""
    seed = getattr(arguments, "seed", None)
    return DEFAULT_SEED if seed is None else seed


def _requests(arguments: Namespace, vocab_size: int, encode: Encode | None) -> list[SampleRequest]:
    """The requests of the dataset that the options name."""
    path, output_len = arguments.dataset_path, arguments.output_len
    if (arguments.dataset_name == "file") != (path is not None):
        raise ConfigError("--dataset-name file and --dataset-path FILE go together")
    if path is not None:
        return requests_from_file(path, arguments.num_prompts, output_len, encode)
    num_prompts = arguments.num_prompts or DEFAULT_NUM_PROMPTS
    if arguments.dataset_name == "sharegpt-like":
        return sharegpt_like_requests(num_prompts, vocab_size, _seed(arguments))
    input_len = arguments.input_len
    return random_requests(num_prompts, input_len, output_len, vocab_size, _seed(arguments))


def _add_serving_floor(row: Row, local: Model | None, ceilings: Ceilings | None) -> None:
    """Add the floor of TPOT for a request that is alone on the server, at the mean lengths."""
    floor, tpot = None, row["tpot_ms"]
    if local and local.spec and ceilings:
        input_len, output_len = (
            row[name] // row["completed"] for name in ("input_tokens", "output_tokens")
        )
        floor = 1e3 * time_per_output_token_floor(
            local.spec, ceilings, 1, input_len, max(output_len, 2)
        )
    row["tpot_floor_ms"] = tpot and against_floor(floor, tpot["p50"])


def run_tilings(arguments: Namespace) -> int:
    """`compiledllm bench tilings`."""
    platform = Platform.detect()
    tilings.check_gpu(platform)
    check_output(arguments.output_json, "--output-json")
    path = arguments.output_json or tilings.own_table()
    models, formats = arguments.models, arguments.formats
    measured = [] if formats else tilings.products_of(models, arguments.rows)
    products = quantized_tilings.products_of(models, formats, arguments.rows)
    of_experts = expert_tilings.products_of(models, formats, arguments.rows)
    num_measured = len(measured) + len(products) + len(of_experts)
    with progress(num_measured) as advance:
        entries = tilings.measure_products(measured, advance) if measured else []
        others = quantized_tilings.measure_products(products, advance) if products else {}
        experts = expert_tilings.measure_products(of_experts, advance) if of_experts else {}
    tilings.write_table(path, entries, measured, platform, others, experts)
    found = *others.values(), *experts.values()
    count = len(entries) + sum(entry is not None for entry in found)
    print(f"{path}: tilings for {count} of {num_measured} matmuls are faster than the defaults")
    return 0


# -- the report ------------------------------------------------------------------------------------


def check_output(path: Path | None, option: str) -> None:
    """Raise ConfigError if the folder of the output file does not exist, before measuring."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: the folder {path.parent} does not exist")


def _report(kind: str, model: Model, arguments: Namespace, **work: Any) -> Report:
    identity = model.identity() | work
    return new_report(kind, identity, hardware_facts(model.platform), _flags(arguments))


def _flags(arguments: Namespace) -> dict[str, Any]:
    """The parsed options, as JSON types."""
    given = vars(arguments).items()
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given}
    return {name: value for name, value in plain.items() if not callable(value)}


def _collect(
    report: Report, rows: Iterable[Row], model: Model, add_floors: AddFloors, path: Path | None
) -> None:
    """Collect rows, saving the report after each; add floors when all rows are there.

    Ceilings are measured before and after the rows and the higher one counts, because a shared
    machine may be slow for a moment.
    """
    before = measure_ceilings(model.platform, model.torch_dtype)
    for row in rows:
        report.rows.append(row)
        if path is not None:
            report.save(path)
    ceilings = before.at_least(measure_ceilings(model.platform, model.torch_dtype))
    report.ceilings = asdict(ceilings)
    for row in report.rows:
        add_floors(row, model, ceilings)


def _emit(report: Report, path: Path | None, plot: Path | None) -> None:
    """Print the table; write the JSON to the file, or print it last; draw the plot."""
    if len({row["engine"] for row in report.rows}) > 1:
        report.ratios = ratios_between_engines(report.benchmark, report.rows)
    report.complete = True
    print_report(report)
    if path is None:
        print(report.to_json())
    else:
        report.save(path)
        print(f"JSON: {path}")
    if plot is not None:
        plot_report(report, plot)
