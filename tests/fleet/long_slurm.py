"""Job files in a real Slurm: two nodes of it on this machine, an array over shards, a job that is lost and handed out again.

Run by `tox run -e fleet` where Slurm and MUNGE are installed (Debian: slurm-wlm, munge); the workers are scripted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest

from harness.fleet import lease
from harness.fleet.collect import Collected, collect
from harness.fleet.contract import read_contract
from harness.fleet.receipt import find_receipts, read_receipt
from tests.support import ray_runs, runs
from tests.support.reporting import Figure, gathered

DAEMONS = ("munged", "slurmctld", "slurmd")
pytestmark = pytest.mark.skipif(
    any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in DAEMONS), reason="needs Slurm and MUNGE"
)
NODES, MODELS, PRECISIONS = ("lab-1", "lab-2"), 4, ("bf16", "int8")
CASES, JOBS = MODELS * len(PRECISIONS), "fleet-here.sbatch"
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock
SlurmctldPort={port}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={place}/prolog
SelectType=select/cons_tres
ReturnToService=2
MinJobAge=3600
KillWait=5
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    for section in gathered(request, "fleet.md", "Many machines", "tox run -e fleet", "slurm"):
        yield section.figures


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """Start Slurm with two nodes, whose jobs have a lease for each node; end all of it."""
    with tempfile.TemporaryDirectory(prefix="fs-", ignore_cleanup_errors=True) as folder:
        place, port = Path(folder), 20000 + secrets.randbelow(10000)
        key = place / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (place / "state").mkdir()
        cores = os.cpu_count() or 1
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + number} CPUs={cores}"
            for number, name in enumerate(NODES, 1)
        ]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (place / "slurm.conf").write_text(_CONF.format(place=place, user=user, port=port, nodes="\n".join(nodes)))
        prolog = place / "prolog"
        prolog.write_text(f'#!/bin/sh\necho "export {lease.LEASE}={place}/$SLURMD_NODENAME.lease"\n')
        prolog.chmod(0o755)
        files = {"socket": "munge.sock", "key-file": "key", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "seed"}
        try:
            _call(place, "munged", "--force", *(f"--{name}={place / file}" for name, file in files.items()))
            _call(place, "slurmctld")
            for name in NODES:
                _call(place, "slurmd", "-N", name)
            deadline = time.monotonic() + 60
            while _call(place, "sinfo", "-h", "-N", "-o", "%T").split() != ["idle"] * len(NODES):
                assert time.monotonic() < deadline, (place / "slurmctld.log").read_text()
                time.sleep(0.5)
            yield place
            _call(place, "scancel", "--full", f"--user={user}")
            _without_jobs(place)
        finally:
            for file in (*(f"{name}.pid" for name in NODES), "slurmctld.pid", "munge.pid"):
                if (place / file).is_file():
                    process = psutil.Process(int((place / file).read_text()))
                    process.terminate()
                    process.wait(30)


def _call(cluster: Path, *words: str, folder: Path | None = None) -> str:
    """Call a program of Slurm; return what it said."""
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin", "SLURM_CONF": str(cluster / "slurm.conf")}
    plugin = {"PYTHONPATH": str(runs.ROOT), "PYTEST_ADDOPTS": "-p harness.plugin -p no:cacheprovider -o 'markers=stage(n): order'"}
    done = subprocess.run(words, cwd=folder, env={**os.environ, **own, **plugin}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or words[:2] == ("sbatch", "--wait"), done.stdout + done.stderr
    return done.stdout


def _without_jobs(cluster: Path) -> None:
    """Wait until no job is left."""
    deadline = time.monotonic() + 120
    while _call(cluster, "squeue", "-h"):
        assert time.monotonic() < deadline, (cluster / "slurmctld.log").read_text()
        time.sleep(0.5)


def _fleet(place: Path, *words: str) -> str:
    status, said = ray_runs.finish(ray_runs.start(place, *words))
    assert status == 0, said
    return said


def _planned(place: Path, **behaviors: str) -> None:
    """Plan a shard for each model, with options of sbatch, and write the job file."""
    names = [f"m{number}" for number in range(MODELS)]
    ray_runs.folder(place, names, NODES, **behaviors)
    with (place / "fleet.toml").open("a", encoding="utf-8") as file:
        file.write('sbatch = ["--partition=lab", "--nodes=1"]\n')
    ray_runs.plan(place, names, PRECISIONS)
    _fleet(place, "emit", "slurm", "fleet")


def _held(place: Path) -> Collected:
    return collect(read_contract(place / "fleet"), find_receipts([place / "fleet/results"]), datetime.now(timezone.utc))


def _machines(place: Path) -> list[str]:
    """Return the machines that the receipts name, in no order."""
    return [read_receipt(path).machine for path in find_receipts([place / "fleet/results"])]


def _logs(place: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in place.glob("fitmatrix-here-*.log"))


def test_an_array_measures_every_shard_once(cluster: Path, tmp_path: Path, figures: list[Figure]) -> None:
    place = tmp_path / "f"
    _planned(place)
    _call(cluster, "sbatch", "--test-only", JOBS, folder=place)
    _call(cluster, "sbatch", "--wait", JOBS, folder=place)
    found, machines = _held(place), _machines(place)
    what = f"cases counted of an sbatch array of {len(machines)} shards, measured by {len(set(machines))} nodes"
    figures.append(Figure(what=what, rows=CASES, found=str(len(found.counted)), wanted="all"))
    assert (len(found.counted), found.missing, found.findings) == (CASES, [], ()), _logs(place)
    assert set(machines) == set(NODES)


def test_what_a_lost_job_leaves_is_handed_out_again(cluster: Path, tmp_path: Path, figures: list[Figure]) -> None:
    """One task is killed with its processes while it measures; the others go on, and the next array brings what is missing."""
    place = tmp_path / "f"
    _planned(place, bf16="brisk", int8="brisk")
    job = _call(cluster, "sbatch", "--parsable", JOBS, folder=place).strip()
    deadline = time.monotonic() + 120
    while not any((place / "fleet").rglob("receipt-here-1.json")):
        assert time.monotonic() < deadline, _logs(place)
        time.sleep(0.1)
    _call(cluster, "scancel", "--signal=KILL", "--full", f"{job}_0")
    _without_jobs(cluster)
    lost = _held(place)
    status = _fleet(place, "status", "fleet", "fleet/results")
    _fleet(place, "resume", "fleet", "fleet/results")
    _fleet(place, "emit", "slurm", "fleet")
    _call(cluster, "sbatch", "--wait", JOBS, folder=place)
    found = _held(place)
    what = f"cases counted after a task was killed ({len(lost.missing)} were missing) and the next array had run"
    figures.append(Figure(what=what, rows=CASES, found=str(len(found.counted)), wanted="all"))
    assert 0 < len(lost.missing) < CASES, status
    assert (len(found.counted), found.missing) == (CASES, []), _logs(place)
