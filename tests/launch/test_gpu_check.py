"""What `./launch/gpu` writes down, on a machine without a GPU."""

import json
import sys

import pytest

from launch import gpu_check

TESTS = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_one"/>
<testcase classname="tests.a" name="test_two"><failure message="assert 1 == 2">...</failure></testcase>
<testcase classname="tests.a" name="test_three"><skipped message="takes 2 GPUs"/></testcase>
<testcase classname="tests.a" name="test_four"><error message="no driver"/></testcase>
</testsuite></testsuites>"""


def test_results_of_tests_are_counted_and_failures_and_reasons_named(tmp_path):
    (tmp_path / "tests.xml").write_text(TESTS)
    assert gpu_check._tests(tmp_path) == {
        "passed": 1,
        "failed": [
            {"test": "tests.a::test_two", "said": "assert 1 == 2"},
            {"test": "tests.a::test_four", "said": "no driver"},
        ],
        "skipped": {"takes 2 GPUs": 1},
    }


def test_a_part_that_hangs_costs_its_own_limit():
    assert gpu_check._code_of([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == 124


@pytest.mark.parametrize("codes", [[0, 0, 0], [0, 3, 0]])
def test_every_part_is_in_the_file_whatever_became_of_the_others(codes, tmp_path, monkeypatch):
    said, commands = iter(codes), []
    monkeypatch.setattr(gpu_check, "_code_of", lambda command, limit: commands.append(command) or next(said))
    code = gpu_check.main([str(tmp_path / "gpu.json"), "train.max_steps=3"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert code == int(any(codes))
    assert [found[part]["exit_code"] for part in ("tests", "bench", "run")] == codes
    assert commands[2].index("train.max_steps=3") > commands[2].index("train.max_steps=20")  # the later one wins
    assert {"device", "date", "torch"} <= found.keys() and found["run"]["records"] == []


def test_the_tests_that_a_gpu_runs_are_those_of_files_that_have_some(tmp_path):
    files = [one for one in gpu_check.tests_command(tmp_path / "tests.xml") if one.endswith(".py")]
    assert {"tests/parallel/test_nccl.py", "tests/model/test_attention.py"} <= set(files)
    assert "tests/launch/test_pretrain.py" not in files and all((gpu_check.ROOT / one).is_file() for one in files)


def test_all_parts_fit_ten_minutes_and_a_half():
    assert sum(gpu_check.LIMITS.values()) <= 630
