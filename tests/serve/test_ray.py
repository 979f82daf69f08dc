"""``--on ray``: the files of one process from several workers, also when workers, or the one who asks, are killed."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import ssd_janus.cli
from ssd_janus import Pipeline, cluster, drawing, ray_workers, remote
from ssd_janus.layouts import GenEval
from ssd_janus.parquet import Parquet
from ssd_janus.prompts import gather

sys.path.insert(0, str(Path(__file__).parents[1] / "janus"))

import tiny  # noqa: E402

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]

Begun = Callable[[], list[tuple[int, int]]]  # number and process of the units that were begun
PROMPTS = ("a red circle", "two blue squares", "a heart", "three pink rings", "a green star", "a cross", "one", "two")
LIMIT = 1200.0  # seconds; only for what hangs

# A cluster of three workers' size, whatever the machine has; ends when its standard input does.
HOLDER = """
import sys
import ray
ray.init("local", num_cpus=6, num_gpus=0, object_store_memory=200 << 20, include_dashboard=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Of all processes here: on the loopback interface, in nobody's way, and with a secret of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**cluster.LOCAL, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "token",
                            "RAY_AUTH_TOKEN": secrets.token_hex(32), "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint."""
    path = tmp_path_factory.mktemp("tiny-janus")
    tiny.build_model().save_pretrained(path)
    tiny.build_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def address(environment: None) -> Iterator[str]:
    """A cluster that is there already."""
    own = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short names
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, own], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert holder.stdin is not None and holder.stdout is not None
        yield holder.stdout.readline().strip()
        holder.stdin.close()
        holder.wait(60)
    finally:
        holder.kill()
        holder.wait()
        assert gone(lambda: processes(str(own))), processes(str(own))
        shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that one process draws in a layout."""
    found: dict[str, Path] = {}

    def drawn(layout: str) -> Path:
        if layout not in found:
            found[layout] = tmp_path_factory.mktemp("alone") / layout
            result = generate(folder, found[layout], layout)
            assert result.exit_code == 0, result.output
        return found[layout]

    return drawn


def arguments(folder: Path, out: Path, layout: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """Eight units of a prompt with two pictures."""
    return ["generate", *prompts, "--model", str(folder), "--out", str(out), "--images-per-prompt", "2",
            "--batch-size", "2", "--seed", "5", *([] if layout == "plain" else ["--layout", layout])]


def generate(folder: Path, out: Path, layout: str, *more: str, prompts: Sequence[str] = PROMPTS) -> Result:
    return CliRunner().invoke(ssd_janus.cli.app, [*arguments(folder, out, layout, prompts), *more])


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def processes(sign: str) -> dict[int, str]:
    """Command lines of the living processes that have ``sign`` in them or in their environment, but for this one's."""
    found = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            try:
                text = (each / "cmdline").read_bytes()
                if (sign.encode() in text or sign.encode() in (each / "environ").read_bytes()) and text:
                    found[int(each.name)] = text.replace(b"\0", b" ").decode(errors="replace")[:200]
            except OSError:
                continue
    return found


def gone(left: Callable[[], Any]) -> bool:
    return eventually(lambda: not left())


def eventually(holds: Callable[[], Any]) -> bool:
    end = time.monotonic() + LIMIT
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(holds())


class Watched(remote.PaintJob):
    """Leaves a file NUMBER-PID for every unit that a worker begins, and takes a while for it."""

    def __call__(self, pipe: Pipeline) -> Callable[[Any], Any]:
        paint = super().__call__(pipe)

        def work(unit: Any) -> Any:
            number = unit[0][0].number
            Path(os.environ["SSD_TEST_WATCH"], f"{number}-{os.getpid()}").touch()
            time.sleep(0.5)
            text = unit[0][0].text
            if text == "fails":
                raise ValueError("prompts[0] must be drawable, got 'fails'")
            if text == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            return paint(unit)

        return work


@pytest.fixture
def watch(environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    """Makes workers `Watched`; the value returns (number, process) of the units that were begun."""
    from ray import cloudpickle

    place = tmp_path / "watch"
    place.mkdir()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests
    monkeypatch.setattr(ray_workers, "WORKERS", {**ray_workers.WORKERS, "SSD_TEST_WATCH": str(place)})
    monkeypatch.setattr(remote, "PaintJob", Watched)
    return lambda: [tuple(map(int, file.name.split("-"))) for file in place.iterdir()]  # type: ignore[misc]


@dataclass(frozen=True)
class NoModel(ray_workers.Source):
    """Of workers that need none."""

    def load(self) -> Any:
        return None


def play(pipe: None) -> Callable[[tuple[int, str]], int]:
    """A job whose units, a number and what happens, leave the files of `Watched`."""
    def work(unit: tuple[int, str]) -> int:
        number, what = unit
        place = Path(os.environ["SSD_TEST_WATCH"])
        begun = len(list(place.glob(f"{number}-*")))
        (place / f"{number}-{os.getpid()}").touch()
        if what == "dies" or what == "dies once" and not begun:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600 if what == "lasts" else 0)
        return 10 * number

    return work


def played(address: str, units: dict[int, str], **options: Any) -> Iterator[int]:
    """Results of units that only return, but for these."""
    return ray_workers.results(address, NoModel(None, "cpu", None, "auto"), play,
                               [(number, units.get(number, "")) for number in range(8)], **options)


def settings() -> str:
    """Of Ray Data in this process."""
    import ray.data

    handlers = logging.getLogger("ray.data").handlers
    return f"{ray.data.DataContext.get_current()} {[(handler.level, handler.filters) for handler in handlers]}"


def test_a_unit_that_ends_its_worker_once_is_done_once(address: str, watch: Begun) -> None:
    """Also if fewer workers fit than were asked for."""
    said: list[str] = []
    assert sorted(played(address, {3: "dies once"}, workers=5, say=said.append)) == list(range(0, 80, 10))
    assert sorted(number for number, _ in watch()) == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert said == ["a worker died at unit 4 of 8: doing it again"]


def test_a_unit_that_always_ends_its_worker_ends_the_run(address: str, monkeypatch: pytest.MonkeyPatch,
                                                         watch: Begun) -> None:
    monkeypatch.setattr(ray_workers, "RETRIES", 1)
    found, said = [], []  # type: ignore[var-annotated]
    with pytest.raises(RuntimeError, match="workers died 2 times at unit 4 of 8, the last one was worker "):
        found += played(address, {3: "dies"}, say=said.append)
    assert [number for number, _ in watch()].count(3) == 2
    assert len(said) <= 1 and set(said) <= {"a worker died at unit 4 of 8: doing it again"}


def test_results_that_nobody_takes_hold_the_workers_up(address: str, watch: Begun) -> None:
    for taken, _ in enumerate(played(address, {}, workers=2), 1):
        if taken < 4:
            time.sleep(2)
        assert len(watch()) <= taken + 2, "one for each worker beyond what was taken"


def test_who_stops_early_leaves_no_worker_and_no_setting(address: str, environment: None,
                                                         watch: Begun) -> None:
    """And a process that is connected to Ray already stays so."""
    import ray.data

    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        before = settings()
        found = played(address, dict.fromkeys(range(1, 8), "lasts"))
        assert next(found) == 0 and eventually(lambda: len(watch()) > 3)
        found.close()  # type: ignore[attr-defined]
        assert gone(lambda: [process for _, process in watch() if Path(f"/proc/{process}").exists()])
        assert ray.is_initialized() and settings() == before
    finally:
        ray.shutdown()


QUIET = """
import os, signal, sys
import ssd_janus.ray_workers as workers
assert "ray" not in sys.modules
from pathlib import Path

class NoModel(workers.Source):
    def load(self):
        return None

MARK = Path(sys.argv[2])

def play(pipe):
    def work(unit):
        if unit == 3 and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return unit
    return work

assert sorted(workers.results(sys.argv[1], NoModel(None, "cpu", None, "auto"), play, range(8))) == list(range(8))
"""


def test_nothing_is_printed(address: str, tmp_path: Path) -> None:
    """Nothing of the worker that died, either; but for a line of Ray's core, which passes Python by, on actors that
    restart, as all of Ray Data may (https://github.com/ray-project/ray/issues/53727)."""
    result = subprocess.run([sys.executable, "-c", QUIET, address, tmp_path / "mark"], capture_output=True, text=True,
                            timeout=LIMIT)
    assert (tmp_path / "mark").exists()
    lines = [line for line in result.stderr.splitlines() if "has constructor arguments in the object store" not in line]
    assert (result.returncode, result.stdout, lines) == (0, "", [])


def test_the_files_are_those_of_one_process(address: str, folder: Path, tmp_path: Path,
                                            alone: Callable[[str], Path]) -> None:
    result = generate(folder, tmp_path / "out", "plain", "--on", f"ray://{address}", "--json")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == contents(alone("plain"))
    assert len(result.stdout.splitlines()) == 16 and all(line.startswith("{") for line in result.stdout.splitlines())
    assert "16 pictures drawn in" in result.stderr and "drawing: 288/288 steps" in result.stderr


@pytest.mark.parametrize("layout", [GenEval, Parquet])
def test_a_killed_worker_loses_and_doubles_nothing(address: str, folder: Path, tmp_path: Path, layout: Any,
                                                   watch: Begun,
                                                   alone: Callable[[str], Path]) -> None:
    """And who takes nothing for a while is not flooded."""
    pipe, said, taken = Pipeline.from_pretrained(folder), [], 0  # type: ignore[var-annotated]
    out, drawn = tmp_path / "out", []
    painters = remote.OnRay(address, ray_workers.Source(str(folder), "cpu", None, "auto"), workers=2, say=said.append)
    for each in drawing.draw(pipe, layout(out, 2), out, gather(PROMPTS, None), 2, None, 5, pipe.shape.full_plan(), 2,
                             painters=painters):
        drawn.append((each.prompt, each.image, each.seed))
        done = {PROMPTS.index(prompt) for prompt, _, _ in drawn}
        if each.image == 0 and (taken := taken + 1) == 1:
            os.kill(next(process for number, process in watch() if number not in done), signal.SIGKILL)
        elif each.image == 0 and taken == 3:
            time.sleep(4)
            assert len(watch()) <= 3 + 2 + 1, "three are taken, two wait at most, one was begun twice"
    assert sorted(drawn) == sorted((prompt, image, 5 + 2 * number + image) for number, prompt in enumerate(PROMPTS)
                                   for image in range(2))
    assert contents(out) == contents(alone(layout.__name__.lower()))
    assert len(said) == 1 and "a worker died at unit" in said[0]
    numbers = [number for number, _ in watch()]
    assert sorted(set(numbers)) == list(range(8)) and len(numbers) == 9, "one unit twice, by two workers"


@pytest.mark.parametrize("text, message", [
    ("fails", "error: prompts[0] must be drawable, got 'fails'\n"),
    ("dies", "error: workers died 2 times at unit 1 of 1, the last one was worker "),
])
def test_what_goes_wrong_in_a_worker_is_told_plainly(address: str, folder: Path, tmp_path: Path, text: str,
                                                     message: str, watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "RETRIES", 1)
    result = generate(folder, tmp_path / "out", "parquet", "--on", f"ray://{address}", prompts=(text,))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stderr.splitlines()[-1].startswith(message.strip())


def test_the_killed_one_who_asks_goes_on(address: str, folder: Path, tmp_path: Path,
                                         alone: Callable[[str], Path]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ssd_janus.cli", *arguments(folder, out, "parquet"), "--on", f"ray://{address}",
               "--workers", "2"]
    asks = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: list(out.glob("*.parquet")) or asks.poll() is not None)
    finally:
        asks.kill()
        asks.wait()
    left = contents(out)
    assert left.items() <= contents(alone("parquet")).items()
    result = generate(folder, out, "parquet", "--on", f"ray://{address}", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert f"{16 - 2 * len(left)} pictures drawn" in result.stderr
    assert contents(out) == contents(alone("parquet"))


def test_parquet_reads_back(folder: Path, alone: Callable[[str], Path]) -> None:
    import io

    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(alone("parquet")).to_table().to_pylist()
    pipe = Pipeline.from_pretrained(folder)
    assert [(row["number"], row["image"], row["seed"]) for row in rows] == [
        (number, image, 5 + 2 * number + image) for number in range(8) for image in range(2)]
    for row in rows[:4]:
        tokens = pipe.generate_tokens(PROMPTS[row["number"]], seed=row["seed"])
        assert row["tokens"] == tokens[0].tolist() and row["prompt"] == PROMPTS[row["number"]]
        png = alone("geneval") / f"{row['number']:05d}/samples/{row['image']:05d}.png"
        assert row["png"] == png.read_bytes(), "the same file"
        assert Image.open(io.BytesIO(row["png"])).size == (24, 24)


def test_a_cluster_of_its_own(environment: None, folder: Path, tmp_path: Path, alone: Callable[[str], Path]) -> None:
    """Started by the command: heard by this machine only, and gone with the command, which is told to stop first."""
    out, sign = tmp_path / "out", secrets.token_hex(8)
    command = [sys.executable, "-m", "ssd_janus.cli", *arguments(folder, out, "geneval"), "--on", "ray"]
    variables = os.environ | {"SSD_TEST_SIGN": sign}
    asks = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        assert eventually(lambda: list(out.rglob("metadata.jsonl")) or asks.poll() is not None)
        there = processes(sign)
        assert any("raylet" in line for line in there.values())
        heard = {line for process in there for line in listening(process)}
        assert heard and all(address.is_loopback for address in heard), heard
        asks.send_signal(signal.SIGINT)
        said = asks.communicate(timeout=LIMIT)[1]
    finally:
        asks.kill()
        asks.wait()
    if asks.returncode:  # it may have been done by then
        assert asks.returncode == 128 + signal.SIGINT and said.endswith("stopped\n") and "Traceback" not in said
    assert gone(lambda: processes(sign)), processes(sign)
    assert contents(out).items() <= contents(alone("geneval")).items()


def listening(process: int) -> set[IPv4Address | IPv6Address]:
    """Addresses on which a process waits for connections."""
    sockets = set()
    for handle in Path(f"/proc/{process}/fd").glob("*"):
        try:
            sockets.add(os.readlink(handle))
        except OSError:
            continue
    found: set[IPv4Address | IPv6Address] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].split(":")[0])
                packed = b"".join(words[first:first + 4][::-1] for first in range(0, len(words), 4))
                address = ip_address(packed)
                found.add(getattr(address, "ipv4_mapped", None) or address)
    return found


def test_an_address_where_nobody_is(folder: Path, tmp_path: Path) -> None:
    result = generate(folder, tmp_path / "out", "parquet", "--on", "ray://127.0.0.1:1")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1] == (
        "error: --on ray://127.0.0.1:1: nobody answers there (Connection refused)")
    assert not list(tmp_path.rglob("*.parquet"))
