"""Puts a run together from its configuration and sees it through: data, model, engine, coordinator, trainer."""

import importlib.util
import math
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssd_megatron.config.load import RunConfig
from ssd_megatron.data.checks import check_data
from ssd_megatron.data.datasets import Datasets, SampleDataset, build_datasets
from ssd_megatron.data.objectives import make_objective
from ssd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.parallel.collectives import named
from ssd_megatron.parallel.device import (
    detect_hardware,
    keep_freed_memory,
    lacking_for_compile,
    missing_packages,
    peak_tflops,
    share_cores,
)
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.waits import waits_watched
from ssd_megatron.training.assembly import assemble, probe_parts
from ssd_megatron.training.checkpoint import Checkpointer, Trained
from ssd_megatron.training.console import Console
from ssd_megatron.training.data_loader import StepSampler, collate, microbatches, to_device
from ssd_megatron.training.engine import Batch
from ssd_megatron.training.metrics import MetricsLog
from ssd_megatron.training.monitor import Monitor, silence_engine_events
from ssd_megatron.training.plots import draw_run, run_figures
from ssd_megatron.training.routing_record import step_routing
from ssd_megatron.training.run_folder import RunFolder, versions
from ssd_megatron.training.run_log import RunLog
from ssd_megatron.training.signals import StopRequests
from ssd_megatron.training.start_weights import check_start
from ssd_megatron.training.summary import build_summary, print_summary, write_summary
from ssd_megatron.training.trainer import Counters, Status, Trainer

MONITOR_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_run_data(config: RunConfig, tell: Callable[[str], None], at_work: Callable[[], None]) -> Tokenizer:
    """Open the tokenizer and refuse data that cannot carry the run; needs no process group.

    Args:
        tell, at_work: `report` and `at_work` of data.checks.check_data.
    Raises:
        DataError: see data.checks.
        ConfigError: a monitor's package is missing, or what torch.compile needs, or the weights to start from are of
            another model.
    """
    _check_monitors(config)
    _check_compiler(config)
    check_start(config)
    section = config.ssd_megatron
    tokenizer = load_tokenizer(section.data.tokenizer)
    check_data(
        section.data,
        tokenizer=tokenizer,
        model_vocab_size=section.model.vocab_size,
        text_length=make_objective(section.model, section.data, tokenizer, section.seed).text_length,
        global_batch_size=config.train_batch_size,
        train_steps=section.training.train_steps,
        eval_steps=max(section.training.eval_steps, math.ceil(section.ssd.probe_samples / config.train_batch_size)),
        cache_dir=section.data_cache_dir,
        report=tell,
        at_work=at_work,
    )
    return tokenizer


def run_job(config: RunConfig, folder: RunFolder, tokenizer: Tokenizer, topology: Topology) -> None:
    """Train as configured, from the newest checkpoint if there is one (collective).

    Raises:
        ConfigError: the newest checkpoint was made with other settings.
        TrainingError, SwitchError, CheckpointError: the run cannot go on.
    """
    console = _console(config) if topology.is_first else None
    try:
        with waits_watched(topology.rank, config.ssd_megatron.parallel.timeout_seconds):
            done, status = _train(config, folder, tokenizer, topology, console)
    finally:
        if console is not None:
            console.close()
    if topology.is_first:
        finish(config, folder, {"status": status, "steps": done})


def _train(
    config: RunConfig, folder: RunFolder, tokenizer: Tokenizer, topology: Topology, console: Console | None
) -> tuple[int, Status]:
    """Build everything and train. Returns the steps done in all, and whether the run is finished."""
    section = config.ssd_megatron
    share_cores()
    keep_freed_memory()
    torch.manual_seed(section.seed + topology.data.rank + topology.data.size * topology.pipeline.rank)
    stop = StopRequests(folder.path, launched=topology.launched)
    stop.install()
    if console is not None:
        for line in (*config.notes, *missing_packages()):
            console.note(line)

    with named("indexing the samples"):
        datasets = _datasets(config, tokenizer, section.training.train_steps * config.train_batch_size)
    with named("making the engine"):
        parts = assemble(config, topology, _probe_batches(config, datasets, topology))
    model, engine, coordinator = parts.model, parts.engine, parts.coordinator
    silence_engine_events(engine.deepspeed.monitor)
    if console is not None:
        console.note(parts.backend_reason)
    checkpointer = Checkpointer(
        folder.checkpoints,
        Trained(engine, model, coordinator, parts.masks, _identity(config)),
        topology,
        keep_last=section.checkpoint.keep_last,
        async_save=section.checkpoint.async_save,
        tell=console.event if console is not None else _silent,
    )
    with named("restoring the newest checkpoint"):
        restored = checkpointer.restore_newest()
    if restored is None and section.checkpoint.start_from is not None:
        with named("reading the weights to start from"):
            keep = section.ssd.partition == "kept"
            weights = checkpointer.start_from(section.checkpoint.start_from, keep)
        if console is not None:
            console.event(f"weights from {weights}; everything else starts anew")
    done, counters = restored or (0, vars(Counters()))
    if topology.is_first:
        folder.write_config(config.resolved())
    if done == section.training.train_steps:
        if console is not None:
            console.event(f"{folder.path} is finished: all {done} steps are trained")
        engine.close()
        return done, "finished"
    log = RunLog(
        metrics=MetricsLog(folder.path, last_step=done) if topology.is_first else None,
        monitor=Monitor(engine.deepspeed.monitor) if topology.is_first else None,
        console=console,
    )
    if restored is not None:
        log.resumed(done, section.training.train_steps, folder.checkpoints)
    batches = _train_batches(config, datasets, topology, first_step=done + 1)
    trainer = Trainer(
        config,
        topology,
        engine=engine,
        model=model,
        coordinator=coordinator,
        masks=parts.masks,
        checkpointer=checkpointer,
        batches=batches,
        eval_batches=_eval_batches(config, datasets, topology),
        partitions=folder.path / "partitions",
        routing=step_routing(config, model, topology),
        log=log,
        stop=stop,
        counters=Counters(**counters),
        done_steps=done,
        peak_flops=_peak_flops(config),
    )
    try:
        status = trainer.run()
        if section.logging.plots:
            log.plots(trainer.done_steps, partial(run_figures, folder.path))
        stop.clear_stop_file()
    finally:
        batches.close()  # its loader's workers ignore the signal with which Python ends them
        log.flush()
        engine.close()
    return trainer.done_steps, status


def finish(config: RunConfig, folder: RunFolder, state: dict[str, Any]) -> None:
    """Write summary.json and the plots, and print the summary."""
    tokens = state["steps"] * config.train_batch_size * config.ssd_megatron.model.sample_tokens
    summary = build_summary(
        folder.path, config=config.resolved(), versions=versions(), state=state | {"tokens": tokens}
    )
    write_summary(folder.path, summary)
    if config.ssd_megatron.logging.plots:
        draw_run(folder.path)
    print_summary(summary, folder.path)


def _silent(_text: str) -> None:
    pass


def _identity(config: RunConfig) -> dict[str, Any]:
    """What must not change when the run is resumed: settings, and the corpora behind their paths."""
    data = config.ssd_megatron.data
    blends = (data.paths, data.train_paths, data.valid_paths, data.test_paths)
    prefixes = sorted({entry for blend in blends if blend is not None for entry in blend if isinstance(entry, str)})
    return config.identity() | {f"bytes of {p}.bin": Path(f"{p}.bin").stat().st_size for p in prefixes}


def _check_monitors(config: RunConfig) -> None:
    """Monitors of DeepSpeed that need a package fail only once the model is built, and with a traceback."""
    for monitor, package in MONITOR_PACKAGES.items():
        if config.deepspeed.get(monitor, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{monitor}.enabled (true) needs the package {package}: pip install {package}")


def _check_compiler(config: RunConfig) -> None:
    """torch.compile fails only in the first step, and with a traceback."""
    mode = config.ssd_megatron.training.compile
    if mode != "none" and (lacking := lacking_for_compile()) is not None:
        raise ConfigError(f'training.compile ("{mode}") needs {lacking}: install it, or use "none"')


def _console(config: RunConfig) -> Console:
    return Console(config.ssd_megatron.training.train_steps, log_interval=config.ssd_megatron.logging.log_interval)


def _peak_flops(config: RunConfig) -> float | None:
    peak = config.ssd_megatron.logging.peak_tflops or peak_tflops(detect_hardware())
    return None if peak is None else peak * 1e12


def _datasets(config: RunConfig, tokenizer: Tokenizer, train_samples: int) -> Datasets:
    section = config.ssd_megatron
    evaluation = section.training.eval_steps * config.train_batch_size
    return build_datasets(
        section.data,
        tokenizer=tokenizer,
        objective=make_objective(section.model, section.data, tokenizer, section.seed),
        seed=section.seed,
        train_samples=train_samples,
        valid_samples=max(evaluation, section.ssd.probe_samples),
        test_samples=0,
        cache_dir=section.data_cache_dir,
    )


def _train_batches(
    config: RunConfig, datasets: Datasets, topology: Topology, first_step: int
) -> Generator[Batch, None, None]:
    assert datasets.train is not None
    sampler = _sampler(config, topology, first_step, config.ssd_megatron.training.train_steps)
    return microbatches(datasets.train, sampler, topology.device, config.ssd_megatron.data.num_workers)


def _eval_batches(config: RunConfig, datasets: Datasets, topology: Topology) -> list[Batch]:
    """The same validation samples at every evaluation."""
    assert datasets.valid is not None
    sampler = _sampler(config, topology, 1, config.ssd_megatron.training.eval_steps)
    return list(microbatches(datasets.valid, sampler, topology.device, 0))


def probe_samples(config: RunConfig, tokenizer: Tokenizer, topology: Topology) -> list[Batch]:
    """This rank's part of the probe samples of a run that is not trained here (collective).

    Raises:
        DataError: the data is not there.
    """
    return _probe_batches(config, _datasets(config, tokenizer, train_samples=0), topology)


def _probe_batches(config: RunConfig, datasets: Datasets, topology: Topology) -> list[Batch]:
    """This rank's part of the first validation samples."""
    assert isinstance(datasets.valid, SampleDataset)
    empty = {name: values[:0] for name, values in to_device(collate([datasets.valid[0]]), topology.device).items()}
    parts = [[datasets.valid[i] for i in part] for part in probe_parts(config, topology)]
    return [to_device(collate(part), topology.device) if part else empty for part in parts]


def _sampler(config: RunConfig, topology: Topology, first_step: int, last_step: int) -> StepSampler:
    return StepSampler(
        first_step=first_step,
        last_step=last_step,
        micro_batch_size=config.micro_batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=topology.data.rank,
        ranks=topology.data.size,
    )
