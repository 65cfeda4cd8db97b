"""The machine: tiers, limits of containers, cards by NVML, versions."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from harness.core.records import Machine, Tier
from harness.core.units import GIB, MIB
from harness.machine import bandwidth, cgroup
from harness.machine.nvml import named_devices
from harness.machine.probe import Link, limited, links, probe, versions
from tests.support import builders

V1_UNLIMITED = 0x7FFFFFFFFFFFF000
V2_MOUNT = "35 24 0:30 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{name}"


class Tree:
    """A /proc and /sys to read limits from."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def v2(self, group: str, top: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{group}")
        self.write("proc/self/mountinfo", V2_MOUNT.format(top=top))

    def v1(self, group: str, top: str = "/") -> None:
        self.write("proc/self/cgroup", f"12:cpu,cpuacct:{group}\n4:memory:{group}\n0::/")
        self.write("proc/self/mountinfo", "\n".join(V1_MOUNT.format(top=top, name=name) for name in ("memory", "cpu")))

    def group(self, path: str, **figures: object) -> None:
        """Write the files of one group; memory__max stands for memory.max."""
        for name, figure in figures.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('__', '.')}", figure)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# The largest file that is mapped


@pytest.mark.parametrize(("mode", "most"), [(0, 24 * GIB), (1, None), (2, 7 * GIB)])
def test_how_large_a_file_the_kernel_maps(tree: Tree, mode: int, most: int | None) -> None:
    assert probe(root=tree.root).mapping_bytes is None
    tree.write("proc/sys/vm/overcommit_memory", mode)
    sizes = {"MemTotal": 16 * GIB, "SwapTotal": 8 * GIB, "CommitLimit": 12 * GIB, "Committed_AS": 5 * GIB}
    tree.write("proc/meminfo", "\n".join(f"{name}: {size >> 10} kB" for name, size in sizes.items()))
    assert probe(root=tree.root).mapping_bytes == most
    tree.write("proc/meminfo", "MemFree: 1 kB\nHugePages_Total: 0\nodd:\n")
    assert probe(root=tree.root).mapping_bytes is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_larger_file_is_really_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    most = probe().mapping_bytes
    if most is None or Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() != "0":
        pytest.skip("this kernel is set to another mode")
    (tmp_path / "file").touch()
    for size, granted in ((most - GIB, True), (most + GIB, False)):
        os.truncate(tmp_path / "file", size)
        with contextlib.nullcontext() if granted else pytest.raises(RuntimeError, match="unable to mmap"):
            torch.UntypedStorage.from_file(str(tmp_path / "file"), False, size)


# Limits of containers


def test_no_proc_no_limit(tmp_path: Path) -> None:
    assert cgroup.memory(tmp_path) == (None, None)
    assert cgroup.cores(tmp_path) >= 1


def test_v2_limit_and_what_is_left_of_it(tree: Tree) -> None:
    tree.v2("/job")
    tree.group(
        "job",
        memory__max=8 * GIB,
        memory__high="max",
        memory__current=6 * GIB,
        memory__stat=f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\nslab_reclaimable {MIB}",
    )
    assert cgroup.memory(tree.root) == (8 * GIB, 5 * GIB + MIB)


def test_v2_unlimited(tree: Tree) -> None:
    tree.v2("/job")
    tree.group("job", memory__max="max", memory__high="max", memory__current=6 * GIB)
    assert cgroup.memory(tree.root) == (None, None)


def test_v2_high_throttles_before_max_kills(tree: Tree) -> None:
    tree.v2("/job")
    tree.group("job", memory__max=8 * GIB, memory__high=4 * GIB, memory__current=0)
    assert cgroup.memory(tree.root) == (4 * GIB, 4 * GIB)


def test_the_least_of_all_ancestors_counts(tree: Tree) -> None:
    """The slice allows less than the service, and a neighbor in the grandparent has eaten nearly all."""
    tree.v2("/user.slice/user-1000.slice/run.service")
    tree.group("user.slice/user-1000.slice/run.service", memory__max=16 * GIB, memory__current=GIB)
    tree.group("user.slice/user-1000.slice", memory__max=8 * GIB, memory__current=2 * GIB)
    tree.group("user.slice", memory__max=64 * GIB, memory__current=63 * GIB)
    assert cgroup.memory(tree.root) == (8 * GIB, GIB)


def test_a_group_beside_ours_does_not_count(tree: Tree) -> None:
    tree.v2("/ours")
    tree.group("ours", memory__max=8 * GIB, memory__current=0)
    tree.group("theirs", memory__max=GIB, memory__current=0)
    assert cgroup.memory(tree.root) == (8 * GIB, 8 * GIB)


@pytest.mark.parametrize(
    ("group", "top"),
    [("/", "/"), ("/docker/abc", "/docker/abc"), ("/docker/abc", "/elsewhere"), ("/../../host", "/")],
    ids=["own namespace", "mounted at our group", "mounted elsewhere", "outside the namespace"],
)
def test_inside_a_container_the_mount_is_our_group(tree: Tree, group: str, top: str) -> None:
    tree.v2(group, top)
    tree.group(".", memory__max=2 * GIB, memory__current=GIB)
    assert cgroup.memory(tree.root) == (2 * GIB, GIB)


def test_v1_limit_and_what_is_left_of_it(tree: Tree) -> None:
    tree.v1("/docker/abc")
    tree.group(
        "memory/docker/abc",
        memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=3 * GIB,
        memory__stat=f"active_file 1\ninactive_file 1\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}",
    )
    tree.group("memory", memory__limit_in_bytes=V1_UNLIMITED, memory__usage_in_bytes=9 * GIB)
    assert cgroup.memory(tree.root) == (4 * GIB, 3 * GIB)


def test_v1_unlimited(tree: Tree) -> None:
    tree.v1("/")
    tree.group("memory", memory__limit_in_bytes=V1_UNLIMITED, memory__stat=f"hierarchical_memory_limit {V1_UNLIMITED}")
    assert cgroup.memory(tree.root) == (None, None)


def test_v1_tells_of_a_limit_above_the_container(tree: Tree) -> None:
    tree.v1("/pod/box", top="/pod/box")
    tree.group("memory", memory__limit_in_bytes=V1_UNLIMITED, memory__stat=f"hierarchical_memory_limit {2 * GIB}")
    assert cgroup.memory(tree.root) == (2 * GIB, 2 * GIB)


def test_both_hierarchies_at_once(tree: Tree) -> None:
    """systemd's hybrid: memory is in v1, and v2 is mounted beside it without controllers."""
    tree.v1("/job")
    mounts = (tree.root / "proc/self/mountinfo").read_text()
    tree.write("proc/self/mountinfo", mounts + V2_MOUNT.format(top="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"))
    tree.group("memory/job", memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    tree.group("unified", cgroup__procs="1")
    assert cgroup.memory(tree.root) == (GIB, GIB)


def test_mount_point_with_a_blank(tree: Tree) -> None:
    tree.v2("/")
    tree.write("proc/self/mountinfo", r"35 24 0:30 / /my\040cgroup rw - cgroup2 cgroup2 rw")
    tree.write("my cgroup/memory.max", GIB)
    assert cgroup.memory(tree.root)[0] == GIB


def test_more_held_than_allowed_leaves_nothing(tree: Tree) -> None:
    tree.v2("/job")
    tree.group("job", memory__max=GIB, memory__current=2 * GIB)
    assert cgroup.memory(tree.root) == (GIB, 0)


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)])
def test_cores_by_v2_quota(tree: Tree, quota: str, cores: int) -> None:
    tree.v2("/job")
    tree.group("job", cpu__max=quota)
    assert cgroup.cores(tree.root) == cores


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("quota", "cores"), [(300000, 3), (-1, 8)])
def test_cores_by_v1_quota(tree: Tree, quota: int, cores: int) -> None:
    tree.v1("/job")
    tree.group("cpu/job", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert cgroup.cores(tree.root) == cores


def test_what_a_quota_has_withheld_is_read_anew_each_time(tree: Tree) -> None:
    tree.v2("/pod/job")
    tree.group("pod/job", cpu__max="max 100000", cpu__stat="usage_usec 9\nnr_throttled 0\nthrottled_usec 0")
    assert cgroup.withheld(tree.root) is None
    tree.group("pod", cpu__max="150000 100000", cpu__stat="usage_usec 9\nnr_throttled 3\nthrottled_usec 250000")
    withheld = cgroup.withheld(tree.root)
    assert withheld is not None
    assert withheld() == 0.25
    tree.group("pod", cpu__stat="usage_usec 9\nnr_throttled 4\nthrottled_usec 1000000")
    assert withheld() == 1.0


def test_v1_counts_what_is_withheld_in_nanoseconds(tree: Tree) -> None:
    tree.v1("/job")
    tree.group("cpu/job", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000, cpu__stat="nr_throttled 3\nthrottled_time 1500000000")
    withheld = cgroup.withheld(tree.root)
    assert withheld is not None
    assert withheld() == 1.5


# The cpu and disk tiers


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=32 * GIB, available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def cpu_tier(machine: Machine) -> Tier:
    tier = machine.tier("cpu")
    assert tier is not None
    return tier


@pytest.mark.usefixtures("ram")
def test_a_container_limits_what_a_case_may_use(tree: Tree) -> None:
    tree.v2("/job")
    tree.group("job", memory__max=8 * GIB, memory__current=2 * GIB)
    tier = cpu_tier(probe(root=tree.root))
    assert (tier.total_bytes, tier.free_bytes, tier.limit_bytes) == (32 * GIB, 6 * GIB, 8 * GIB)
    assert tier.capacity_bytes == 6 * GIB


@pytest.mark.usefixtures("ram")
def test_a_limit_above_what_there_is_limits_nothing(tree: Tree) -> None:
    tree.v2("/job")
    tree.group("job", memory__max=64 * GIB, memory__current=GIB)
    tier = cpu_tier(probe(root=tree.root))
    assert (tier.free_bytes, tier.limit_bytes) == (20 * GIB, None)


@pytest.mark.usefixtures("ram")
@pytest.mark.parametrize(("emulated", "limit"), [(4 * GIB, 4 * GIB), (16 * GIB, 8 * GIB)])
def test_the_lesser_of_emulated_and_real_limit(tree: Tree, emulated: int, limit: int) -> None:
    tree.v2("/job")
    tree.group("job", memory__max=8 * GIB, memory__current=0)
    assert cpu_tier(probe(root=tree.root, ram_bytes=emulated)).limit_bytes == limit


def test_disk_of_a_folder_not_made_yet(tmp_path: Path) -> None:
    here, there = probe(scratch=tmp_path).tier("disk"), probe(scratch=tmp_path / "not/made").tier("disk")
    assert here is not None
    assert there is not None
    assert there.total_bytes == here.total_bytes
    assert not (tmp_path / "not").exists()


# Cards, through a stub of NVML


class NVMLError(Exception):
    pass


class Nvml(ModuleType):
    """The part of nvidia-ml-py that is used, with cards that may refuse any call."""

    NVMLError = NVMLError

    def __init__(self, *cards: dict[str, Any], driver: str = "580.95.05") -> None:
        super().__init__("pynvml")
        self.cards = cards
        self.driver = driver
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 # NVML's name
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return self.driver

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:  # noqa: N802
        for each in (each for card in self.cards for each in card.get("slices", []) if each is not None):
            if each["nvmlDeviceGetUUID"] == uuid:
                return dict(each)
        raise NVMLError("Not Found")

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: N802
        found: dict[str, Any] | None = card["slices"][index]
        if found is None:
            raise NVMLError("Not Found")
        return found

    def nvmlDeviceGetMaxMigDeviceCount(self, card: dict[str, Any]) -> int:  # noqa: N802
        return len(card["slices"])

    def __getattr__(self, call: str) -> Any:
        def ask(card: dict[str, Any], *_: object) -> Any:
            if call not in card:
                raise NVMLError(f"{call}: not supported")
            return card[call]

        if call.startswith("nvmlDeviceGet"):
            return ask
        raise AttributeError(call)


def card(name: str, total: int, free: int, capability: tuple[int, int], uuid: str = "GPU-0") -> dict[str, Any]:
    return {
        "nvmlDeviceGetName": name,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=total, free=free, used=total - free),
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetUUID": uuid,
    }


RTX_3060 = card("NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, (8, 6), "GPU-aaaa-1")
A100 = card("NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB, (8, 0), "GPU-bbbb-2")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvml]:
    library = Nvml(RTX_3060, A100)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield library
    assert library.open == 0, "NVML was left open"


@pytest.mark.usefixtures("ram")
def test_cards(nvml: Nvml, tree: Tree) -> None:
    machine = probe(root=tree.root)
    assert [tier.name for tier in machine.tiers] == ["gpu:0", "gpu:1", "cpu", "disk"]
    first, second = machine.gpus
    assert first == Tier(
        name="gpu:0",
        kind="gpu",
        total_bytes=12 * GIB,
        free_bytes=11 * GIB,
        bytes_per_s=360e9,
        model="NVIDIA GeForce RTX 3060",
        compute_capability="8.6",
    )
    assert (second.bytes_per_s, second.compute_capability) == (2039e9, "8.0")
    assert machine.driver == nvml.driver
    assert machine.name == "RTX 3060 12GB, A100-SXM4 80GB, 32.0 GiB RAM"


@pytest.mark.usefixtures("nvml")
def test_emulated_vram_limits_each_card() -> None:
    machine = probe(vram_bytes=8 * GIB)
    assert [tier.limit_bytes for tier in machine.gpus] == [8 * GIB, 8 * GIB]
    assert [tier.capacity_bytes for tier in machine.gpus] == [8 * GIB, 8 * GIB]


@pytest.mark.usefixtures("ram")
def test_two_cards_alike_are_named_once(nvml: Nvml) -> None:
    nvml.cards = (RTX_3060, RTX_3060)
    assert probe().name == "2x RTX 3060 12GB, 32.0 GiB RAM"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ("nvmlDeviceGetName", "model"),
        ("nvmlDeviceGetMemoryInfo", "total_bytes"),
        ("nvmlDeviceGetMemoryInfo", "free_bytes"),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability"),
    ],
)
def test_what_a_card_does_not_tell_is_unknown(nvml: Nvml, call: str, field: str) -> None:
    nvml.cards = ({name: value for name, value in RTX_3060.items() if name != call},)
    (tier,) = probe().gpus
    assert getattr(tier, field) is None
    assert tier.kind == "gpu"


def test_an_unheard_of_card_has_no_bandwidth(nvml: Nvml) -> None:
    nvml.cards = (card("NVIDIA Quantum 9000", 12 * GIB, 11 * GIB, (99, 0)),)
    (tier,) = probe().gpus
    assert (tier.bytes_per_s, tier.model, tier.total_bytes) == (None, "NVIDIA Quantum 9000", 12 * GIB)


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("visible", "models"),
    [
        ("", []),
        ("-1", []),
        ("1", ["A100"]),
        ("1,0", ["A100", "RTX 3060"]),
        ("GPU-bbbb", ["A100"]),
        ("0,7,1", ["RTX 3060"]),
        ("GPU-", []),
        ("0,0", []),
        ("0,GPU-bbbb", ["RTX 3060"]),
        ("GPU-bbbb,0", ["A100"]),
        ("GPU-bbbb,GPU-bbbb-2", []),
        ("1gpu2,0ampere", ["A100", "RTX 3060"]),
        ("MIG-none", []),
    ],
)
def test_only_cards_that_cuda_sees_in_its_order(monkeypatch: pytest.MonkeyPatch, visible: str, models: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = probe().gpus
    assert [tier.name for tier in gpus] == [f"gpu:{index}" for index in range(len(models))]
    assert all(model in (tier.model or "") for tier, model in zip(gpus, models, strict=True))


SLICES = [
    card(f"NVIDIA A100-SXM4-80GB MIG {size}", GIB * gib, GIB, (8, 0), f"MIG-{gib}")
    for size, gib in (("3g.40gb", 40), ("1g.10gb", 10))
]


@pytest.mark.parametrize(("visible", "total"), [(None, 40), ("0", 40), ("MIG-10", 10)])
def test_a_card_cut_into_slices_has_the_memory_of_one(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, total: int
) -> None:
    nvml.cards = ({**A100, "nvmlDeviceGetMigMode": [1, 1], "slices": SLICES},)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tier,) = probe().gpus
    assert tier.total_bytes == total * GIB
    assert tier.bytes_per_s == 2039e9 * total / 80, "a slice has a share of the card's bandwidth"


def test_a_slice_is_found_behind_a_gap(nvml: Nvml) -> None:
    """A container that was handed the third slice alone sees a hole where the others are."""
    nvml.cards = ({**A100, "nvmlDeviceGetMigMode": [1, 1], "slices": [None, None, SLICES[1]]},)
    assert probe().gpus[0].total_bytes == 10 * GIB
    nvml.cards = ({**A100, "nvmlDeviceGetMigMode": [1, 1], "slices": [None, None]},)
    assert probe().gpus == (), "a card in slices, of which none is ours, is no card"


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    "visible",
    ["", " ", "-1", "0", "0,1", "1,0", "0,0", "0,GPU-2", "GPU-2,0", "1gpu2,2ampere", "+1,2", "-0,1", "0,-1,1", "0,,1", " 1 , 0",
     "GPU-a,GPU-b", "GPU-a, GPU-b", "GPU-a,GPU-a", "MIG-a,MIG-b,GPU-c", "MIG-a,MIG-a", "gpu", "99", "0,99,1", "07", "1.5,2"],
)  # fmt: skip
def test_the_list_of_visible_devices_is_read_as_torch_reads_it(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert named_devices(visible) == torch.cuda._parse_visible_devices()


def test_a_card_with_slices_switched_off_is_whole(nvml: Nvml) -> None:
    nvml.cards = ({**A100, "nvmlDeviceGetMigMode": [0, 0]},)
    assert probe().gpus[0].total_bytes == 80 * GIB


@pytest.mark.usefixtures("ram")
@pytest.mark.parametrize(
    ("name", "capability", "bytes_per_s"),
    [("NVIDIA GB10", (12, 1), 273.2e9), ("NVIDIA Thor", (11, 0), 273e9), ("Orin (nvgpu)", (8, 7), 204.8e9)],
)
def test_a_card_that_shares_the_ram(nvml: Nvml, name: str, capability: tuple[int, int], bytes_per_s: float) -> None:
    nvml.cards = ({"nvmlDeviceGetName": name, "nvmlDeviceGetCudaComputeCapability": capability},)
    (tier,) = probe().gpus
    assert tier.shared
    assert (tier.total_bytes, tier.free_bytes, tier.bytes_per_s) == (32 * GIB, 20 * GIB, bytes_per_s)


def test_a_card_of_its_own_that_tells_no_memory_is_not_taken_for_the_ram(nvml: Nvml) -> None:
    nvml.cards = ({name: told for name, told in A100.items() if name != "nvmlDeviceGetMemoryInfo"},)
    (tier,) = probe().gpus
    assert (tier.shared, tier.total_bytes) == (False, None)


def test_links(nvml: Nvml) -> None:
    pcie = {"nvmlDeviceGetMaxPcieLinkGeneration": 4, "nvmlDeviceGetCurrPcieLinkWidth": 8}
    nvml.cards = ({**RTX_3060, **pcie}, A100)
    first, second = links()
    assert (first.tier, first.generation, first.lanes) == ("gpu:0", 4, 8)
    assert first.bytes_per_s == pytest.approx(15.75e9, rel=0.01)
    assert second == Link(tier="gpu:1")


def test_no_nvml_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probe().gpus == ()
    assert probe().driver is None


def test_no_nvml_library(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    monkeypatch.setattr(nvml, "nvmlInit", refuse)
    assert probe().gpus == ()


# Bandwidth


def test_bandwidth_is_measured_on_request_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads, _: 1e9 * threads)
    monkeypatch.setattr(bandwidth, "measure_disk", lambda folder, _: 3e9 if folder == tmp_path else None)
    assert [tier.bytes_per_s for tier in probe(scratch=tmp_path).tiers[-2:]] == [None, None]
    measured = probe(scratch=tmp_path / "not/made", measure=True)
    assert [tier.bytes_per_s for tier in measured.tiers[-2:]] == [1e9 * (measured.cores or 0), 3e9]
    again = probe(scratch=tmp_path)
    assert [tier.bytes_per_s for tier in again.tiers[-2:]] == [tier.bytes_per_s for tier in measured.tiers[-2:]]


def test_measuring_takes_a_small_part_of_what_a_container_may_use(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []
    monkeypatch.setattr(bandwidth, "measure_ram", lambda _, room: rooms.append(room))
    monkeypatch.setattr(bandwidth, "measure_disk", lambda *_: None)
    tree.v2("/job")
    tree.group("job", memory__max=64 * MIB, memory__current=0)
    probe(root=tree.root, measure=True)
    assert rooms == [8 * MIB]


# This machine


def test_this_machine() -> None:
    machine = probe()
    cpu, disk = cpu_tier(machine), machine.tier("disk")
    assert cpu.total_bytes is not None
    assert cpu.free_bytes is not None
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert disk is not None
    assert disk.total_bytes
    assert machine.cores is not None
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.tiers[-2:] == (cpu, disk)


def test_a_builder_s_name_in_the_release_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.18.44-alice-on-wonderland")
    machine = probe()
    assert machine.system is not None
    assert machine.system.endswith(" 6.18")


def test_cpu_by_name(tree: Tree) -> None:
    tree.write(
        "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD Ryzen 9   7950X\nprocessor\t: 1\nmodel name\t: AMD Ryzen 9   7950X"
    )
    assert probe(root=tree.root).cpu == "AMD Ryzen 9 7950X"


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert all(isinstance(value, str) and value for value in found.values())


def test_reads_the_machine_without_torch() -> None:
    heavy = "{'torch', 'numpy', 'transformers'}"
    code = f"import sys, harness.machine.probe as m; m.probe(); m.versions(); print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Less than there is


def test_a_machine_under_limits_keeps_its_name_and_its_smaller_limits() -> None:
    cpu = Tier(name="cpu", kind="cpu", total_bytes=64 * GIB, free_bytes=60 * GIB, limit_bytes=8 * GIB)
    there = Machine(name="a machine", tiers=(builders.gpu(0), builders.gpu(1), cpu))
    seen = limited(there, replace(builders.case(), vram_bytes=6 * GIB, ram_bytes=16 * GIB))
    assert seen.name == there.name
    assert [tier.capacity_bytes for tier in seen.tiers] == [6 * GIB, 6 * GIB, 8 * GIB]
    assert limited(there, builders.case()) == there
