import inspect

from hybrid_flax.run.record import Record
from hybrid_flax.run.silent_record import SilentRecord


def test_the_silent_record_has_the_methods_of_the_other():
    def signatures(kind):
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in methods
            if not name.startswith("_")
        }

    assert signatures(SilentRecord) == signatures(Record)
