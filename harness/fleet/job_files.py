"""Job files for engines that exist: an array for Slurm's sbatch, a workflow for GitHub's runners. Text from the same shards."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

from harness.core.errors import UsageError
from harness.fleet.conformity import MACHINE_NAME
from harness.fleet.contract import CONTRACT, Contract, Issued, MachineClass

# The actions that a workflow uses, each pinned by its commit, as those of this project are.
ACTIONS = {
    "checkout": "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1",
    "setup-python": "actions/setup-python@5fda3b95a4ea91299a34e894583c3862153e4b97 # v7.0.0",
    "upload": "actions/upload-artifact@043fb46d1a93c77aae656e7c1c64a875d1fc6a0a # v7.0.1",
    "download": "actions/download-artifact@3e5f45b2cfb9172054b4087a40e8e0b5a5461e7c # v8.0.1",
}

_SBATCH = """\
#!/bin/bash
# Shards of contract {digest} for machines of class {name}. Submit from the directory that has {folder}/ and cases/ in it:
# sbatch {file}
#SBATCH --job-name=fitmatrix-{name}
#SBATCH --array=0-{last}
#SBATCH --time={minutes}
#SBATCH --exclusive
#SBATCH --output=fitmatrix-{name}-%A_%a.log
{options}
set -euo pipefail

shards=({shards})
shard=${{shards[$SLURM_ARRAY_TASK_ID]}}
export {machine}=$SLURMD_NODENAME
unset OMP_NUM_THREADS # torch is to use the cores of the job
exec pytest cases/ --shard {folder}/shards/"$shard".json --results {folder}/results/"$shard" --resume
"""

_WORKFLOW = """\
# Shards of contract {digest}, one job each; commit {folder}/ with it.
name: fitmatrix fleet
on:
  workflow_dispatch:
permissions: {{}}
concurrency:
  group: fitmatrix-fleet-{short}
jobs:
  measure:
    name: ${{{{ matrix.shard }}}}
    runs-on: ${{{{ matrix.labels }}}}
    timeout-minutes: ${{{{ matrix.minutes }}}}
    permissions:
      contents: read
    strategy:
      fail-fast: false
      matrix:
        include:
{rows}
    steps:
      - uses: {checkout}
        with:
          persist-credentials: false
      - uses: {setup-python}
        with:
          python-version: "{python}"
      - name: Install
        run: |
          python -m venv --clear "$RUNNER_TEMP/venv"
          echo "$RUNNER_TEMP/venv/bin" >> "$GITHUB_PATH"
          "$RUNNER_TEMP/venv/bin/pip" install . {pins}
      - name: Measure
        env:
          SHARD: ${{{{ matrix.shard }}}}
          {machine}: ${{{{ runner.name }}}}
        run: |
          pytest cases/ --shard {folder}/shards/"$SHARD".json --results results/"$SHARD"
      - uses: {upload}
        if: always()
        with:
          name: ${{{{ matrix.shard }}}}
          path: results/
  collect:
    needs: measure
    if: always()
    runs-on: ubuntu-24.04
    timeout-minutes: 30
    permissions:
      contents: read
    steps:
      - uses: {checkout}
        with:
          persist-credentials: false
      - uses: {setup-python}
        with:
          python-version: "{python}"
      - name: Install
        run: pip install .
      - uses: {download}
        with:
          path: receipts
      - name: Collect
        run: |
          fitmatrix fleet collect {folder}/{contract} receipts --to results
      - uses: {upload}
        if: always()
        with:
          name: fleet
          path: results/
"""


def slurm(contract: Contract, machine_class: str, folder: Path) -> tuple[str, str]:
    """Return the name and the text of an sbatch file: an array over the last attempt's shards of a class.

    `folder` is where the contract lies, as seen from where the job is submitted.

    Raises:
        UsageError: an option of the class is none of sbatch's, or nothing of the class was handed out.
    """
    kind, shards = contract.machine_class(machine_class), _last_shards(contract, machine_class)
    for option in kind.sbatch:
        if not option.startswith("-") or "\n" in option:
            raise UsageError(f"class {kind.name}: sbatch = {option!r} is no option of sbatch, such as --partition=gpu")
    file = f"fleet-{kind.name}.sbatch"
    text = _SBATCH.format(
        digest=contract.digest,
        name=kind.name,
        file=file,
        folder=shlex.quote(folder.as_posix()),
        last=len(shards) - 1,
        minutes=_minutes(shards),
        options="".join(f"#SBATCH {option}\n" for option in kind.sbatch),
        shards=" ".join(shlex.quote(one.shard) for one in shards),
        machine=MACHINE_NAME,
    )
    return file, text


def github(contract: Contract, folder: Path, python: str) -> str:
    """Return a workflow with a job for each shard of the last attempt, on runners with the labels of its class, and one to collect.

    Raises:
        UsageError: a class has no labels.
    """
    rows = []
    for kind in contract.terms.classes:
        if not kind.runs_on:
            raise UsageError(f'class {kind.name} has no labels of runners: add runs-on = ["self-hosted", ...] and plan again')
        rows += [_row(kind, one) for one in _last_shards(contract, kind.name)]
    own = {
        name: version.partition("+")[0] for name, version in contract.terms.versions.items() if name not in ("fitmatrix", "python")
    }
    return _WORKFLOW.format(
        digest=contract.digest,
        short=contract.digest[:12],
        folder=shlex.quote(folder.as_posix()),
        contract=CONTRACT,
        python=contract.terms.versions.get("python", python),
        rows="\n".join(f"          - {row}" for row in rows),
        pins=" ".join(shlex.quote(f"{name}=={version}") for name, version in own.items()),
        machine=MACHINE_NAME,
        **ACTIONS,
    )


def _row(kind: MachineClass, issued: Issued) -> str:
    """Write a row of the matrix as JSON, which YAML reads."""
    return json.dumps({"shard": issued.shard, "labels": list(kind.runs_on), "minutes": _minutes([issued])})


def _last_shards(contract: Contract, machine_class: str) -> list[Issued]:
    """Return the shards of a class that were handed out last."""
    issued = [one for one in contract.issued if one.machine_class == machine_class]
    if not issued:
        raise UsageError(f"no shard of class {machine_class} was handed out: its precisions and placements name no case")
    last = max(one.attempt for one in issued)
    return [one for one in issued if one.attempt == last]


def _minutes(shards: list[Issued]) -> int:
    return math.ceil(max(one.deadline_s for one in shards) / 60)
