"""Every launcher started as its head comment says, in front of what stands in for a cluster.

The stand-ins do locally what the real ones do on other machines, so what starts is what would start
there: two processes that find each other and train.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deepspec.training.checkpoint import list_checkpoints, read_checkpoint
from tests.jobs import HAVE_DEEPSPEED, LAST, STEPS, assert_same_weights, wait_for_step

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("torchrun.sh", "slurm.sbatch", "kubernetes.sh", "deepspeed.sh")
# zero2 is what the scripts choose
CHOICE = () if HAVE_DEEPSPEED else ("engine=zero0",)
needs_deepspeed = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="DeepSpeed is not installed")
pytestmark = pytest.mark.usefixtures("nothing_left")

# a task a node, each with its number; the highest exit code; SIGTERM goes to the tasks, as Slurm
# sends it to a step
SRUN = """\
#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
done
worst=0
for task in $(jobs -p); do
    wait "$task" || { code=$?; [ "$code" -gt "$worst" ] && worst=$code; }
done
exit "$worst"
"""
SCONTROL = """\
#!/usr/bin/env bash
if [ "$*" = "show hostnames here[1-2]" ]; then
    printf '%s\\n' 127.0.0.1 127.0.0.2
else
    echo "scontrol $*"
fi
"""
# a shell a machine, as ssh starts one; %n is the machine's number
PDSH = """\
#!/usr/bin/env bash
while [ "$1" != -w ]; do shift; done
[ "$2" = first,second ] || exit 9
shift 2
bash -c "${*//%n/0}" &
bash -c "${*//%n/1}" &
wait -n && wait -n
"""
SSH = """\
#!/usr/bin/env bash
echo 127.0.0.1
"""


def environment(folder: Path, programs: dict[str, str], **variables: str) -> dict[str, str]:
    """This one, with `programs` ahead of what is installed."""
    places = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    for name, text in programs.items():
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
    return {**os.environ, "PATH": os.pathsep.join(places), "PYTHON": sys.executable, **variables}


def launch(script: str, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def assert_trained(out: Path, steps: int) -> None:
    assert read_checkpoint(list_checkpoints(out / "checkpoints")[-1]).step == steps


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    path = ROOT / "launch" / script
    checked = subprocess.run([program, path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert os.access(path, os.X_OK)
    assert path.read_text().count("# SITE: ") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_recipe_it_says_how_to_start_it(script: str, tmp_path: Path) -> None:
    if script == "slurm.sbatch":
        return  # it has torchrun.sh say so
    done = launch(script, env=environment(tmp_path, {}, IMAGE="image"))
    assert done.returncode != 0
    assert f"usage: launch/{script} RECIPE key=value" in done.stderr


def test_torchrun(recipe: Path, tmp_path: Path) -> None:
    """What it starts; tests/faults/test_storm.py trains by it."""
    out = tmp_path / "run"
    words = [str(recipe), *CHOICE, f"out={out}", "training.max_steps=2"]
    dry = launch("torchrun.sh", *words, env=environment(tmp_path, {}, DRY_RUN="1"))
    assert not out.exists()
    assert f"--nproc-per-node gpu -m deepspec train recipe={recipe} engine=zero2" in dry.stdout


def slurm(folder: Path, recipe: Path, out: Path, nodes: int = 2) -> subprocess.Popen[str]:
    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "here[1-2]",
        "PROCESSES": "1",
    }
    env = environment(folder, {"srun": SRUN, "scontrol": SCONTROL}, **variables)
    # sbatch copies the script to another place and starts it in the folder it was called from
    copy = folder / "slurm_script"
    copy.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    command = ["bash", str(copy), str(recipe), *CHOICE, f"out={out}"]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


@pytest.mark.slow  # a minute of starting processes
def test_slurm_stops_queues_again_and_goes_on(recipe: Path, quiet: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped = slurm(tmp_path, recipe, out)
    wait_for_step(out, 3, stopped)
    tasks = [
        process
        for process in psutil.Process(stopped.pid).children(recursive=True)
        if process.cmdline()[:2] == ["bash", "-c"]
    ]
    assert len(tasks) == 2
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=150)[0]
    assert stopped.returncode == 143, output
    assert output.count("is saved and the same command goes on") == 1
    assert output.rstrip().endswith("scontrol requeue 4711")
    saved = list_checkpoints(out / "checkpoints")[-1]
    assert 3 <= read_checkpoint(saved).step < STEPS

    again = slurm(tmp_path, recipe, out)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert f"going on from {saved}" in output
    assert "scontrol requeue" not in output
    assert_same_weights(out / LAST, quiet)


def test_slurm_does_not_queue_a_mistake_again(recipe: Path, tmp_path: Path) -> None:
    failed = slurm(tmp_path, recipe.with_name("nothing.yaml"), tmp_path / "run", nodes=1)
    output = failed.communicate(timeout=90)[0]
    assert failed.returncode == 1
    assert "nothing.yaml" in output
    assert "scontrol requeue" not in output


@pytest.mark.slow  # a minute of starting processes
@needs_deepspeed
def test_deepspeed(recipe: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    words = [str(recipe), f"out={tmp_path / 'run'}", "training.max_steps=2"]
    programs = {"pdsh": PDSH, "ssh": SSH}
    env = environment(tmp_path, programs, HOSTFILE=str(hostfile), MASTER_PORT=free_port())
    missing = launch("deepspeed.sh", *words, env=env)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert f"HOSTFILE={hostfile} cannot be read" in missing.stderr

    hostfile.write_text("first slots=1\nsecond slots=1\n")
    done = launch("deepspeed.sh", *words, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checkpoint: ") == 1
    assert_trained(tmp_path / "run", 2)


def rendered(folder: Path, *words: str, **variables: str) -> list[dict[str, Any]]:
    done = launch("kubernetes.sh", *words, env=environment(folder, {}, **variables))
    assert done.returncode == 0, done.stderr
    assert "@" not in done.stdout.replace("between @", "")
    return list(yaml.safe_load_all(done.stdout))


def test_kubernetes_parts_fit_each_other(tmp_path: Path) -> None:
    odd = 'data.fields.user="a b\\c"'
    variables = {"IMAGE": "registry/deepspec:1", "NODES": "3", "GPUS": "4"}
    claim, service, job = rendered(tmp_path, "recipes/tiny_dflash.yaml", odd, **variables)
    assert [claim["kind"], service["kind"], job["kind"]] == [
        "PersistentVolumeClaim", "Service", "Job"
    ]  # fmt: skip
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry/deepspec:1"

    # they find each other: <job>-<index>.<subdomain> is a name that a headless service gives
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 3
    name = job["metadata"]["name"]
    assert name == "deepspec-tiny-dflash"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    words = [*container["command"], *container["args"]]
    options = dict(zip(words[3::2], words[4::2], strict=False))
    assert options["--master-addr"] == f"{name}-0.{pod['subdomain']}"
    assert int(options["--master-port"]) == container["ports"][0]["containerPort"]
    assert int(options["--nnodes"]) == 3
    assert int(options["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert options["--node-rank"] == "$(NODE_RANK)"
    rank = env["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"

    # what is written outlives the pod
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shm"] == "/dev/shm"
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    settings = words[words.index("train") + 1 :]
    assert settings[:2] == ["recipe=recipes/tiny_dflash.yaml", "engine=zero2"]
    assert f"out={mounts['runs']}/tiny-dflash" in settings
    assert settings[-1] == odd

    # a pod that is lost, and one that is told to go
    assert pod["restartPolicy"] == "Never"  # else podFailurePolicy is refused
    assert spec["backoffLimit"] == 30
    seconds = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"])
    assert seconds < pod["terminationGracePeriodSeconds"]


@pytest.mark.slow  # a minute of starting processes
def test_the_command_of_a_pod_trains(recipe: Path, tmp_path: Path) -> None:
    """Pod 0 of one, with the name that the cluster would resolve put in by hand."""
    out = tmp_path / "run"
    words = [str(recipe), *CHOICE, f"out={out}", "training.max_steps=2"]
    *_, job = rendered(tmp_path, *words, IMAGE="image", NODES="1", GPUS="2")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    values = {"$(NODE_RANK)": "0", "29500": free_port()}
    values["deepspec-short-0.deepspec-short"] = "127.0.0.1"
    command = [values.get(word, word) for word in (*container["command"], *container["args"])]
    done = subprocess.run(
        command, env=environment(tmp_path, {}), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, shlex.join(command) + done.stderr
    assert_trained(out, 2)
