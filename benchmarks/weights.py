"""What the scales of weights represent, and whether mean errors are corrected: the SQNR at the outputs, on inputs that are held out.

Scales: every trained model is exported to ONNX Runtime with `--weight-scales max` and `mse`, in INT8 and in INT4, rounded to nearest and by
GPTQ; the files run with no optimisation. Corrections: the graph that `isthmus tune` tries runs in FP8 with weights rounded by GPTQ, with
and without what the outputs lack on average added to them. docs/calibration.md says what was decided on them.

    python benchmarks/weights.py            some ten minutes
    python benchmarks/weights.py --quick    dit-digits alone
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from held_out import drawn, exported, outputs, sqnr
from selective_scan import report

from isthmus.calibrating import draw_data
from isthmus.calibration.observe import Observer
from isthmus.calibration.switches import switched
from isthmus.calibration.table import calibration_table
from isthmus.calibration.trials import MODEL, Trials, sqnr_db, write_facts
from isthmus.calibration.verify import module_runner
from isthmus.calibration.weights import gptq_weights
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.grids import ACTIVATION_GRIDS
from isthmus.exporter.passes import optimise
from isthmus.exporter.source import load_source
from isthmus.exporter.target import TARGETS, Job
from isthmus.exporter.trace import trace

MODELS = ("dit-digits", "sana-digits", "diffussm-digits")
SETS = 16
BLOCKS = {"dit-digits": ("32", "128"), "sana-digits": ("32",), "diffussm-digits": ("32",)}
"""The blocks that the inputs of a model's layers are multiples of."""


def scales(model: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each precision, block and rounding."""
    sets = drawn(model, None, seed=1, count=SETS)
    reference = outputs(exported(model, "onnxruntime", folder / f"{model}-fp32", "fp32"), sets)
    rows = []
    for precision, block in [("int8", ""), *(("int4", block) for block in BLOCKS[model])]:
        options: dict[str, Any] = {f"{precision}_include": ("*",), **({"int4_block": block} if block else {})}
        for rounding in ("nearest", "gptq"):
            data = {} if (precision, rounding) == ("int4", "nearest") else {"calibration_size": SETS}
            row: dict[str, Any] = {"model": model, "precision": precision, "block": block, "rounding": rounding}
            for way in ("max", "mse"):
                path = exported(
                    model,
                    "onnxruntime",
                    folder / f"{model}-{precision}{block}-{rounding}-{way}",
                    precision,
                    weight_rounding=rounding,
                    weight_scales=way,
                    options=options,
                    **data,
                )
                row[f"{way}_db"] = sqnr(reference, outputs(path, sets))
            row["mse_above_max_db"] = row["mse_db"] - row["max_db"]
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    return rows


def corrections(model: str, folder: Path) -> dict[str, Any]:
    """FP8 by GPTQ with and without what the outputs of the layers lack on average."""
    source = load_source(model, settings={}, weights=None, inputs=None, dynamic=(), batch_size=None, seed=0)
    assert source.spec is not None
    run = module_runner(source.module, source.example, source.spec.outputs)
    data, held = (draw_data(source, run, seed=seed, size=SETS) for seed in (0, 1))
    program = trace(source.module, source.example, dynamic=source.dynamic, ranges=source.ranges)
    names = source.spec.outputs
    graph = optimise(onnx_files.to_onnx(program, opset=onnx_files.OPSETS[-1], input_names=list(source.example), output_names=names))
    target = TARGETS["tensorrt"]()
    job: Job[Any] = Job(
        program=program,
        model=graph,
        precision="fp8",
        options=target.Options.model_validate({"fp8_include": ("*",)}),
        input_names=tuple(source.example),
        output_names=names,
        sizes=source.ranges,
    )
    observed, layers = target.observed(job), target.quantised(job)
    observer = Observer(graph, observed)
    table = calibration_table(observer.observe(data), data, method="max", grids=ACTIVATION_GRIDS["fp8"])
    weights, added = gptq_weights(graph, layers, observer, data.sets, "e4m3")
    row: dict[str, Any] = {"model": model, "precision": "fp8", "rounding": "gptq"}
    for name, taken in {"plain": {}, "corrected": added}.items():
        at = folder / f"{model}-{name}"
        at.mkdir()
        written = switched(graph, [(layer, 0) for layer in layers], table, "fp8", weights=weights, corrections=taken)
        onnx_files.save(written, at / MODEL, bytes_of_weights=source.weights.bytes)
        write_facts(at, switches=1, outputs=names, sets=held.sets)
        row[f"{name}_db"] = sqnr_db(Trials(at).noise({0}))
    row["corrected_above_plain_db"] = row["corrected_db"] - row["plain_db"]
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> int:
    """Measures and prints one JSON object. Nothing is promised of these figures, so nothing is checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    models = MODELS[:1] if parser.parse_args().quick else MODELS
    with tempfile.TemporaryDirectory() as temporary:
        rows: list[dict[str, Any]] = []
        for model in models:
            rows += scales(model, Path(temporary))
            rows.append(corrections(model, Path(temporary)))
    return report("weights", rows, [])


if __name__ == "__main__":
    raise SystemExit(main())
