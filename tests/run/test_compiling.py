import subprocess
import sys

PROGRAM = """
import time
from hybrid_flax.run.compiling import compiling, exit_with

with compiling() as threads:
    threads.submit(time.sleep, 1000)
    print("said")
exit_with(3)
"""


def test_a_program_does_not_wait_for_what_compiles():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (result.returncode, result.stdout, result.stderr) == (3, "said\n", "")
