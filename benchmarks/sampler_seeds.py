"""How much the results on the line depend on the noise: the headline of `sampler_quality` over eight seeds.

    python benchmarks/sampler_seeds.py --out benchmarks/results

The same measurement as there, for the samplers that its summary compares, with other seeds of the stratified noise;
the mean and its standard error go to samplers_seeds.json and .md. DPM++ 2M draws no noise and has none.
"""

import argparse
import json
import warnings
from pathlib import Path

import diffusers
import sampler_quality
import torch
from sampler_candidates import candidates
from sampler_targets import TARGETS

from annealers.metrics import mean_and_standard_error

HEADLINE = [
    ("Secant eta=1, noise to the last", "karras"),
    ("Secant eta=0.5, noise to the last", "karras"),
    ("Secant eta=1", "karras"),
    ("DPM++ 2M SDE", "karras"),
    ("SA-Solver", "trailing"),
    ("SA-Solver", "karras"),
    ("DPM++ 2M", "karras"),
]
SEEDS = range(8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    by_name = {candidate.name: candidate for candidate in candidates()}
    records, lines = [], []
    for name in ("spikes", "modes", "smooth"):
        target = TARGETS[name]()
        lines += [f"\n{name}, W1 x 1000\n", "| sampler | spacing | 10 calls | 20 calls | 50 calls | 100 calls |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for candidate_name, spacing in HEADLINE:
            cells = []
            for budget in sampler_quality.BUDGETS:
                errors = over_seeds(target, by_name[candidate_name], spacing, budget)
                mean, error = mean_and_standard_error(torch.tensor(errors)) if len(errors) > 1 else (errors[0], 0.0)
                records.append(
                    {"target": name, "candidate": candidate_name, "spacing": spacing, "budget": budget}
                    | {"errors": errors, "mean": mean, "standard error": error}
                )
                cells.append(f"{mean:.3g} ± {error:.2g}" if len(errors) > 1 else f"{mean:.3g}")
            lines.append(f"| {candidate_name} | {spacing} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    (options.out / "samplers_seeds.json").write_text(json.dumps(records, indent=1) + "\n")
    (options.out / "samplers_seeds.md").write_text(
        "# Samplers on the line over eight seeds\n" + "\n".join(lines) + "\n"
    )


def over_seeds(target, candidate, spacing: str, budget: int) -> list[float]:
    seeds = SEEDS if candidate.stochastic else SEEDS[:1]
    return [sampler_quality.measured(target, candidate, spacing, budget, seed)["error"] for seed in seeds]


if __name__ == "__main__":
    main()
