"""`pipeline doctor`: the machine, with what hinders played for real where it can be."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.cli import main
from pipeline.errors import ProofError, RoomError
from stages.doctor import devices, machine
from stages.doctor import disk_hub_engines as places
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding, findings_table, within
from stages.doctor.run import check_well, examine_machine, machine_table

ROOT = Path(__file__).parents[2]
SECRET = "hf_canaryCANARYcanary"
CHECKS = {"Python", "packages", "torch", "float32 on CPU", "kernels", "processors", "memory", "ulimits", "disk"}
CHECKS |= {"/dev/shm", "hub", "engines"}


@pytest.fixture
def small_disk_probe(monkeypatch):
    monkeypatch.setattr(places, "DISK_BYTES", 8 << 20)


def printed(capfd, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code or 0, capfd.readouterr().out


def test_the_machine_is_told_as_json_and_as_one_screen(small_disk_probe, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    report = examine_machine(tmp_path / "not there yet")
    found = {each["check"]: each for each in report["findings"]}
    assert set(found) >= CHECKS and any(name.startswith("GPU") for name in found)
    assert found["disk"]["facts"]["written_bytes_s"] > 0 and found["disk"]["facts"]["read_bytes_s"] > 0
    assert found["disk"]["facts"]["folder"] == str(tmp_path), "the nearest folder that is there"
    assert found["packages"]["facts"]["versions"]["torch"]
    hinders = any(each["state"] == PROBLEM for each in report["findings"])
    assert (report["state"] == "problem") == hinders, "what a machine lacks differs"
    assert json.loads(json.dumps(report)) == report and SECRET not in json.dumps(report)
    assert not list(tmp_path.iterdir()), "nothing is left"

    from pipeline.visible_tables import VisibleConsole

    VisibleConsole().print(machine_table(report))
    screen = capfd.readouterr().out
    assert all(name in screen for name in CHECKS) and ("nothing hinders" in screen) == (not hinders)
    assert len(screen.splitlines()) <= 40 and max(map(len, screen.splitlines())) <= 110


def test_what_hinders_ends_with_1_and_names_the_remedy(small_disk_probe, tmp_path, capfd):
    code, out = printed(capfd, "doctor", "--cache", tmp_path / "c", "--python", tmp_path / "no-python", "--json")
    engines = next(each for each in json.loads(out)["findings"] if each["check"] == "engines")
    assert code == 1
    assert engines["state"] == PROBLEM and "make engines" in engines["remedy"]


def test_a_report_without_a_problem_raises_nothing():
    check_well({"findings": [Finding("x", NOTE, "y").as_dict()]})
    with pytest.raises(ProofError, match="1 of 1 checks failed, the first x; mend it"):
        check_well({"findings": [Finding("x", PROBLEM, "y", remedy="mend it").as_dict()]})


def test_a_check_that_hangs_or_fails_is_a_finding():
    began = time.perf_counter()
    (hung,) = within(0.2, "driver", lambda: time.sleep(20), "the GPU is not used")
    assert time.perf_counter() - began < 2
    assert (hung.state, hung.used) == (PROBLEM, "the GPU is not used") and "0.2 s" in hung.found

    def full():
        raise RoomError("the disk is full; make room")

    (typed,) = within(2, "disk", full)
    assert (typed.state, typed.found, typed.remedy) == (PROBLEM, "the disk is full", "make room")
    (failed,) = within(2, "x", lambda: 1 / 0)
    assert failed.state == PROBLEM and "ZeroDivisionError" in failed.found


def test_what_a_finding_says_steers_no_terminal(capfd):
    from pipeline.visible_tables import VisibleConsole

    VisibleConsole().print(findings_table([Finding("disk", PROBLEM, "/tmp/\x1b[31m[red]x", remedy="m\nv")]))
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\\x1b[31m[red]x" in out and "m\\nv" in out


def test_a_package_out_of_its_bounds_is_named_with_what_installs_it(monkeypatch):
    stated = ["torch>=2.9", "numpy>=99", "nosuchpackage>=1", "openai>=999; extra == 'endpoint'"]
    monkeypatch.setattr(machine.metadata, "requires", lambda name: stated)
    line, extras = machine.packages()
    assert line.state == PROBLEM
    assert "numpy" in line.found and "wanted >=99" in line.found and "nosuchpackage is missing" in line.found
    assert "torch" not in line.found and "'numpy>=99' 'nosuchpackage>=1'" in line.remedy
    assert extras.state == NOTE and "regenerate --endpoint" in extras.found


def test_few_open_files_or_little_address_space_hinder():
    code = "import json; from stages.doctor.machine import limits; print(json.dumps(limits().as_dict()))"

    def under(limit: int, value: int) -> dict:
        def set_limit():
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))

        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, preexec_fn=set_limit
        )
        return json.loads(done.stdout)

    files = under(resource.RLIMIT_NOFILE, 256)
    assert files["state"] == PROBLEM and "256 open files" in files["found"] and "ulimit -n" in files["remedy"]
    space = under(resource.RLIMIT_AS, 8 << 30)
    assert space["state"] == PROBLEM and "8.0 GiB" in space["found"] and "ulimit -v" in space["remedy"]


def cgroup(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_the_limits_of_a_cgroup_count(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    cgroup(
        tmp_path, memory_max=f"{1 << 30}\n", memory_current=f"{900 << 20}\n", memory_stat=f"active_file {500 << 20}\n"
    )
    cgroup(tmp_path, cpu_max="150000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    of_memory, of_processors = machine.memory(), machine.processors()
    assert of_memory.facts["cgroup_bytes"] == 1 << 30 and of_memory.state == PROBLEM
    assert of_memory.facts["usable_bytes"] <= 624 << 20, "what the page cache holds can be had"
    assert of_processors.facts["granted"] == 1.5
    assert of_processors.state == NOTE and of_processors.remedy == "OMP_NUM_THREADS=1"


def test_a_disk_without_room_and_a_slow_one(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "free_bytes", lambda place: 100 << 20)
    assert places.disk(tmp_path).state == PROBLEM
    monkeypatch.setattr(places, "free_bytes", lambda place: 100 << 30)
    monkeypatch.setattr(places, "disk_speed", lambda *given, **named: (20e6, 900e6))
    slow = places.disk(tmp_path)
    assert slow.state == NOTE and "20 MB/s" in slow.found


def nvidia_smi(folder: Path, script: str) -> str:
    """Write an nvidia-smi of our own; return a PATH that finds it first."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPU here")
def test_a_gpu_that_torch_cannot_use_hinders(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, "echo 570.124.06"))
    (found,) = devices.gpus()
    assert found.state == PROBLEM and "driver 570.124.06 is there" in found.found
    assert "everything runs on the CPU" in found.used and "install torch" in found.remedy


def test_a_driver_that_does_not_answer_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, "exec sleep 20"))
    monkeypatch.setattr(devices, "SMI_S", 0.2)
    (found,) = within(5, "GPU", devices.gpus, "everything would run on the CPU")
    assert found.state == PROBLEM and "the driver does not answer" in found.found


def test_a_gpu_is_told_with_its_memory_and_what_it_cannot_do(monkeypatch):
    """What torch says of a GPU, put in its place: there need not be one."""
    card = SimpleNamespace(name="A Card", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (15 << 30, 16 << 30))
    old = devices._gpu(0, "570.1")
    assert old.state == NOTE and "bfloat16 is emulated" in old.used and "15.0 GiB free of 16.0 GiB" in old.found
    card.major = 9
    assert devices._gpu(0, "570.1").state == OK
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1 << 30, 16 << 30))
    assert "others hold most of its memory" in devices._gpu(0, "570.1").used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_found_and_used():
    found, *_ = devices.gpus()
    assert found.facts["total_bytes"] > 1 << 30 and found.facts["driver"]
    assert devices.kernels()[0].facts["kernels"] in ("compiled", "plain")


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *given):
        pass


def test_the_hub_is_asked_and_no_secret_is_shown(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text(SECRET)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/{SECRET}")
    found = places.hub()
    server.shutdown()
    server.server_close()
    assert found.state == OK and found.facts["token"] and found.facts["host"] == "127.0.0.1"
    assert SECRET not in json.dumps(found.as_dict())
    closed = places.hub()
    assert closed.state == NOTE and "does not answer" in closed.found and SECRET not in json.dumps(closed.as_dict())


def test_a_hub_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(places, "HUB_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.perf_counter()
        assert places.hub().state == NOTE
        assert time.perf_counter() - began < 3


def test_offline_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = places.hub()
    assert found.state == NOTE and "HF_HUB_OFFLINE" in found.found and found.facts["reachable"] is None


def test_an_interrupted_check_of_the_disk_leaves_nothing(tmp_path):
    code = (
        "import sys; from stages.doctor import disk_hub_engines, run\n"
        "import os, time; os.fsync = lambda fd: (print('writing', flush=True), time.sleep(9))\n"
        "from pathlib import Path; from stages.doctor.finding import within\n"
        "within(20, 'disk', lambda: disk_hub_engines.disk(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(10) != 0
    assert not list(tmp_path.iterdir())
