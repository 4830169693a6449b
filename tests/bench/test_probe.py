"""What the probe measures of real memory, files and tiers, and that nothing of it is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.bench.probe import dax, directory, memory
from penstock.bench.probe.base import CannotMeasure, Plan, Subject, Timing, aligned, positions, sample
from penstock.bench.probe.dax import DaxDevice
from penstock.bench.probe.directory import Directory, file_system
from penstock.bench.probe.fit import fit_model
from penstock.bench.probe.memory import MemoryNode, last_level_cache_bytes, nodes
from penstock.bench.probe.runner import measure, point_of, points_to_take, share_of_time
from penstock.bench.probe.targets import default_folders, machine_subjects, named_subjects
from penstock.bench.probe.tier import TierSubject
from penstock.errors import ConfigError
from penstock.profile import Direction, Profile, load_profile, save_profile
from penstock.tiers.registry import parse_tier, register
from tests.test_public import loaded

PLAN = Plan(sizes=(4096, 65536), point_s=0.01, cache_bytes=1 << 20)


def probed(*subjects: Subject, plan: Plan = PLAN) -> Profile:
    return measure(subjects, plan, lambda name, done: None)


def file_tier(root: Path, **options: Any) -> TierSubject:
    register("probefile", "tests.bench.file_tier")
    root.mkdir(exist_ok=True)
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return TierSubject(parse_tier(f"probefile:{root}?{query}" if query else f"probefile:{root}"))


def blocks_left(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.name != "closed"]


def assert_sound(profile: Profile, n_points: int) -> None:
    """Every figure is a finite positive number, and every direction has a model."""
    (tier,) = profile.tiers
    assert len(tier.points) == n_points
    for point in tier.points:
        figures = [point.latency_us_p50, point.latency_us_p99, point.samples, point.batch]
        figures += [] if point.direction is Direction.HOLDS else [point.gb_s]
        assert np.isfinite(figures).all() and min(figures) > 0, point
        assert point.latency_us_p50 <= point.latency_us_p99
    for model in tier.models:
        assert model.latency_s >= 0 and 0 <= model.typical_error <= model.worst_error
        assert model.bytes_per_s is None or model.bytes_per_s > 0
    assert {model.direction for model in tier.models} == {point.direction for point in tier.points}


# ---- memory


def test_memory() -> None:
    profile = probed(MemoryNode(nodes()[0]))
    assert_sound(profile, 6)
    assert profile.tiers[0].kind == "memory"


def test_the_copy_loop_starts_at_its_smallest_segment() -> None:
    profile = probed(MemoryNode(None), plan=Plan((64, 256), 0.005, 1 << 20))
    sizes = {point.size_bytes for point in profile.tiers[0].points if point.direction is Direction.COPY}
    assert sizes == {256}
    assert profile.tiers[0].name == "memory"


def test_reads_read_everything() -> None:
    """The loop's sum is that of the bytes it should touch, so it cannot have skipped any."""
    from penstock.bench.probe.loops import read_pieces

    words = np.random.default_rng(1).integers(-(1 << 62), 1 << 62, 4096)
    spots = positions(words.nbytes, 1024, seed=2)
    assert len(spots) == 32 and len(set(spots.tolist())) == 32
    with np.errstate(over="ignore"):
        assert read_pieces(words.ctypes.data, spots, 1024, 0) == words.sum()


def test_memory_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 100)
    profile = probed(MemoryNode(0))
    assert not profile.tiers and "too little memory" in profile.left_out[0].why


def test_a_node_that_is_not_there() -> None:
    """Binding is real: the system refuses a node that does not exist."""
    missing = max(node or 0 for node in nodes()) + 900
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "nodes", lambda: [0, missing])
        profile = probed(MemoryNode(missing))
    assert "cannot be bound" in profile.left_out[0].why


@pytest.mark.parametrize(("text", "found"), [("0\n", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("\n", [None])])
def test_nodes(text: str, found: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_NODES", tmp_path)
    assert nodes() == [None]
    (tmp_path / "has_memory").write_text(text)
    assert nodes() == found


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_level_cache_bytes() >= 1 << 18
    monkeypatch.setattr(memory, "_CACHES", tmp_path)
    for index, size in enumerate(("32K", "512K", "16384K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes() == 16 << 20


# ---- positions and samples


@pytest.mark.parametrize("size", [64, 100, 4096, 1 << 20, 3 << 20])
def test_positions_are_apart_and_inside(size: int) -> None:
    span, align = 4 << 20, 4096 if size >= 4096 else 64
    spots = np.sort(positions(span, size, seed=3, align=align))
    assert spots[0] >= 0 and spots[-1] + size <= span
    assert (np.diff(spots) >= size).all() and not (spots % align).any()


def test_samples_are_bounded() -> None:
    calls: list[int] = []
    assert len(sample(lambda: calls.append(1), 0.0)) >= 1
    assert len(calls) < 10
    assert len(sample(lambda: calls.append(1), 60.0)) == 20_000, "however short a call is"


def test_aligned_memory_is_touched_and_starts_at_a_page() -> None:
    area = aligned(10_000)
    assert len(area) == 10_000 and area.ctypes.data % 4096 == 0 and (area == 1).all()


# ---- folders


@pytest.mark.parametrize("where", ["disk", "shm"])
def test_a_folder(where: str, tmp_path: Path) -> None:
    folder = tmp_path if where == "disk" else Path("/dev/shm")
    before = set(os.listdir(folder))
    during: set[str] = set()
    subject = Directory(folder)
    profile = measure([subject], PLAN, lambda name, done: during.update(os.listdir(folder)))
    assert_sound(profile, 4)
    assert profile.tiers[0].notes, "it says what was measured: a device, the page cache, or memory"
    assert not [name for name in {*during, *os.listdir(folder)} - before if "penstock-probe" in name]


def test_without_o_direct_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if argument & os.O_DIRECT:
            raise OSError(22, "no")
        return 0

    monkeypatch.setattr(directory.fcntl, "fcntl", refuse)
    monkeypatch.setattr(directory, "file_system", lambda path: "slowfs")
    profile = probed(Directory(tmp_path), plan=Plan((64, 4096), 0.005, 1 << 20))
    assert_sound(profile, 4)
    assert "page cache" in profile.tiers[0].notes[0]


def test_sizes_that_are_no_sectors_are_left_out(tmp_path: Path) -> None:
    if file_system(tmp_path) in ("tmpfs", "overlay"):
        pytest.skip("the temporary folder has no device of its own")
    profile = probed(Directory(tmp_path), plan=Plan((64, 4096), 0.005, 1 << 20))
    if "O_DIRECT:" not in profile.tiers[0].notes[0]:
        pytest.skip("no O_DIRECT here")
    assert {point.size_bytes for point in profile.tiers[0].points} == {4096}


@pytest.mark.parametrize(
    ("path", "why"),
    [("/nonexistent/folder", "no folder"), ("/proc/self/fdinfo", "/proc/self/fdinfo"), ("/sys", "/sys")],
)
def test_folders_that_cannot_be_written_are_named(path: str, why: str) -> None:
    profile = probed(Directory(Path(path)))
    assert not profile.tiers
    assert why in profile.left_out[0].why and profile.left_out[0].name == f"dir:{path}"


def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "may not be written" in probed(Directory(folder)).left_out[0].why


class _Full:
    """What statvfs says of a file system with `free` bytes left."""

    f_frsize = 1

    def __init__(self, free: int) -> None:
        self.f_bavail = free


def test_a_full_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.os, "statvfs", lambda path: _Full(1 << 20))
    assert "too little to measure" in probed(Directory(tmp_path)).left_out[0].why
    monkeypatch.setattr(directory.os, "statvfs", lambda path: _Full(8 << 20))
    profile = probed(Directory(tmp_path), plan=Plan((4096, 8 << 20), 0.005, 1 << 20))
    assert {point.size_bytes for point in profile.tiers[0].points} == {4096}
    assert any("left out" in note for note in profile.tiers[0].notes)


def test_a_folder_that_fails_midway_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def fail(fd: int, buffers: list[memoryview], at: int) -> int:
        if len(buffers[0]) == PLAN.sizes[1]:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, at)

    monkeypatch.setattr(directory.os, "preadv", fail)
    (tier,) = probed(Directory(tmp_path)).tiers
    assert {point.size_bytes for point in tier.points} == {4096}
    assert "Input/output error" in tier.notes[-1]
    assert os.listdir(tmp_path) == []


# ---- DAX


def test_a_device_is_read_and_never_written(tmp_path: Path) -> None:
    device = tmp_path / "dax0.0"
    content = np.random.default_rng(4).bytes(6 << 20)
    device.write_bytes(content)
    device.chmod(0o400)
    assert_sound(probed(DaxDevice(device)), 2)
    assert device.read_bytes() == content


def test_devices_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be opened" in probed(DaxDevice(tmp_path / "dax9.9")).left_out[0].why
    small = tmp_path / "dax0.1"
    small.write_bytes(b"x" * 4096)
    assert "smaller" in probed(DaxDevice(small)).left_out[0].why
    monkeypatch.setattr(dax, "_SYSFS", tmp_path)
    with pytest.raises(CannotMeasure, match="opened"), DaxDevice(tmp_path / "none").opened(PLAN):
        pass


# ---- GPUs


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU: tests/gpu measures it")
def test_without_a_gpu_torch_is_not_imported() -> None:
    code = "from penstock.bench.probe.targets import machine_subjects, named_subjects; machine_subjects()"
    assert not loaded(code) & {"torch", "matplotlib"}


def test_a_gpu_that_torch_cannot_use() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu measures it")
    from penstock.bench.probe.gpu import GpuLink, devices

    assert devices() == 0
    profile = probed(GpuLink(0))
    assert not profile.tiers and profile.left_out[0].why.startswith("torch: ")


# ---- tiers


def test_a_tier(tmp_path: Path) -> None:
    subject = file_tier(tmp_path / "t")
    profile = probed(subject)
    assert_sound(profile, 6)
    assert profile.tiers[0].name == f"probefile:{tmp_path / 't'}"
    assert {point.batch for point in profile.tiers[0].points} == {32}
    holds = profile.tiers[0].model(Direction.HOLDS)
    assert holds is not None and holds.bytes_per_s is None and holds.seconds(1 << 30) == holds.latency_s
    assert blocks_left(tmp_path / "t") == [] and (tmp_path / "t" / "closed").exists()


def test_sizes_that_a_tier_does_not_take_are_left_out(tmp_path: Path) -> None:
    (tier,) = probed(file_tier(tmp_path / "t", largest=4096)).tiers
    assert {point.size_bytes for point in tier.points} == {4096}
    assert tier.notes == ["it does not take blocks of 65536 bytes"]
    assert blocks_left(tmp_path / "t") == []


def test_a_tier_that_breaks_midway(tmp_path: Path) -> None:
    (tier,) = probed(file_tier(tmp_path / "t", breaks_at=65536)).tiers
    assert {point.size_bytes for point in tier.points} == {4096}
    assert "it broke" in tier.notes[-1]
    assert blocks_left(tmp_path / "t") == [] and (tmp_path / "t" / "closed").exists()


def test_a_tier_that_returns_other_bytes_has_no_read_figures(tmp_path: Path) -> None:
    (tier,) = probed(file_tier(tmp_path / "t", flips=1)).tiers
    assert {point.direction for point in tier.points} == {Direction.WRITE}
    assert "other bytes" in tier.notes[-1]


def test_a_small_tier_is_not_filled(tmp_path: Path) -> None:
    (tier,) = probed(file_tier(tmp_path / "t", capacity=1 << 20)).tiers
    assert {(point.size_bytes, point.batch) for point in tier.points} == {(4096, 32), (65536, 2)}


def test_a_tier_that_cannot_be_opened(tmp_path: Path) -> None:
    file_tier(tmp_path / "t")
    profile = probed(TierSubject(parse_tier(f"probefile:{tmp_path / 'none'}")))
    assert "is no folder" in profile.left_out[0].why


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_everything_is_removed_however_it_ends(error: type[BaseException], tmp_path: Path) -> None:
    folder, tier = tmp_path / "d", tmp_path / "t"
    folder.mkdir()

    def began(name: str, done: int) -> None:
        if done == 3:
            raise error

    for subject, root in ((Directory(folder), folder), (file_tier(tier), tier)):
        with pytest.raises(error):
            measure([subject], PLAN, began)
        assert blocks_left(root) == []
    assert (tier / "closed").exists()


# ---- the model


@pytest.mark.parametrize("latency", [0.0, 1e-7, 50e-6, 0.2])
@pytest.mark.parametrize("rate", [1e6, 3e9, 4e11])
def test_the_model_gives_back_what_made_the_points(latency: float, rate: float) -> None:
    sizes = [4**power for power in range(3, 14)]
    points = [(size, Timing(np.full(5, latency + size / rate))) for size in sizes]
    model = fit_model(Direction.READ, points)
    for size in sizes:
        assert model.seconds(size) == pytest.approx(latency + size / rate, rel=1e-3)
    assert model.worst_error < 1e-3
    if latency and latency > 64 / rate:
        assert model.latency_s == pytest.approx(latency, rel=0.01)


def test_the_model_of_noisy_points_and_its_error() -> None:
    rng = np.random.default_rng(7)
    sizes = [2**power for power in range(6, 27)]
    true = [20e-6 + size / 2e9 for size in sizes]
    points = [(size, Timing(np.full(3, t * np.exp(rng.normal(0, 0.1))))) for size, t in zip(sizes, true)]
    model = fit_model(Direction.WRITE, points)
    assert model.latency_s == pytest.approx(20e-6, rel=0.1)
    assert model.bytes_per_s == pytest.approx(2e9, rel=0.15)
    assert 0.05 < model.typical_error < 0.15 < model.worst_error < 0.5


def test_the_model_is_the_best_of_its_kind() -> None:
    """No other latency and rate near it is better: what is found is a minimum."""
    rng = np.random.default_rng(8)
    sizes = np.array([4**power for power in range(3, 14)])
    seconds = (3e-6 + sizes / 1e9) * np.exp(rng.normal(0, 0.4, len(sizes)))
    model = fit_model(Direction.READ, [(int(s), Timing(np.array([t]))) for s, t in zip(sizes, seconds)])
    assert model.bytes_per_s is not None

    def loss(latency: float, rate: float) -> float:
        return float(np.sum(np.log((latency + sizes / rate) / seconds) ** 2))

    best = loss(model.latency_s, model.bytes_per_s)
    for a in (0.9, 0.99, 1.01, 1.1):
        for b in (0.9, 0.99, 1.01, 1.1):
            assert loss(model.latency_s * a, model.bytes_per_s * b) >= best - 1e-9


def test_batches_count_as_calls_of_more_bytes() -> None:
    """One block costs 1 ms, 32 blocks in a call 2 ms: only both together tell latency from bandwidth."""
    rate = 31 * 4096 / 1e-3
    timing = Timing(np.full(3, 1e-3), 32, np.full(3, 2e-3))
    model = fit_model(Direction.READ, [(4096, timing)])
    assert model.seconds(4096) == pytest.approx(1e-3, rel=1e-3)
    assert model.bytes_per_s == pytest.approx(rate, rel=1e-2)
    point = point_of(Direction.READ, 4096, timing)
    assert point.gb_s == pytest.approx(32 * 4096 / 2e-3 / 1e9, rel=1e-3) and point.latency_us_p50 == 1000


def test_one_size_says_nothing_of_latency() -> None:
    model = fit_model(Direction.READ, [(1 << 20, Timing(np.full(3, 1e-3)))])
    assert model.latency_s == 0 and model.bytes_per_s == pytest.approx((1 << 20) / 1e-3)
    with pytest.raises(ValueError, match="no points"):
        fit_model(Direction.READ, [])


# ---- the whole


def test_what_there_is_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert default_folders() == [Path("/dev/shm"), tmp_path]
    assert machine_subjects()[0].name.startswith("memory")
    twice = named_subjects([tmp_path, tmp_path], [])
    assert [subject.name for subject in twice] == [f"dir:{tmp_path}"]
    with pytest.raises(ConfigError, match=r"'dsk' is unknown.*did you mean 'disk'"):
        named_subjects([], ["dsk:/x"])


def test_time_is_shared_out() -> None:
    assert points_to_take([Directory(Path("/")), MemoryNode(None)], (1, 2, 3)) == 15
    assert share_of_time(60, 120) == 0.5
    assert share_of_time(60, 3) == 1.0 and share_of_time(1, 10_000) == 0.02


def test_the_profile_comes_back(tmp_path: Path) -> None:
    profile = probed(MemoryNode(None), Directory(tmp_path), Directory(Path("/nonexistent")))
    path = save_profile(profile, tmp_path / "a" / "profile.json")
    assert load_profile(path) == profile
    assert [each.name for each in profile.left_out] == ["dir:/nonexistent"]
    assert profile.tier("memory") is profile.tiers[0] and profile.tier("none") is None
