"""The scripts of the cluster page run on a Slurm of their own: two nodes with names of their own on this machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import cli

PAGE = Path(__file__).parents[2] / "docs/howto/cluster.md"
NODES = ("n1", "n2")
SMALLER = {
    "32768": "64",
    "8192": "16",
    "--num_proc 64": "--num_proc 2",
    "--array=0-63": "--array=0-3",
    "_ID/64": "_ID/4 --shard_tokens 512",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "save_steps 50": "save_steps 5 --trainer.max_steps 60",
    "--out evaluation": "--out evaluation --probes none",
}
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=2
GresTypes=gpu
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""
"""Processors and GPUs that are not there, so that the scripts get what they ask for."""


def is_able():
    """Whether Slurm is here, and processes may be given another host's name."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "unshare"))):
        return False
    return subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_able(), reason="Slurm, munge, and a user who may name a host are needed"),
]


def wait_until(ready, seconds=120):
    for _ in range(10 * seconds):
        if found := ready():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"not ready after {seconds} s")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm with two nodes, and a folder with a model, texts, and the scripts of the page in small."""
    place = tmp_path_factory.mktemp("slurm")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [one.getsockname()[1] for one in sockets]
    filled = SETTINGS.format(host=os.uname().nodename, place=place, ports=ports, nodes=NODES)
    (place / "slurm.conf").write_text(filled)
    (place / "state").mkdir()
    (place / "gres.conf").write_text(f"Name=gpu File={place}/gpu[0-7]\n")
    for number in range(8):
        (place / f"gpu{number}").touch()
    (place / "hosts").write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n")
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o400)
    files = [f"--{name}={place}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    commands = [["munged", "--force", "--foreground", f"--key-file={place}/key", *files], ["slurmctld", "-D"]]
    for name in NODES:
        as_host = f"hostname {name} && mount --bind {place}/hosts /etc/hosts && exec slurmd -D"
        commands.append(["unshare", "--uts", "--mount", "sh", "-c", as_host])
    with pytest.MonkeyPatch.context() as patch, (place / "log").open("wb") as log:
        patch.setenv("SLURM_CONF", f"{place}/slurm.conf")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.chdir(place)
        daemons = [subprocess.Popen(commands[0], stdout=log, stderr=log)]
        try:
            wait_until((place / "munge.socket").exists)
            daemons += [subprocess.Popen(command, stdout=log, stderr=log) for command in commands[1:]]
            wait_until(lambda: answer("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"])
            yield place
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait()


def answer(*command):
    """What a client prints; nothing, if it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def scripts():
    """The scripts of the page, in small and without FSDP, which accelerate has on GPUs only."""
    found = [text for text in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) if "#SBATCH" in text]
    for number, text in enumerate(found):
        text = re.sub(r" *--trainer\.fsdp .*\\\n", "", text)
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        found[number] = text
    return found


def submit(script):
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def states(job):
    """The state of a job, or of each job of an array."""
    return re.findall(r"JobState=(\w+)", answer("scontrol", "show", "job", "-o", job))


def finish(job):
    wait_until(lambda: all(state not in ("PENDING", "RUNNING", "COMPLETING") for state in states(job)), seconds=300)
    printed = "".join(path.read_text() for path in sorted(Path().glob(f"slurm-{job}*.out")))
    assert {*states(job)} == {"COMPLETED"}, printed
    return printed


def requeue(job):
    """As preemption does, but without the two minutes that a job then waits."""
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_until(lambda: "PENDING" in states(job))
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def test_the_scripts_of_the_cluster_page_make_a_model_of_texts_and_survive_preemption(cluster, unchecked):
    model = models.tiny(dtype=torch.float32, vocab_size=300, bos_token_id=0, eos_token_id=1)
    model.save_pretrained("MODEL")
    trained_tokenizer(framed=True).save_pretrained("MODEL")
    for name in ("books", "held-out"):
        Path(name).mkdir()
        Path(name, "a.txt").write_text(EXCERPT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    prepare, score, train, evaluate = scripts()
    finish(submit(prepare))
    assert cli.main(["prepare", "held-out", "--tokenizer", "MODEL", "--length", "64", "--out", "validation"]) == 0

    job = submit(score)
    wait_until(lambda: "RUNNING" in states(f"{job}_1"))
    requeue(f"{job}_1")
    finish(job)
    alone = ["score", "data", "--model", "MODEL", "--size", "16", "--shard_tokens", "512", "--out", "alone"]
    assert cli.main(alone) == 0
    shards = [*Path("alone").glob("*.arrow")]
    assert len(shards) == 9
    for shard in shards:
        assert Path("scored", shard.name).read_bytes() == shard.read_bytes()

    Path("run").mkdir()  # of a job that ended before its first checkpoint
    job = submit(train)
    wait_until(lambda: [*Path("run").glob("checkpoint-*/whole.json")])
    after = submit(evaluate)
    requeue(job)
    finish(job)
    assert len([*Path().glob("run-without-checkpoint-*")]) == 1
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [*range(1, 61)]
    record = json.loads(Path("run/run.json").read_text())
    assert record["arguments"]["world_size"] == len(NODES)
    assert [re.sub(r"\d+", "N", part["checkpoint"]) for part in record["resumed"]] == ["run/checkpoint-N"]
    finish(after)
    assert Path("evaluation/eval.json").is_file()
