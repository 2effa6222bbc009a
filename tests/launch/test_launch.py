"""The launch files, run against stand-ins for the programs they call.

What a slice, a cluster or a queue really does is not shown here; what the files do about it is.
"""

import os
import pathlib
import shutil
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

# Each host is a home directory; what is to be run there is run there, by bash.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$FAKE/gcloud.calls"
shift 2 # compute tpus
state=$FAKE/state
case "$1 $2" in
  "queued-resources describe") cat "$state" 2>/dev/null || exit 1 ;;
  "queued-resources create") echo ACTIVE >"$state" ;;
  "queued-resources delete") rm -f "$state"; rm -rf "$FAKE"/hosts/*/* ;;
  "tpu-vm scp")
    for host in "$FAKE"/hosts/*; do cp "$3" "$host/${4#*:}"; done ;;
  "tpu-vm ssh")
    [[ $(cat "$state" 2>/dev/null) == ACTIVE ]] || exit 255
    for argument; do
      case $argument in
        --worker=*) worker=${argument#*=} ;;
        --command=*) command=${argument#*=} ;;
        --output-directory=*) logs=${argument#*=} ;;
      esac
    done
    for host in "$FAKE"/hosts/*; do
      [[ $worker == all || $worker == "${host##*/}" ]] || continue
      cd "$host" && HOME=$host bash -c "$command" >"$host/.said"
      cat "$host/.said"
      [[ ${logs:-} ]] && cp "$host/.said" "$OLDPWD/$logs/${host##*/}.log"
      cd "$OLDPWD"
    done ;;
esac
exit 0
"""

# `hybrid_flax.main`: its next life is the first line of $FAKE/lives, STATUS [STEP [SLICE STATE]].
PYTHON = r"""#!/usr/bin/env bash
[[ "$*" == "-m pip "* ]] && exit
printf '%s\n' "$@" >"$HOME/arguments"
lives_before=$FAKE/lives.before.${HOME##*/}
count=$(($(cat "$lives_before" 2>/dev/null || echo 0) + 1))
echo $count >"$lives_before"
read -r status step state < <(sed -n "${count}p" "$FAKE/lives")
[[ $step && $step != - ]] && mkdir -p "$FAKE/run/checkpoints/$step"
[[ $status == 2 ]] && echo "error: batch_size=100 cannot be split"
if [[ $state ]]; then echo "$state" >"$FAKE/state"; sleep 3; fi
exit "$status"
"""

# On a bare host uv makes the environment; pip finds everything installed.
UV = r"""#!/usr/bin/env bash
[[ "$*" == "-m uv venv"* ]] || exit 9
mkdir -p .venv/bin && cp "$FAKE/bin/train-python" .venv/bin/python
"""

SRUN = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$FAKE/srun.arguments"
count=$(wc -l <"$FAKE/srun.calls" 2>/dev/null || echo 0)
echo call >>"$FAKE/srun.calls"
read -r status step < <(sed -n "$((count + 1))p" "$FAKE/lives")
[[ $step ]] && mkdir -p "$FAKE/run/checkpoints/$step"
exit "$status"
"""

RECORD = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >>"$FAKE/${0##*/}.arguments"
"""


@pytest.fixture
def fake(tmp_path):
    """A folder with stand-ins in `bin/`, `lives`, and two hosts."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "gcloud": GCLOUD,
        "train-python": PYTHON,
        "python3": UV,
        "pip": RECORD,
        "sudo": RECORD,
        "srun": SRUN,
        "scontrol": RECORD,
        "xpk": RECORD,
    }.items():
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    for host in "01":
        (tmp_path / "hosts" / host).mkdir(parents=True)
    return tmp_path


def run(fake, script, *arguments, lives=(), **settings):
    """(exit status, what it printed)"""
    (fake / "lives").write_text("".join(f"{life}\n" for life in lives))
    environment = {
        "PATH": f"{fake / 'bin'}:{os.environ['PATH']}",
        "FAKE": str(fake),
        "HOME": str(fake),
        "POLL": "0.2",
        **settings,
    }
    command = ["bash", str(script), *arguments]
    done = subprocess.run(
        command, env=environment, cwd=fake / "repo", capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def repo(fake):
    """A checkout with nothing in it but the launch files."""
    shutil.copytree(LAUNCH, fake / "repo" / "launch")
    (fake / "repo" / "requirements.txt").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", fake / "repo"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return fake / "repo"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    assert os.access(script, os.X_OK)


# ------------------------------------------------------------------------------------- TPU VMs


def tpu_vm(fake, repo, *lives, workdir="run", **settings):
    settings = {"NAME": "slice", "ZONE": "zone", "TYPE": "v5litepod-8", **settings}
    arguments = f"--workdir={fake}/{workdir}", "--config=configs/a b.py:x,'y'"
    status, said = run(fake, repo / "launch/tpu_vm.sh", *arguments, lives=lives, **settings)
    calls = (fake / "gcloud.calls").read_text()
    return status, said, calls.count("queued-resources create"), said.count("starting, newest")


def test_a_slice_is_made_trained_on_and_deleted(fake, repo):
    status, said, created, started = tpu_vm(fake, repo, "0 10")
    assert (status, created, started) == (0, 1, 1), said
    assert "newest checkpoint: none" in said
    calls = (fake / "gcloud.calls").read_text()
    assert (
        "queued-resources create slice --zone=zone --node-id=slice --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot" in calls
    )
    last = calls.splitlines()[-1]
    assert last == "compute tpus queued-resources delete slice --zone=zone --quiet --force"
    assert not (fake / "state").exists()


def test_all_hosts_get_the_arguments_as_they_are(fake, repo):
    status, said, *_ = tpu_vm(fake, repo, "0 10", KEEP="1")
    assert status == 0, said
    assert "the slice is still there, and paid for" in said
    for host in "01":
        assert (fake / "hosts" / host / "arguments").read_text().splitlines() == [
            "-m",
            "hybrid_flax.main",
            f"--workdir={fake}/run",
            "--config=configs/a b.py:x,'y'",
        ]


@pytest.mark.parametrize("again", [143, 124, 137, 1])
def test_what_means_start_again_starts_again_on_the_same_slice(fake, repo, again):
    status, said, created, started = tpu_vm(fake, repo, f"{again} 5", "0 10")
    assert (status, created, started) == (0, 1, 2), said
    assert f"exit statuses: {again} {again}" in said
    assert "newest checkpoint: 5" in said


def test_a_name_is_a_name_and_no_command(fake, repo):
    workdir = "it's; touch done #"
    (fake / workdir).symlink_to(fake / "run")
    status, said, *_ = tpu_vm(
        fake, repo, "143 5", "0 10", workdir=workdir, NFS="host:/a'; touch done #"
    )
    assert status == 0, said
    assert "newest checkpoint: 5" in said
    assert not list(fake.rglob("done"))
    assert "host:/a'; touch done #\n" in (fake / "sudo.arguments").read_text()


def test_a_preempted_slice_is_asked_for_again(fake, repo):
    status, said, created, started = tpu_vm(fake, repo, "0 5 SUSPENDED", "0 10")
    assert (status, created, started) == (0, 2, 2), said
    assert "slice slice: SUSPENDED" in said
    assert "newest checkpoint: 5" in said


def test_unusable_input_ends_it_with_the_message_and_the_slice_kept(fake, repo):
    status, said, created, started = tpu_vm(fake, repo, "2", "0")
    assert (status, created, started) == (2, 1, 1), said
    assert "error: batch_size=100 cannot be split" in said
    assert (fake / "state").read_text() == "ACTIVE\n"


def test_it_gives_up_when_starting_again_leads_nowhere(fake, repo):
    status, said, created, started = tpu_vm(fake, repo, "1 5", *["1"] * 9, MAX_ATTEMPTS="3")
    assert (status, created, started) == (1, 1, 4), said  # one made progress, three did not
    assert "error: no new checkpoint in 3 starts; see logs/slice" in said


def test_a_slice_that_cannot_be_had_is_reported(fake, repo):
    (fake / "state").write_text("FAILED\n")
    status, said, created, started = tpu_vm(fake, repo)
    assert (status, created, started) == (1, 0, 0)
    assert "error: no slice; nothing was started" in said


# --------------------------------------------------------------------------------------- SLURM


def slurm(fake, repo, *lives, **settings):
    settings = {
        "SLURM_SUBMIT_DIR": str(repo),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        **settings,
    }
    return run(fake, repo / "launch/slurm.sh", f"--workdir={fake}/run", lives=lives, **settings)


@pytest.mark.parametrize("again", [143, 124, 137, 1])
def test_a_job_goes_back_into_the_queue(fake, repo, again):
    lives = [f"{again} 5", "0 10"]
    status, said = slurm(fake, repo, *lives)
    assert status == again
    assert f"status {again}: back into the queue" in said
    assert (fake / "scontrol.arguments").read_text() == "requeue\n7\n"
    status, said = slurm(fake, repo, *lives)  # what SLURM does then
    assert status == 0
    assert "newest checkpoint: 5" in said
    assert "finished" in said
    assert (fake / "scontrol.arguments").read_text() == "requeue\n7\n"
    assert (fake / "srun.arguments").read_text().splitlines()[-4:] == [
        ".venv/bin/python",
        "-m",
        "hybrid_flax.main",
        f"--workdir={fake}/run",
    ]


def test_a_job_with_unusable_input_does_not_go_back(fake, repo):
    status, said = slurm(fake, repo, "2")
    assert status == 2
    assert "stopped: mend what the error above names" in said
    assert not (fake / "scontrol.arguments").exists()


def test_a_job_without_progress_gives_up(fake, repo):
    lives = ["1 5", "1", "1", "1"]
    for _ in range(3):
        assert slurm(fake, repo, *lives, MAX_ATTEMPTS="2")[0] == 1
    status, said = slurm(fake, repo, *lives, MAX_ATTEMPTS="2")
    assert status == 1
    assert "error: no new checkpoint in 2 starts; newest: 5" in said
    assert (fake / "srun.calls").read_text().count("call") == 3
    assert (fake / "scontrol.arguments").read_text().count("requeue") == 3


def newest(repo, workdir):
    command = ["bash", repo / "launch/newest.sh", workdir]
    return subprocess.run(command, capture_output=True, text=True, cwd="/").stdout


def test_progress_in_a_bucket_is_seen(fake, repo):
    """`python -m hybrid_flax.run.checkpoints` itself: tests/run/test_buckets.py."""
    python = repo / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\n[ "$*" = "-m hybrid_flax.run.checkpoints gs://b/run" ] && echo 30\n'
    )
    python.chmod(0o755)
    assert newest(repo, "gs://b/run") == "30\n"


def test_progress_in_a_relative_folder_is_seen(fake, repo):
    """Relative to the checkout, in which the run is started, wherever the question comes from."""
    assert newest(repo, "runs/a") == ""
    for step in (9, 10, "10.orbax-checkpoint-tmp"):
        (repo / f"runs/a/checkpoints/{step}").mkdir(parents=True)
    assert newest(repo, "runs/a") == newest(repo, repo / "runs/a") == "10\n"


def test_slurm_starts_what_jax_expects(monkeypatch):
    """JAX takes one process per GPU, numbered by SLURM_LOCALID, all GPUs of the node in sight."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in text.splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert "gpus-per-task" not in options
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(None, "1234") == "n1:1234"
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (16, 11)
    assert SlurmCluster.get_local_process_id() == 3


# ----------------------------------------------------------------------------------------- GKE


def test_xpk_gets_one_command_that_restarts_on_what_is_worth_it(fake, repo):
    settings = {"CLUSTER": "c", "ZONE": "z", "NAME": "n", "TYPE": "v6e-64", "STORAGE": "s"}
    status, said = run(
        fake, LAUNCH / "xpk.sh", "--config=a b.py", "--workdir=/w", **settings, IMAGE="i"
    )
    assert status == 0, said
    arguments = (fake / "xpk.arguments").read_text().splitlines()
    assert arguments[:2] == ["workload", "create"]
    assert arguments[-1] == (
        "--command=exec python -m hybrid_flax.main --config=a\\ b.py --workdir=/w "
    )
    assert "--restart-on-exit-codes=1,124" in arguments  # beside XPK's own 42 and 127-255


def test_the_jobset_says_what_jax_and_gke_number_processes_by():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert spec["completionMode"] == "Indexed"  # JOB_COMPLETION_INDEX
    assert spec["backoffLimit"] == 0
    assert container["command"][:3] == ["python", "-m", "hybrid_flax.main"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_ends_on_unusable_input_only():
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["values"]) == ("FailJob", "In", [2])
    assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a podFailurePolicy needs it
