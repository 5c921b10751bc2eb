"""The table of likelihoods: bits per dimension by number of steps, spacing and variance, from what evaluate.py writes.

    python training/evaluate.py --bits-per-dim --pipeline PIPELINE --dataset DATA/mnist --samples 64 \
        --likelihoods vlb ode --steps 4000 1000 100 50 32 25 10 --spacings linspace optimal \
        --variance-types fixed_small fixed_large learned_range optimal --evaluated-steps 200 \
        --calibration-samples 64 --tolerances 1e-3 1e-4 --output evaluation.json
    python benchmarks/likelihood.py evaluation.json --out benchmarks/results

Several files of the same images, as of a bound and a flow that were computed apart, make one table.
"""

import argparse
import json
from pathlib import Path

SPACINGS = {"all": "all", "linspace": "even", "optimal": "placed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", type=Path, help="files written by training/evaluate.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    records = [json.loads(path.read_text()) for path in options.evaluations]
    results = [result for record in records for result in record["results"]]
    images = {tuple(result["rows"]) for result in results}
    if len(images) != 1:
        raise SystemExit(f"the files are of {len(images)} different choices of images: {options.evaluations}")
    for result in results:  # one number per image is too much to keep
        del result["rows"], result["values"]
    bounds = [result for result in results if result["likelihood"] == "vlb"]
    flows = [result for result in results if result["likelihood"] == "ode"]
    kept = {name: records[0][name] for name in ("dataset", "resolution", "hardware", "versions")}
    kept["results"] = results
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "likelihood.json").write_text(json.dumps(kept, indent=1) + "\n")
    title = f"# Bits per dimension on {kept['dataset']}, {len(next(iter(images)))} held-out images\n"
    page = "\n".join([title, bound_table(bounds), estimates(bounds), difference_table(bounds), flow_table(flows)])
    (options.out / "likelihood.md").write_text(page)
    print(page)


def bound_table(bounds: list[dict]) -> str:
    return schedule_table("Variational bound, ± standard error over the images:", bounds, total)


def estimates(bounds: list[dict]) -> str:
    """Of which chains not all steps were computed."""
    found = {
        f"{bound['steps']:,} steps, {SPACINGS[bound['spacing']]}:{bound['kind'].split('estimated')[1]}"
        for bound in bounds
        if "estimated" in bound["kind"]
    }
    return (
        f"Estimated without bias, by a step of each part of the chain: {'; '.join(sorted(found))}.\n" if found else ""
    )


def difference_table(bounds: list[dict]) -> str:
    title = "More than the whole chain with the same variance, ± standard error over the pairs:"
    return schedule_table(title, [bound for bound in bounds if "difference" in bound], difference)


def schedule_table(title: str, bounds: list[dict], cell) -> str:
    variances = list(dict.fromkeys(bound["variance_type"] for bound in bounds))
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for bound in bounds:
        rows.setdefault((bound["steps"], bound["spacing"]), {})[bound["variance_type"]] = cell(bound)
    lines = [title, "", f"| steps | spacing | {' | '.join(variances)} |", "| --- " * (len(variances) + 2) + "|"]
    for (steps, spacing), cells in rows.items():
        lines.append(f"| {steps:,} | {SPACINGS[spacing]} | {' | '.join(cells[variance] for variance in variances)} |")
    return "\n".join(lines) + "\n"


def total(bound: dict) -> str:
    return f"{bound['mean']:.{digits(bound['mean'])}f} ± {bound['standard_error']:.{digits(bound['mean'])}f}"


def difference(bound: dict) -> str:
    mean, error = bound["difference"]["mean"], bound["difference"]["standard_error"]
    return f"{mean:+.{digits(mean) + 1}f} ± {error:.{digits(mean) + 1}f}"


def digits(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0


def flow_table(flows: list[dict]) -> str:
    lines = ["Probability-flow ODE, uniform dequantisation:", "", "| tolerance | bits/dim | network calls |"]
    lines.append("| --- | --- | --- |")
    for flow in flows:
        probes = f", {flow['probes']} Rademacher probe" if flow["probes"] == 1 else f", {flow['probes']} probes"
        lines.append(
            f"| {flow['tolerance']:g}{probes if flow['probes'] else ', exact divergence'} | "
            f"{flow['mean']:.3f} ± {flow['standard_error']:.3f} | {flow['calls']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
